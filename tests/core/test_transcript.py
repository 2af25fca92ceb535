"""The text buffer never loses or doubles a word, whichever way STT sends its partials."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.transcript import MAX_UTTERANCE_CHARS, Style, Transcript, normalise

WORDS = ["what", "are", "the", "admission", "requirements", "for", "international", "students", "please", "tell", "me"]


def heard(*fragments: str | tuple[str], start: Transcript | None = None) -> Transcript:
    """A str is a partial, a one-tuple a final."""
    transcript = start or Transcript()
    for fragment in fragments:
        text, is_final = (fragment, False) if isinstance(fragment, str) else (fragment[0], True)
        transcript = transcript.merged(text, is_final)
    return transcript


@pytest.mark.parametrize(
    ("fragments", "pieces"),
    [
        (["what", "what are", "what are admission"], ["what are admission"]),
        (["what", "are", "admission", "requirements"], ["what are admission requirements"]),
        (["what", "what are", ("What are admission requirements?",)], ["What are admission requirements?"]),
        (["wood", "would", "would you like"], ["would you like"]),
        (["can", "candidates", "apply"], ["can candidates apply"]),
        (["what are a mission", "what are admission requirements"], ["what are admission requirements"]),
        ([("Hello.",), "what", "what is"], ["Hello.", "what is"]),
        ([("yes",), ("yes",)], ["yes", "yes"]),
        (["what are", "what are"], ["what are"]),
        (["in", "in Berlin"], ["in Berlin"]),
        (["i would like", "and also a pony"], ["i would like and also a pony"]),
        (["what  are\n the"], ["what are the"]),
        (["a", "b", "c", ("a b c",)], ["a b c"]),
    ],
)
def test_merging(fragments: list[str | tuple[str]], pieces: list[str]) -> None:
    assert heard(*fragments).pieces == pieces


def test_mode_overrides_the_guess() -> None:
    partial = heard("what are")
    assert partial.merged("admission", False, "replace").pieces == ["admission"]
    assert partial.merged("what are", False, "append").pieces == ["what are what are"]


def test_a_fragment_without_words_changes_nothing_but_a_final_one_fixes() -> None:
    partial = heard("what are")
    assert partial.merged("  ", False) == partial
    assert partial.merged("", True).fixed == ("what are",)


def test_an_endless_utterance_is_bounded() -> None:
    transcript = Transcript()
    for _ in range(40):
        transcript = transcript.merged("word " * 200, True)
    assert len(transcript.text) <= MAX_UTTERANCE_CHARS


def test_says_and_revises() -> None:
    transcript = heard(("Hello there.",), "what are admission")
    assert transcript.says("hello there what are admission")
    assert transcript.says("What are admission?")
    assert not transcript.says("what are")
    assert transcript.revises("What are admission requirements?")
    assert not transcript.revises("for students from abroad")


sentences = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), min_size=1, max_size=4)


@given(sentences)
def test_growing_partials_lose_and_double_nothing(utterance: list[list[str]]) -> None:
    transcript = Transcript()
    for words in utterance:
        for end in range(1, len(words) + 1):
            transcript = transcript.merged(" ".join(words[:end]), False)
            transcript = transcript.merged(" ".join(words[:end]), False)
        transcript = transcript.merged(" ".join(words).capitalize() + ".", True)
    assert normalise(transcript.text) == tuple(word for words in utterance for word in words)


@given(sentences)
def test_single_words_lose_and_double_nothing(utterance: list[list[str]]) -> None:
    transcript = Transcript(style=Style.CHUNKS)
    for words in utterance:
        for word in words:
            transcript = transcript.merged(word, False)
        transcript = transcript.merged("", True)
    assert normalise(transcript.text) == tuple(word for words in utterance for word in words)


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12, unique=True))
def test_single_words_are_recognised_without_knowing_the_style(words: list[str]) -> None:
    assert normalise(heard(*words).text) == tuple(words)


@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=5), min_size=1, max_size=5))
def test_final_chunks_are_kept_as_they_come(chunks: list[list[str]]) -> None:
    transcript = heard(*[(" ".join(chunk),) for chunk in chunks])
    assert list(transcript.fixed) == [" ".join(chunk) for chunk in chunks]


@given(st.lists(st.tuples(st.text(max_size=30), st.booleans(), st.sampled_from([None, "replace", "append"]))))
def test_any_text_is_taken_without_an_error(fragments: list[tuple[str, bool, None]]) -> None:
    transcript = Transcript()
    for text, is_final, mode in fragments:
        transcript = transcript.merged(text, is_final, mode)
        assert len(transcript.text) <= MAX_UTTERANCE_CHARS
