"""The ledger of a turn: one deadline spent down through the stages, and from the stamps the latency breakdown.

`overhead` is our own cost: the time from the end of speech to the first audio byte, minus the critical path of
downstream waits (the slower of intent and RAG, then the answer's first clause, then the first audio chunk). All times
come in as seconds on one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STAGE_TARGETS_MS: Final = {
    "stt": 50.0,
    "intent_rag": 80.0,
    "first_clause": 100.0,
    "tts_first_chunk": 75.0,
    "overhead": 140.0,
}
"""The stage targets behind the 445 ms budget, and the rest: the stage furthest over its target broke the budget."""

MAX_STT_MS: Final = 2000.0
"""A fragment's timestamp further back than this is a wrong clock, not a slow STT."""

Breakdown = dict[str, float | bool | str]

_CHAIN: Final = ("intent", "rag", "first_clause", "tts_first_chunk")


@dataclass(slots=True)
class _Wait:
    began: float
    ended: float | None = None


class Ledger:
    """Stamps of one turn.

    `started` is the receipt of `vad_end`, `stt_ms` what STT took before it where that is known, `deadline_ms` the sum
    of the stages' timeouts: no chain of calls of this turn may wait longer for its first audio, but for the time in
    which the first clause is being written.
    """

    __slots__ = ("_answerable", "_first_audio", "_waits", "budget_ms", "deadline", "rag_answers", "saved_ms", "started",
                 "stt_ms")  # fmt: skip

    def __init__(self, started: float, budget_ms: float, deadline_ms: float, stt_ms: float | None = None) -> None:
        self.started = started
        self.budget_ms = budget_ms
        self.deadline = started + deadline_ms / 1000.0
        self.stt_ms = stt_ms
        self.saved_ms = 0.0
        self.rag_answers = False
        self._waits: dict[str, _Wait] = {}
        self._first_audio: float | None = None
        self._answerable: float | None = None

    def rebase(self, started: float, stt_ms: float | None) -> None:
        """The end of speech came at `started` only: the turn was begun before it, and what it waited for till then is
        saved."""
        chain = [wait for stage, wait in self._waits.items() if stage in _CHAIN]
        if chain:
            done = [wait.ended for wait in chain if wait.ended is not None]
            reached = started if len(done) < len(chain) else min(started, max(done))
            self.saved_ms = max(0.0, (reached - self.started) * 1000.0)
        self.deadline += started - self.started
        self.started = started
        self.stt_ms = stt_ms
        if self._answerable is not None:
            self._answerable = max(self._answerable, started)
        for wait in self._waits.values():
            wait.began = max(wait.began, started)
            if wait.ended is not None:
                wait.ended = max(wait.ended, started)

    def begin(self, stage: str, at: float) -> None:
        """A wait for `stage` begins; what was waited for before the end of speech costs the caller nothing."""
        self._waits[stage] = _Wait(max(at, self.started))

    def end(self, stage: str, at: float) -> None:
        """The answer of `stage` is there, or given up. Only the first end counts."""
        wait = self._waits.get(stage)
        if wait is not None and wait.ended is None:
            wait.ended = max(at, wait.began)

    def answerable(self, at: float) -> None:
        """The first clause of the answer is there.

        The timeouts bound the wait for its first word. What it took from there on is the pace at which the model
        writes, watched by the stall timeout: it puts the deadline off, or a slow one would have no time to be spoken.
        """
        if self._answerable is not None:
            return
        self._answerable = at
        first_word = self._waits.get("rag" if self.rag_answers else "llm_first_token")
        if first_word is not None and first_word.ended is not None:
            self.deadline += max(0.0, at - first_word.ended)

    def first_audio(self, at: float) -> None:
        """The first audio byte (or, without audio, the answer's text) is written."""
        if self._first_audio is None:
            self._first_audio = at

    def left_ms(self, stage_timeout_ms: float, now: float) -> float:
        """What a call that starts now may take: its stage's timeout, but no more than is left of the deadline."""
        return max(1.0, min(stage_timeout_ms, (self.deadline - now) * 1000.0))

    def breakdown(self, now: float) -> Breakdown:
        """The latency breakdown of the protocol: milliseconds by name, as far as the turn has come by `now`."""
        end = self._first_audio if self._first_audio is not None else now
        spans = self._spans(end)
        out: Breakdown = {}
        if self.stt_ms is not None:
            out["stt_ms"] = round(self.stt_ms, 3)
        for stage in ("intent", "rag", "intent_rag", "llm_first_token", "first_clause", "tts_first_chunk"):
            if stage in spans:
                out[f"{stage}_ms"] = round(spans[stage], 3)
        own = (end - self.started) * 1000.0
        if self._answerable is not None:
            out["thinking_ms"] = round((self._answerable - self.started) * 1000.0, 3)
        out["overhead_ms"] = round(max(0.0, own - self._critical_path(spans)), 3)
        if self.saved_ms:
            out["saved_ms"] = round(self.saved_ms, 3)
        total = own + (self.stt_ms or 0.0)
        out["total_ms"] = round(total, 3)
        out["budget_ms"] = self.budget_ms
        out["within_budget"] = total <= self.budget_ms
        if total > self.budget_ms:
            measured = {**spans, "stt": self.stt_ms or 0.0, "overhead": own - self._critical_path(spans)}
            out["budget_broken_by"] = max(
                STAGE_TARGETS_MS, key=lambda stage: measured.get(stage, 0.0) - STAGE_TARGETS_MS[stage]
            )
        return out

    def _spans(self, end: float) -> dict[str, float]:
        """Milliseconds of each wait; one still open lasts until `end`."""
        spans = {
            stage: ((wait.ended if wait.ended is not None else max(end, wait.began)) - wait.began) * 1000.0
            for stage, wait in self._waits.items()
        }
        if "intent" in spans or "rag" in spans:
            both = [self._waits[stage] for stage in ("intent", "rag") if stage in self._waits]
            last = max(wait.ended if wait.ended is not None else max(end, wait.began) for wait in both)
            spans["intent_rag"] = (last - min(wait.began for wait in both)) * 1000.0
        return spans

    def _critical_path(self, spans: dict[str, float]) -> float:
        """The waits that stood one behind the other; the first clause's wait includes the first token's."""
        understanding = 0.0 if self.rag_answers else spans.get("intent_rag", 0.0)
        answer = spans.get("first_clause", spans.get("llm_first_token", 0.0))
        return understanding + answer + spans.get("tts_first_chunk", 0.0)
