"""Clauses: early first one, whole sentences after it, nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.clauses import FIRST_MAX_WORDS, LATER_MAX_CHARS, ClauseCutter, speakable


def cut(text: str, size: int = 4) -> list[str]:
    cutter = ClauseCutter()
    clauses = [clause for at in range(0, len(text), size) for clause in cutter.push(text[at : at + size])]
    rest = cutter.flush()
    return [*clauses, rest] if rest else clauses


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        ("Yes. You can apply now.", ["Yes.", "You can apply now."]),
        ("You need a diploma, a transcript and a letter.", ["You need a diploma,", "a transcript and a letter."]),
        ("Well, it depends on the programme. Ask us.", ["Well, it depends on the programme.", "Ask us."]),
        ("The grade must be 2.5 or better. Good luck!", ["The grade must be 2.5 or better.", "Good luck!"]),
        ("Ask Dr. Miller about it. He knows.", ["Ask Dr. Miller about it.", "He knows."]),
        ("**Bold** words here. More.", ["Bold words here.", "More."]),
        ("", []),
        ("...", []),
        ("no end at all", ["no end at all"]),
    ],
)
def test_cutting(text: str, clauses: list[str]) -> None:
    assert cut(text) == clauses
    assert cut(text, 1) == clauses


@pytest.mark.parametrize(
    ("tokens", "clause"),
    [
        (["You", " need", " a", " diploma", "."], "You need a diploma."),
        (["You", " need", " a", " diploma", ","], "You need a diploma,"),
        (["It", " costs", " about", " 3."], None),
        (["Please", " ask", " Dr."], None),
        (["Write", " to", " office@uni."], None),
        (["Well", ","], None),
    ],
)
def test_the_first_clause_does_not_wait_for_the_token_behind_it(tokens: list[str], clause: str | None) -> None:
    cutter = ClauseCutter()
    out = [clause for token in tokens for clause in cutter.push(token)]
    assert out == ([clause] if clause else [])


def test_the_first_clause_comes_after_about_eight_words() -> None:
    cutter = ClauseCutter()
    out: list[str] = []
    for word in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]:
        out += cutter.push(word + " ")
    assert out == ["one two three four five six seven eight"]
    assert len(out[0].split()) == FIRST_MAX_WORDS


def test_a_sentence_without_end_is_cut_at_a_bound() -> None:
    assert all(len(clause) <= LATER_MAX_CHARS + 1 for clause in cut("Go. " + "word " * 300))
    assert all(len(clause) <= LATER_MAX_CHARS + 1 for clause in cut("Go. " + "x" * 2000)[1:-1])


@given(st.text(alphabet="ab .,!?\n-", max_size=400), st.integers(1, 7))
def test_nothing_is_lost_and_nothing_doubled(text: str, size: int) -> None:
    said = "".join("".join(cut(text, size)).split())
    spoken = "".join(text.split())
    letters = [char for char in spoken if char.isalpha()]
    assert [char for char in said if char.isalpha()] == letters


@given(st.text(max_size=200), st.integers(1, 7))
def test_any_text_gives_speakable_clauses(text: str, size: int) -> None:
    for clause in cut(text, size):
        assert clause == speakable(clause)
        assert "\n" not in clause
