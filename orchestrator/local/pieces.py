"""The pieces a text is synthesised in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from orchestrator.local.passages import speakable, split_sentences

_FIRST_WORDS: Final = 10
_LATER_WORDS: Final = 24
_SHORTEST_PIECE: Final = 3
_CLAUSE_END: Final = re.compile(r"(?<=[,;:])\s+")


@dataclass(frozen=True, slots=True)
class Piece:
    """What is synthesised in one go: a sentence or a part of one. `sentence` counts from 0."""

    text: str
    sentence: int
    starts_sentence: bool
    ends_sentence: bool


def pieces(text: str) -> list[Piece]:
    """The text in pieces: sentences, the long ones cut at clause boundaries, the very first short.

    A piece is heard only when all of it is synthesised, so the first decides the time to first audio.
    """
    result: list[Piece] = []
    sentences = [sentence for sentence in split_sentences(speakable(text)) if re.search(r"\w", sentence)]
    for number, sentence in enumerate(sentences):
        parts = list(_parts(sentence, _LATER_WORDS if result else _FIRST_WORDS))
        for place, part in enumerate(parts):
            result.append(Piece(part, number, place == 0, place == len(parts) - 1))
    return result


def _parts(sentence: str, first_limit: int) -> Iterator[str]:
    clauses = _CLAUSE_END.split(sentence)
    limit, part = first_limit, ""
    for clause in clauses:
        longer = f"{part} {clause}".strip()
        if len(part.split()) >= _SHORTEST_PIECE and len(longer.split()) > limit:
            yield part
            limit, part = _LATER_WORDS, clause
        else:
            part = longer
    yield part
