"""Intent beside RAG for one text: started together, each with its own deadline, neither able to fail the turn."""

from __future__ import annotations

import asyncio
import contextlib

from orchestrator.conversation.runtime import Runtime
from orchestrator.downstream.types import UNKNOWN_INTENT, Call, Intent, IntentService, RagService, Retrieval
from orchestrator.errors import DownstreamError


class Understanding:
    """The two calls in flight, and their results as they come. Whoever holds it owns its tasks: await or `cancel` it.

    With `partial`, where RAG_INCREMENTAL is set, RAG is only told to retrieve early; `complete` asks it in earnest.
    `finished_at` has the loop time at which each stage was over; `failures` the stages that gave no answer.
    """

    __slots__ = (
        "_attempt", "_early", "_runtime", "_session_id", "_tasks", "_turn_number", "failures", "finished_at", "intent",
        "retrieval", "started", "text",
    )  # fmt: skip

    def __init__(
        self,
        runtime: Runtime,
        session_id: str,
        turn_number: int,
        text: str,
        attempt: str = "",
        partial: bool = False,
    ) -> None:
        """`attempt` tells calls of one turn for different texts apart in their idempotency keys."""
        self._runtime = runtime
        self.text = text
        self.started = runtime.clock()
        self.finished_at: dict[str, float] = {}
        self.failures: list[str] = []
        self.intent: Intent = UNKNOWN_INTENT
        self.retrieval: Retrieval | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._session_id = session_id
        self._turn_number = turn_number
        self._attempt = attempt
        self._early = partial and runtime.settings.rag_incremental
        services = runtime.services
        # RAG is the slower of the two nearly everywhere, so its request is the one that is written first.
        if services.rag is not None and self._early:
            call = self._call("rag", runtime.settings.rag_timeout_ms)
            self._tasks.append(runtime.loop.create_task(self._retrieve_early(services.rag, call)))
        else:
            self._ask_rag()
        if services.intent is not None:
            call = self._call("intent", runtime.settings.intent_timeout_ms)
            self._tasks.append(runtime.loop.create_task(self._classify(services.intent, call)))

    def complete(self) -> None:
        """The text is the turn's: ask RAG in earnest if it was only told to retrieve early."""
        if self._early:
            self._early = False
            self._attempt = ""
            self.started = self._runtime.clock()
            self._ask_rag()

    @property
    def done(self) -> bool:
        return all(task.done() for task in self._tasks)

    @property
    def failed(self) -> bool:
        """Whether asking again may give more than waiting for this."""
        return bool(self.failures) or any(task.cancelled() for task in self._tasks)

    def give_tasks(self) -> list[asyncio.Task[None]]:
        """The tasks, which are the caller's to wait for from now on."""
        tasks, self._tasks = self._tasks, []
        return tasks

    def cancel(self) -> None:
        """Abort what is in flight."""
        for task in self._tasks:
            task.cancel()

    async def settled(self) -> None:
        """Returns when both calls are over; cancelling the waiter cancels them."""
        pending = [task for task in self._tasks if not task.done()]
        if pending:
            await asyncio.gather(*pending)

    def _ask_rag(self) -> None:
        """Unless RAG's stream is itself the answer, which the turn asks for."""
        services = self._runtime.services
        if services.rag is not None and services.llm is not None:
            call = self._call("rag", self._runtime.settings.rag_timeout_ms)
            self._tasks.append(self._runtime.loop.create_task(self._query(services.rag, call)))

    def _call(self, stage: str, timeout_ms: float) -> Call:
        return Call(self._session_id, self._turn_number, f"{stage}{self._attempt}", timeout_ms)

    async def _retrieve_early(self, service: RagService, call: Call) -> None:
        with contextlib.suppress(DownstreamError):
            await service.query_incremental(self.text, call)

    async def _classify(self, service: IntentService, call: Call) -> None:
        try:
            self.intent = await service.classify(self.text, call)
        except DownstreamError:
            self.failures.append("intent")
        self.finished_at["intent"] = self._runtime.clock()

    async def _query(self, service: RagService, call: Call) -> None:
        try:
            self.retrieval = await service.query(self.text, call)
        except DownstreamError:
            self.failures.append("rag")
        self.finished_at["rag"] = self._runtime.clock()
