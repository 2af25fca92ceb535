"""Markdown to speakable passages, and passages to sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MAX_WORDS: Final = 90
"""A longer paragraph is cut between sentences: about half a minute of speech."""

_LINK: Final = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_CODE: Final = re.compile(r"`([^`]*)`")
_EMPHASIS: Final = re.compile(r"(\*{1,3}|_{1,3}|~~)(?=\S)(.+?)(?<=\S)\1")
_TAG: Final = re.compile(r"<[^>\n]*>")
_HEADING: Final = re.compile(r"(#{1,6})\s+(.*?)\s*#*$")
_BULLET: Final = re.compile(r"\s*(?:[-*+]|\d{1,3}[.)])\s+")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z0-9\"'(¿¡])")
_ABBREVIATION: Final = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof|St|No|vs|etc|e\.g|i\.e|approx|p\.m|a\.m|[A-Z])\.$")


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of text under one heading. `title` is the document's first heading."""

    title: str
    heading: str
    text: str

    @property
    def name(self) -> str:
        """Title and heading, as one line."""
        return f"{self.title}: {self.heading}" if self.heading else self.title

    @property
    def sentences(self) -> list[str]:
        return split_sentences(self.text)


def speakable(text: str) -> str:
    """One line of text without Markdown marks, as a voice may read it."""
    text = _LINK.sub(r"\1", text)
    text = _CODE.sub(r"\1", text)
    text = _EMPHASIS.sub(r"\2", text)
    text = _TAG.sub(" ", text)
    return " ".join(text.split())


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, whole: decimal points, initials and common abbreviations do not end one."""
    sentences: list[str] = []
    for part in _SENTENCE_END.split(text.strip()):
        if sentences and _ABBREVIATION.search(sentences[-1]):
            sentences[-1] = f"{sentences[-1]} {part.strip()}"
        elif part.strip():
            sentences.append(part.strip())
    return sentences


def passages_of(markdown: str, fallback_title: str) -> list[Passage]:
    """The passages of a Markdown document: its paragraphs and lists, under their headings.

    A list item becomes a sentence of its own. Paragraphs under one heading are joined up to `MAX_WORDS`.
    """
    title, heading = "", ""
    passages: list[Passage] = []
    gathered: list[str] = []

    def close() -> None:
        passages.extend(Passage(title or fallback_title, heading, text) for text in _joined(gathered))
        gathered.clear()

    for line in _logical_lines(markdown):
        match = _HEADING.match(line)
        if match is None:
            gathered.append(line)
            continue
        close()
        if len(match[1]) == 1 and not title:
            title = speakable(match[2])
        else:
            heading = speakable(match[2])
    close()
    return passages


def _logical_lines(markdown: str) -> Iterator[str]:
    """Headings, and paragraphs and list items each joined to one speakable line."""
    block: list[str] = []
    for line in [*markdown.splitlines(), ""]:
        bullet = _BULLET.match(line)
        if (not line.strip() or _HEADING.match(line) or bullet) and block:
            yield _as_sentence(speakable(" ".join(block)))
            block.clear()
        if _HEADING.match(line):
            yield line.strip()
        elif line.strip():
            block.append(line[bullet.end() :] if bullet else line)


def _as_sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", ":")) else text + "."


def _joined(paragraphs: list[str]) -> Iterator[str]:
    sentences = [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph)]
    text = ""
    for sentence in sentences:
        if text and len(text.split()) + len(sentence.split()) > MAX_WORDS:
            yield text
            text = ""
        text = f"{text} {sentence}".strip()
    if text:
        yield text
