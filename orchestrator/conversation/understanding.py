"""Intent beside RAG for one text: started together, each with its own deadline, neither able to fail the turn."""

from __future__ import annotations

import asyncio

from orchestrator.conversation.runtime import Runtime
from orchestrator.downstream.types import UNKNOWN_INTENT, Call, Intent, IntentService, RagService, Retrieval
from orchestrator.errors import DownstreamError


class Understanding:
    """The two calls in flight, and their results as they come. Whoever holds it owns its tasks: await or `cancel` it.

    `finished_at` has the loop time at which each stage was over; `failures` the stages that gave no answer.
    """

    __slots__ = ("_runtime", "_tasks", "failures", "finished_at", "intent", "retrieval", "started", "text")

    def __init__(self, runtime: Runtime, session_id: str, turn_number: int, text: str, attempt: str = "") -> None:
        """`attempt` tells calls of one turn for different texts apart in their idempotency keys."""
        self._runtime = runtime
        self.text = text
        self.started = runtime.clock()
        self.finished_at: dict[str, float] = {}
        self.failures: list[str] = []
        self.intent: Intent = UNKNOWN_INTENT
        self.retrieval: Retrieval | None = None
        self._tasks: list[asyncio.Task[None]] = []
        settings, services = runtime.settings, runtime.services
        if services.intent is not None:
            call = Call(session_id, turn_number, f"intent{attempt}", settings.intent_timeout_ms)
            self._tasks.append(runtime.loop.create_task(self._classify(services.intent, call)))
        if services.rag is not None and services.llm is not None:
            call = Call(session_id, turn_number, f"rag{attempt}", settings.rag_timeout_ms)
            self._tasks.append(runtime.loop.create_task(self._query(services.rag, call)))

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
