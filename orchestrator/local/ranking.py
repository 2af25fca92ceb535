"""Which sentences answer a question: similarity, word overlap and place, weighed together. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

OVERLAP_WEIGHT: Final = 0.25
RANK_STEP: Final = 0.04
"""What each place further back in the list of passages costs a sentence."""
RELATED: Final = 0.75
"""A neighbouring sentence joins the answer if its score is at least this part of the best one's."""
MAX_ANSWER_WORDS: Final = 45
"""About 17 seconds of speech."""

_WORD: Final = re.compile(r"[a-z0-9]+(?:\.[0-9]+)?")
_SUFFIXES: Final = (
    "ements",
    "ement",
    "ations",
    "ation",
    "ings",
    "ing",
    "ions",
    "ion",
    "ies",
    "ed",
    "es",
    "s",
    "y",
    "e",
)
_COMMON: Final = (
    "a about am an and any are at be been but by can could did do does for from get had has have how i if in is it its "
    "let like may me might much my need of on or our please shall she should so some tell that the their them then "
    "there these they this to us want was we were what when where which who whom whose why will with would you your"
)
_STOP_WORDS: Final = frozenset(_COMMON.split())


@dataclass(frozen=True, slots=True)
class Scored:
    """A sentence of passage number `passage` (0 is the best), at place `place` in it."""

    text: str
    passage: int
    place: int
    score: float


def terms(text: str) -> frozenset[str]:
    """The words that carry meaning, cut to their stems ("requirements" and "required" become one)."""
    return frozenset(_stem(word) for word in _WORD.findall(text.lower()) if word not in _STOP_WORDS)


def _stem(word: str) -> str:
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 4:
            return word[: -len(suffix)]
    return word


def overlap(question: frozenset[str], text: frozenset[str]) -> float:
    """The part, 0…1, of the question's terms that stand in the text."""
    return len(question & text) / len(question) if question else 0.0


def scored(question: str, passages: Sequence[Sequence[str]], similarities: Sequence[Sequence[float]]) -> list[Scored]:
    """Every sentence of the passages with its score; `similarities` are its cosines to the question."""
    wanted = terms(question)
    return [
        Scored(
            sentence,
            number,
            place,
            similarity + OVERLAP_WEIGHT * overlap(wanted, terms(sentence)) - RANK_STEP * number,
        )
        for number, (sentences, row) in enumerate(zip(passages, similarities, strict=True))
        for place, (sentence, similarity) in enumerate(zip(sentences, row, strict=True))
    ]


def answer_from(sentences: Sequence[Scored], max_words: int = MAX_ANSWER_WORDS) -> list[Scored]:
    """The best sentence, and the one after or before it in its passage if that is nearly as good and there is room.

    In the order in which they stand in the passage; empty if there are no sentences.
    """
    if not sentences:
        return []
    best = max(sentences, key=lambda sentence: sentence.score)
    room = max_words - len(best.text.split())
    neighbours = [
        sentence
        for sentence in sentences
        if sentence.passage == best.passage
        and abs(sentence.place - best.place) == 1
        and sentence.score >= RELATED * best.score
        and len(sentence.text.split()) <= room
    ]
    if not neighbours:
        return [best]
    second = max(neighbours, key=lambda sentence: sentence.score)
    return sorted((best, second), key=lambda sentence: sentence.place)
