"""What a turn must take at least: the waits for the services on its critical path, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.client import Turn
from bench.fake_config import FakeConfig

Timing = tuple[str, str, float, float, float]


def _letters(text: str) -> int:
    return sum(not character.isspace() for character in text)


def first_clause_tokens(config: FakeConfig, clause: str) -> int:
    """How many LLM tokens it takes until `clause`, the start of the answer, is complete."""
    wanted = _letters(clause)
    seen = 0
    for count, token in enumerate(config.tokens, 1):
        seen += _letters(token)
        if seen >= wanted:
            return count
    return len(config.tokens)


def spoken_clauses(config: FakeConfig) -> list[str]:
    """The answer as an early cutter speaks it: eight words first, then the rest of the sentences."""
    words = config.sentences[0].split()
    rest = " ".join(words[8:])
    return [" ".join(words[:8]), *([rest] if rest else []), *config.sentences[1:]]


def ideal_ms(config: FakeConfig, clause: str, *, speculated: bool) -> float:
    """The least total for fixed delays, from `vad_end` to the first audio byte.

    max(Intent, RAG) (nothing where speculation has both before the user stops), then the LLM up to the last token
    of the first clause, then the first chunk of speech.
    """
    retrieval = 0.0 if speculated else max(config.intent.p50_ms, config.rag.p50_ms)
    tokens = first_clause_tokens(config, clause)
    return retrieval + config.llm_first.p50_ms + (tokens - 1) * config.llm_gap_ms + config.tts_first.p50_ms


def waits_ms(config: FakeConfig, turn: Turn, timings: Iterable[Timing]) -> float:
    """The time of one turn that was spent waiting for the services, from what they logged themselves.

    A service's wait runs from its receipt of the request to its (first) answer; for the LLM to the token that ends
    the first clause. Waits are cut to the turn, and each stage's to the start of the next, so that a hedge that
    lost or a request nobody waited for does not count.
    """
    rows = sorted(timings, key=lambda row: row[2])
    to_clause = (first_clause_tokens(config, turn.first_clause) - 1) * config.llm_gap_ms / 1000
    end = turn.first_audio
    spans: list[tuple[float, float]] = []
    for stage in (("tts",), ("llm",), ("intent", "rag")):
        started = [row for row in rows if row[0] in stage and row[3] and row[2] < end]
        if not started:
            continue
        if stage == ("tts",):
            started = started[:1]
        extra = to_clause if stage == ("llm",) else 0.0
        spans += [(max(row[2], turn.intended), min(row[3] + extra, end)) for row in started]
        end = min(row[2] for row in started)
    return _covered(spans) * 1000


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals, in their unit."""
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        if stop > max(start, reached):
            total += stop - max(start, reached)
            reached = stop
    return total
