"""Where the answer's text comes from, and what takes its place when that fails."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.conversation.prompt import build_messages
from orchestrator.core.budget import Ledger
from orchestrator.downstream.types import Call, Intent, Pace, Retrieval, Stream
from orchestrator.errors import DownstreamError

if TYPE_CHECKING:
    from orchestrator.conversation.runtime import Runtime
    from orchestrator.store.record import HistoryEntry

_GATHER_SECONDS_PER_CHARACTER = 0.055 / 16
_MOST_GATHER_SECONDS = 0.12
"""What follows the first clause is needed only while that is spoken (about 55 ms a character), so it may come late by a
sixteenth of it, at most 120 ms; at 25 or more tokens a second that saves most of the wake-ups a token would cost."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, in whose conversation."""

    session_id: str
    turn_number: int
    text: str
    history: tuple[HistoryEntry, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """One way to an answer. `stage` is what counts as degraded when it gives none."""

    stage: str
    open: Callable[[], Stream[str]]


class AnswerStream:
    """The answer's text, piece by piece, from the first source that gives any.

    `failure` is the code and the message of the failure that came last.

    Sources in order: the LLM, RAG's own answer, the fallback LLM, the fallback sentence; without an LLM it is RAG's
    stream first. `degraded` names the stages that failed, `truncated` says that a stream broke off in the middle.
    """

    def __init__(self, runtime: Runtime, question: Question, ledger: Ledger) -> None:
        self._runtime = runtime
        self._question = question
        self._ledger = ledger
        self.degraded: list[str] = []
        self.truncated = False
        self._pace = Pace()
        self.failure = ("answer_failed", "no source had an answer")

    def relax(self, first_clause: str) -> None:
        """The first clause is there: the rest is needed only while it is spoken, so it may come in bigger pieces."""
        seconds = len(first_clause) * _GATHER_SECONDS_PER_CHARACTER
        self._pace.gather_seconds = min(seconds, _MOST_GATHER_SECONDS)

    async def pieces(self, intent: Intent, retrieval: Retrieval | None) -> AsyncGenerator[str, None]:
        """Text deltas; none at all if no source has anything to say."""
        clock, ledger = self._runtime.clock, self._ledger
        first_token_stage = "rag" if ledger.rag_answers else "llm_first_token"
        began = clock()
        ledger.begin(first_token_stage, began)
        ledger.begin("first_clause", began)
        for source in self._sources(intent, retrieval):
            told = False
            try:
                async with aclosing(source.open()) as deltas:
                    async for delta in deltas:
                        if not told and not delta.isspace():
                            told = True
                            ledger.end(first_token_stage, clock())
                        yield delta
            except DownstreamError as error:
                self.failure = (f"{error.service}_failed", str(error))
                if told:
                    self.truncated = True
                    return
            if told:
                return
            ledger.end(first_token_stage, clock())
            if source.stage not in self.degraded:
                self.degraded.append(source.stage)

    def _sources(self, intent: Intent, retrieval: Retrieval | None) -> Iterable[_Source]:
        services, settings = self._runtime.services, self._runtime.settings
        question = self._question
        messages = build_messages(settings.llm_system_prompt, question.history, intent, retrieval, question.text)
        if services.llm is not None:
            llm = services.llm
            yield _Source("llm", lambda: llm.stream(messages, self._call("llm", settings.llm_timeout_ms)))
            if retrieval is not None and retrieval.answer:
                yield _Source("rag", lambda: _once(retrieval.answer))
        elif services.rag is not None:
            rag = services.rag
            timeout = settings.rag_timeout_ms + settings.llm_timeout_ms
            ask = rag.stream_incremental if settings.rag_incremental else rag.stream_query
            yield _Source("rag", lambda: ask(question.text, self._call("rag", timeout)))
        if services.fallback_llm is not None:
            fallback = services.fallback_llm
            yield _Source(
                "fallback_llm", lambda: fallback.stream(messages, self._call("llm-fallback", settings.llm_timeout_ms))
            )
        if settings.fallback_text:
            yield _Source("fallback", lambda: _once(settings.fallback_text))

    def _call(self, stage: str, timeout_ms: float) -> Call:
        question = self._question
        left = self._ledger.left_ms(timeout_ms, self._runtime.clock())
        stall_ms = self._runtime.settings.stall_timeout_ms
        return Call(question.session_id, question.turn_number, stage, left, stall_ms, self._pace)


async def _once(text: str) -> AsyncGenerator[str, None]:
    yield text
