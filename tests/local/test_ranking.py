"""Choice of sentences, and what is read out of a chat request."""

from __future__ import annotations

import msgspec
import pytest

from orchestrator.local.openai_api import ChatMessage, ChatRequest, Prompt, prompt_of, reply_of
from orchestrator.local.ranking import answer_from, overlap, scored, terms


def test_terms_are_stems_of_words_that_mean_something() -> None:
    assert terms("What are the admission requirements?") == terms("required admissions")
    assert terms("what do you have for me") == frozenset()


def test_overlap_is_the_part_of_the_question_found() -> None:
    assert overlap(terms("tuition fees"), terms("The tuition is high.")) == 0.5
    assert overlap(frozenset(), terms("anything")) == 0.0


def test_the_words_of_the_question_decide_between_equals() -> None:
    sentences = scored("What is the application fee?", [["The deposit is due.", "The fee is 50."]], [[0.5, 0.5]])
    assert [item.text for item in answer_from(sentences, max_words=4)] == ["The fee is 50."]


def test_the_better_passage_wins_over_an_equal_sentence_further_back() -> None:
    sentences = scored("x", [["First."], ["Second."]], [[0.5], [0.5]])
    assert [item.text for item in answer_from(sentences)] == ["First."]


def test_a_neighbour_nearly_as_good_joins_in_the_order_of_the_text() -> None:
    sentences = scored("x", [["One is here.", "Two is here.", "Three is off."]], [[0.5, 0.6, 0.1]])
    assert [item.text for item in answer_from(sentences)] == ["One is here.", "Two is here."]


def test_an_answer_never_grows_beyond_its_limit_nor_joins_distant_sentences() -> None:
    sentences = scored("x", [["One two three.", "Four five six."]], [[0.6, 0.6]])
    assert len(answer_from(sentences, max_words=5)) == 1
    apart = scored("x", [["One.", "Off.", "Three."]], [[0.6, 0.1, 0.6]])
    assert [item.text for item in answer_from(apart)] == ["One."]


def test_no_sentences_no_answer() -> None:
    assert answer_from(scored("x", [], [])) == []


def chat(*messages: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage(role, content) for role, content in messages]


def test_passages_and_question_are_read_out_of_the_messages() -> None:
    system = "Answer briefly.\n[9] not a passage\n\nPassages:\n[1] Tuition is 4,500.\n[2] A fee\nof 180.\n\n[3]  "
    prompt = prompt_of(
        chat(("system", system), ("user", "How much?"), ("assistant", "4,500."), ("user", "And the fee?"))
    )
    assert prompt == Prompt("And the fee?", "How much?", ("Tuition is 4,500.", "A fee of 180."))


def test_without_passages_or_user_there_is_just_nothing() -> None:
    assert prompt_of(chat(("system", "Be nice. Passages: none"))) == Prompt("", "", ())


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "How"}, {"type": "image_url"}, {"type": "text", "text": "much?"}]
    assert prompt_of([ChatMessage("user", parts)]).question == "How much?"


def test_a_reply_streams_words_and_is_cut_where_the_request_says() -> None:
    request = ChatRequest(chat(("user", "one two")), max_tokens=3)
    reply = reply_of("Tuition is 4,500 dollars.", request, "extractive")
    assert reply.deltas == ("Tuition", " is", " 4,500")
    assert reply.finish_reason == "length"
    assert reply.completion()["choices"][0]["message"]["content"] == "Tuition is 4,500"
    assert reply.usage == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert reply_of("Yes.", ChatRequest(chat(("user", "x"))), "m").finish_reason == "stop"


@pytest.mark.parametrize("body", [b'{"messages": []}', b'{"messages": "x"}', b"{}", b'{"messages":[{}]}'])
def test_a_wrong_request_is_refused(body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=ChatRequest)
