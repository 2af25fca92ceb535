"""Markdown to passages and sentences, and the pieces in which they are spoken."""

from __future__ import annotations

import pytest

from orchestrator.local.entities import entities
from orchestrator.local.passages import MAX_WORDS, Passage, passages_of, speakable, split_sentences
from orchestrator.local.pieces import pieces
from orchestrator.local.retrieval import KNOWLEDGE

DOCUMENT = """# Fees

Tuition is **4,500 dollars**
per semester.

## Other *fees*

- a semester fee of `180` dollars
- see [the portal](https://example.org/fees)

1. First pay.
2. Then study!
"""


def test_passages_stand_under_their_headings() -> None:
    assert passages_of(DOCUMENT, "fees") == [
        Passage("Fees", "", "Tuition is 4,500 dollars per semester."),
        Passage(
            "Fees",
            "Other fees",
            "a semester fee of 180 dollars. see the portal. First pay. Then study!",
        ),
    ]


def test_a_document_without_a_heading_is_named_after_its_file() -> None:
    assert passages_of("Just a line", "notes") == [Passage("notes", "", "Just a line.")]


def test_a_long_paragraph_is_cut_between_sentences() -> None:
    sentence = "This sentence has exactly seven words inside."
    passages = passages_of("# T\n\n" + " ".join([sentence] * 30), "t")
    assert len(passages) == 3
    assert all(len(passage.text.split()) <= MAX_WORDS for passage in passages)
    assert sum(len(passage.sentences) for passage in passages) == 30


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A score of 6.5 is enough. Or 90.", ["A score of 6.5 is enough.", "Or 90."]),
        ("Ask Dr. Smith. He knows.", ["Ask Dr. Smith.", "He knows."]),
        ("Really? Yes! Good.", ["Really?", "Yes!", "Good."]),
        ("no end", ["no end"]),
        ("  ", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_speakable_leaves_no_markup() -> None:
    assert speakable("**Pay** _now_ [here](x) with `card` <br> 2 * 3") == "Pay now here with card 2 * 3"


def test_every_file_of_the_knowledge_base_gives_speakable_passages() -> None:
    for path in KNOWLEDGE.glob("*.md"):
        passages = passages_of(path.read_text("utf-8"), path.stem)
        assert passages
        for passage in passages:
            assert not set("*#`[]_<>") & set(passage.text)
            assert passage.text.endswith((".", "!", "?"))


def test_a_long_first_sentence_is_spoken_from_its_first_clause() -> None:
    parts = pieces(
        "The admission requirements are a high school diploma, a grade average of at least 3.0, and proof of English. "
        "Good luck!"
    )
    assert [part.text for part in parts] == [
        "The admission requirements are a high school diploma,",
        "a grade average of at least 3.0, and proof of English.",
        "Good luck!",
    ]
    assert [(part.sentence, part.starts_sentence, part.ends_sentence) for part in parts] == [
        (0, True, False),
        (0, False, True),
        (1, True, True),
    ]


def test_pieces_joined_are_the_text() -> None:
    text = "Tuition is 4,500 dollars per semester; doctoral students, however, pay none. Why? It is paid by the state."
    assert " ".join(part.text for part in pieces(text)) == text


@pytest.mark.parametrize("text", ["", " ... ", "—"])
def test_nothing_to_say_gives_no_piece(text: str) -> None:
    assert pieces(text) == []


def test_entities_are_what_is_named_in_so_many_words() -> None:
    assert entities("Is an IELTS of 6.5 enough for the Master's in data science in fall 2027?") == {
        "degree": "master",
        "subject": "data science",
        "term": "fall",
        "test": "ielts",
        "score": "6.5",
        "year": "2027",
    }
    assert entities("When is July 15 for a $50 fee?") == {"date": "july 15", "amount": "$50"}
    assert entities("hello there") == {}
