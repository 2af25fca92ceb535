"""Hybrid retrieval over a folder of Markdown files: embeddings for meaning, BM25 for words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from orchestrator.local.embeddings import Embedder
from orchestrator.local.errors import LocalStackError, load_module
from orchestrator.local.passages import Passage, passages_of
from orchestrator.local.ranking import Scored, answer_from, scored, terms

BM25_WEIGHT: Final = 0.3
RELEVANT: Final = 0.35
"""Score below which the best passage does not speak of the question's subject."""

KNOWLEDGE: Final = Path(__file__).parent / "knowledge"


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage and how well it fits, about 0…1.3: its cosine plus its share of the best BM25 score."""

    passage: Passage
    score: float


@dataclass(frozen=True, slots=True)
class Found:
    """The passages for a query, best first, and the sentences that answer it."""

    hits: tuple[Hit, ...]
    answer: tuple[Scored, ...]
    confidence: float

    @property
    def text(self) -> str:
        return " ".join(sentence.text for sentence in self.answer)


class KnowledgeBase:
    """The passages of a folder, embedded and indexed. Not to be called from two threads at once."""

    def __init__(self, folder: Path, embedder: Embedder) -> None:
        self.passages = load_passages(folder)
        self._embedder = embedder
        self._vectors = embedder.embed_all([f"{item.name}. {item.text}" for item in self.passages])
        self._sentences = [item.sentences for item in self.passages]
        self._sentence_vectors = [
            embedder.embed_all([f"{item.name}. {sentence}" for sentence in item.sentences]) for item in self.passages
        ]
        self._bm25 = load_module("bm25s").BM25()
        self._bm25.index([self._words(f"{item.name} {item.text}") for item in self.passages], show_progress=False)
        self._vocabulary: dict[str, Any] = self._bm25.vocab_dict

    def find(self, query: str, top_k: int = 4) -> Found:
        """The best passages, and out of them an answer; none of either if nothing is relevant."""
        vector = self._embedder.embed(query)
        scores = self._vectors @ vector + BM25_WEIGHT * self._word_scores(query)
        order = np.argsort(-scores)[:top_k]
        if float(scores[order[0]]) < RELEVANT:
            return Found((), (), 0.0)
        hits = tuple(Hit(self.passages[number], float(scores[number])) for number in order)
        sentences = scored(
            query,
            [self._sentences[number] for number in order],
            [(self._sentence_vectors[number] @ vector).tolist() for number in order],
        )
        return Found(hits, tuple(answer_from(sentences)), min(1.0, hits[0].score))

    def _word_scores(self, query: str) -> Any:
        """BM25 of each passage, as a part of the best one's."""
        known = [word for word in self._words(query) if word in self._vocabulary]
        if not known:
            return np.zeros(len(self.passages), np.float32)
        scores = self._bm25.get_scores(known)
        return scores / max(float(scores.max()), 1e-9)

    @staticmethod
    def _words(text: str) -> list[str]:
        return sorted(terms(text))


def load_passages(folder: Path) -> list[Passage]:
    """The passages of every `*.md` in the folder.

    Raises:
        LocalStackError: there is no such folder, or not one passage in it.
    """
    passages = [passage for path in _documents(folder) for passage in passages_of(path.read_text("utf-8"), path.stem)]
    if not passages:
        raise LocalStackError(f"no Markdown text in {folder}: give a folder of .md files with --knowledge")
    return passages


def _documents(folder: Path) -> Iterable[Path]:
    return sorted(folder.glob("*.md")) if folder.is_dir() else []
