"""The text of the utterance in progress, merged from the fragments STT sends.

STT services send either growing partials ("what are", "what are admission") or one word or chunk at a time. A fragment
that extends or revises the current partial replaces it, otherwise it is appended; a final one is fixed. The style is
learnt from the fragments and kept for the whole session; `mode` overrides the guess.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from enum import Enum
from typing import Literal

MAX_UTTERANCE_CHARS = 16_384
"""A user who talks for a quarter of an hour without a pause stays below this; what goes beyond is refused."""

_REVISION_SIMILARITY = 0.6
_WORDS_STYLE_PIECES = 2

Mode = Literal["replace", "append"]


class Style(Enum):
    """How this session's STT sends partials."""

    UNKNOWN = "unknown"
    GROWING = "growing"
    CHUNKS = "chunks"


def normalise(text: str) -> tuple[str, ...]:
    """The words of `text` for comparison: case folded, without punctuation at their edges."""
    words = (word.strip(".,;:!?…\"'()[]-–—").casefold() for word in text.split())
    return tuple(word for word in words if word)


@dataclass(frozen=True, slots=True)
class Transcript:
    """`fixed` are the final pieces in order; `partial` are the pieces of what is not final yet."""

    fixed: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    style: Style = Style.UNKNOWN

    @property
    def text(self) -> str:
        """All of it, as one line."""
        return " ".join(self.fixed + self.partial)

    @property
    def pieces(self) -> list[str]:
        """The fixed pieces and the current partial: what `state_update` shows."""
        return [*self.fixed, " ".join(self.partial)] if self.partial else list(self.fixed)

    @property
    def empty(self) -> bool:
        return not self.fixed and not self.partial

    def cleared(self) -> Transcript:
        """An empty one that still knows the style."""
        return Transcript(style=self.style)

    def merged(self, text: str, is_final: bool, mode: Mode | None = None) -> Transcript:
        """With the fragment `text` taken in. One without a word changes nothing, but a final one fixes the partial."""
        piece = " ".join(text.split())
        merged = self
        if normalise(piece) or (piece and not self.partial):
            if len(self.text) + len(piece) > 2 * MAX_UTTERANCE_CHARS:
                return self
            merged = self._with_partial(piece, is_final, mode)
        if is_final and merged.partial:
            merged = replace(merged, fixed=(*merged.fixed, " ".join(merged.partial)), partial=())
        return merged if len(merged.text) <= MAX_UTTERANCE_CHARS else self

    def revises(self, text: str) -> bool:
        """Whether `text` says the partial, or else the last fixed piece, again: extended or corrected."""
        last = self.partial or self.fixed[-1:]
        return bool(last) and _revises(normalise(" ".join(last)), normalise(text))

    def says(self, text: str) -> bool:
        """Whether `text` has the very words of all of it or of its last piece."""
        words = normalise(text)
        return words == normalise(self.text) or any(words == normalise(piece) for piece in self.pieces[-1:])

    def _with_partial(self, piece: str, is_final: bool, mode: Mode | None) -> Transcript:
        if not self.partial or mode == "replace":
            return replace(self, partial=(piece,))
        if mode == "append":
            return replace(self, partial=(*self.partial, piece))
        old, new = normalise(" ".join(self.partial)), normalise(piece)
        if len(new) > 1 or is_final:
            return self._with_longer_piece(piece, old, new, is_final)
        return self._with_single_word(piece, old, new)

    def _with_longer_piece(self, piece: str, old: tuple[str, ...], new: tuple[str, ...], is_final: bool) -> Transcript:
        if _revises(old, new):
            style = self.style if is_final or len(self.partial) > 1 else Style.GROWING
            return replace(self, partial=(piece,), style=style)
        last = normalise(self.partial[-1])
        if (
            len(self.partial) > 1
            and self.style is not Style.CHUNKS
            and len(new) > len(last)
            and new[: len(last)] == last
        ):
            # Single words that looked like a sequence were revisions of one another: "wood", "would", "would you".
            return replace(self, partial=(piece,), style=Style.GROWING)
        if is_final and len(new) == 1 and new == last:
            return replace(self, partial=(*self.partial[:-1], piece))
        return replace(self, partial=(*self.partial, piece))

    def _with_single_word(self, piece: str, old: tuple[str, ...], new: tuple[str, ...]) -> Transcript:
        if self.style is Style.CHUNKS:
            return replace(self, partial=(*self.partial, piece))
        if new == old:
            return replace(self, partial=(piece,))
        if self.style is Style.GROWING:
            if old[:1] == new or (len(old) == 1 and _revises(old, new)):
                return replace(self, partial=(piece,))
            return replace(self, partial=(*self.partial, piece))
        style = Style.CHUNKS if len(self.partial) >= _WORDS_STYLE_PIECES else Style.UNKNOWN
        return replace(self, partial=(*self.partial, piece), style=style)


def _revises(old: tuple[str, ...], new: tuple[str, ...]) -> bool:
    """Whether the words `new` are the words `old` said again, extended, shortened or corrected."""
    if new[: len(old)] == old or (len(new) > 1 and old[: len(new)] == new):
        return True
    common = 0
    for before, after in zip(old, new, strict=False):
        if before != after:
            break
        common += 1
    if common and common * 2 >= len(old):
        return True
    return SequenceMatcher(None, " ".join(old), " ".join(new)[: len(" ".join(old)) + 8], autojunk=False).ratio() >= (
        _REVISION_SIMILARITY
    )
