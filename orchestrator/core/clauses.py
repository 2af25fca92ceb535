"""Cuts a streamed answer into stretches worth speaking by themselves.

The first one is cut early, at the first clause boundary or after about eight words, because the caller waits for it;
later ones are whole sentences, because prosody is better and the audio of the one before is still playing.
"""

from __future__ import annotations

import re

FIRST_MIN_WORDS = 3
FIRST_MAX_WORDS = 8
LATER_MAX_CHARS = 240

_SENTENCE_END = re.compile(r"[.!?…]+[\"')\]]*(?=\s)|[。！？]|\n")
_CLAUSE_END = re.compile(r"[.!?…;:]+[\"')\]]*(?=\s)|,(?=\s)|\s[–—-](?=\s)|[。！？，；]|\n")
_CLAUSE_END_SO_FAR = re.compile(r"(?<=[^\W\d_]{2})[.!?…;:,]+$")
_ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|prof|st|no|vs|e\.g|i\.e|etc|approx|dept|univ|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)"
    r"|\b[a-z]|^\s*\d+)\.$",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"(?:\*\*|__|`+|^\s*#+\s+|^\s*[-*•]\s+)", re.MULTILINE)
_SPEAKABLE = re.compile(r"\w")


class ClauseCutter:
    """Takes text deltas in, gives clauses out. The clauses joined are the text, but for white space and markup."""

    __slots__ = ("_buffer", "_first", "_scanned")

    def __init__(self) -> None:
        self._buffer = ""
        self._first = True
        self._scanned = 0

    def push(self, delta: str) -> list[str]:
        """The clauses that `delta` completes."""
        self._buffer += delta
        clauses: list[str] = []
        while (cut := self._find_cut()) > 0:
            clause = speakable(self._buffer[:cut])
            self._buffer = self._buffer[cut:].lstrip()
            self._scanned = 0
            if clause:
                clauses.append(clause)
                self._first = False
        return clauses

    def flush(self) -> str:
        """What is left when the answer is over; empty if nothing speakable is."""
        clause = speakable(self._buffer)
        self._buffer = ""
        self._scanned = 0
        return clause

    def _find_cut(self) -> int:
        pattern = _CLAUSE_END if self._first else _SENTENCE_END
        text = self._buffer
        for match in pattern.finditer(text, self._scanned):
            end = match.end()
            if self._accepts(text[:end]):
                return end
        if self._first:
            return self._cut_at_the_end(text) or self._cut_after_words(text)
        if len(text) > LATER_MAX_CHARS:
            return max(text.rfind(", ", 0, LATER_MAX_CHARS) + 1, text.rfind(" ", 0, LATER_MAX_CHARS), 1)
        # A boundary needs the character behind it and up to eight before it, so only the tail is looked at again.
        self._scanned = max(0, len(text) - 8)
        return 0

    def _accepts(self, head: str) -> bool:
        if head.endswith(".") and _ABBREVIATION.search(head[-12:]):
            return False
        if not _SPEAKABLE.search(head):
            return False
        if self._first and head[-1] in ",;:–—-":
            return len(head.split()) >= FIRST_MIN_WORDS
        return True

    def _cut_at_the_end(self, text: str) -> int:
        """Where the text so far ends a clause, though the next token is not there to prove it: it would cost its time.

        A mark behind a digit, a single letter or within an address may well go on, so those wait.
        """
        match = _CLAUSE_END_SO_FAR.search(text, max(0, len(text) - 4))
        if match is None or any(mark in text.rpartition(" ")[2] for mark in "@/") or not self._accepts(text):
            return 0
        return len(text)

    def _cut_after_words(self, text: str) -> int:
        if text.count(" ") < FIRST_MAX_WORDS:
            return 0
        for words, match in enumerate(re.finditer(r"\S+\s", text), start=1):
            if words == FIRST_MAX_WORDS:
                return match.end()
        return 0


def speakable(text: str) -> str:
    """`text` on one line, without Markdown marks; empty if it has nothing to say."""
    clean = _MARKUP.sub(" ", text) if any(mark in text for mark in "*_`#-•") else text
    clean = " ".join(clean.split())
    return clean if _SPEAKABLE.search(clean) else ""
