"""Requests whose answer may be asked for twice: hedges against slow answers, retries after failed ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import TracebackType
from typing import Generic, Self, TypeVar

from orchestrator.core.resilience import ExtraBudget, RollingQuantile, hedge_after, may_retry
from orchestrator.downstream.guard import ServiceGuard
from orchestrator.downstream.http_pool import StatusError
from orchestrator.downstream.types import Call
from orchestrator.errors import DownstreamError, Failure

T = TypeVar("T")
Attempt = Callable[[Call], Awaitable[T]]


class Hedger:
    """Calls to one service whose answer may be asked for twice.

    When no answer is there after the service's own p95, a second request races the first one, within 5 % of extra
    requests; a request that fails at once is sent again while there is time. `hedging = False` sheds the former.
    """

    def __init__(self, guard: ServiceGuard) -> None:
        self.guard = guard
        self.hedging = True
        self._latency = RollingQuantile(0.95)
        self._budget = ExtraBudget()
        self._tasks: set[asyncio.Task[object]] = set()

    async def call(self, attempt: Attempt[T], call: Call) -> T:
        """The answer of `attempt(call)` or of an extra one, whichever is first. Raises DownstreamError."""
        guard, clock = self.guard, self.guard.clock
        permit = guard.admit()
        self._budget.earn()
        started = clock()
        delay = hedge_after(self._latency.value, call.timeout_ms / 1000) if self.hedging else None
        race = None if delay is None else _Race(self, attempt, call, started, delay)
        try:
            try:
                result = await (attempt(call) if race is None else race.run())
            except DownstreamError as error:
                if race is not None and race.second is not None:
                    raise
                result = await self._repeat(attempt, call, started, error)
        except DownstreamError as error:
            seconds = clock() - started
            guard.failed(permit, error, seconds)
            guard.observe(error.failure.value, seconds)
            raise
        except BaseException:
            guard.abandoned(permit)
            guard.observe("cancelled", clock() - started)
            raise
        seconds = clock() - started
        self._latency.add(seconds)
        guard.answered(permit)
        guard.observe("ok", seconds)
        return result

    async def close(self) -> None:
        """End second requests that are still under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def second_request(self, attempt: Attempt[T], call: Call, started: float) -> asyncio.Task[T] | None:
        """A second request for the call that began at `started`, if the budget has one."""
        if not self.hedging or not self._budget.spend():
            return None
        task = asyncio.ensure_future(_as_coroutine(attempt, self._reduced(call, started)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _repeat(self, attempt: Attempt[T], call: Call, started: float, error: DownstreamError) -> T:
        """The answer of one more request, after `error`. Raises `error` where that is not worth it."""
        if not _worth_repeating(error) or not self._in_time(call, started) or not self._budget.spend():
            raise error
        try:
            result = await attempt(self._reduced(call, started))
        except DownstreamError:
            self.guard.observe_extra("retry", "failed")
            raise
        self.guard.observe_extra("retry", "won")
        return result

    def _in_time(self, call: Call, started: float) -> bool:
        return may_retry(self._latency.value, started + call.timeout_ms / 1000 - self.guard.clock())

    def _reduced(self, call: Call, started: float) -> Call:
        return replace(call, timeout_ms=call.timeout_ms - (self.guard.clock() - started) * 1000)


class _Race(Generic[T]):
    """A request awaited by its caller's task, raced by a second one from `delay` seconds on.

    If the second one answers first, the caller's wait is cancelled and taken back as if nothing had happened; a
    cancellation from elsewhere passes through. No task exists until the delay is over.
    """

    __slots__ = ("_attempt", "_call", "_cancelling", "_first_failed", "_hedger", "_over", "_owner", "_started",
                 "_timer", "_won", "second")  # fmt: skip

    def __init__(self, hedger: Hedger, attempt: Attempt[T], call: Call, started: float, delay: float) -> None:
        loop = hedger.guard.loop
        owner = asyncio.current_task(loop)
        assert owner is not None
        self._hedger = hedger
        self._attempt = attempt
        self._call = call
        self._started = started
        self._owner = owner
        self._cancelling = owner.cancelling()
        self._first_failed = self._won = self._over = False
        self.second: asyncio.Task[T] | None = None
        self._timer = loop.call_later(delay, self._start)

    async def run(self) -> T:
        """The first usable answer. Raises DownstreamError if there is none."""
        with self:
            try:
                return await self._attempt(self._call)
            except DownstreamError:
                if self.second is None:
                    raise
                self._first_failed = True
                return await self.second
        assert self.second is not None
        return self.second.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._over = True
        self._timer.cancel()
        second = self.second
        if second is None:
            return False
        self._report(second, used=self._won or (self._first_failed and kind is None))
        second.cancel()
        if not self._won:
            return False
        ours = self._owner.uncancel() <= self._cancelling
        return ours and kind is not None and issubclass(kind, asyncio.CancelledError)

    def _report(self, second: asyncio.Task[T], *, used: bool) -> None:
        failed = second.done() and _failed(second)
        self._hedger.guard.observe_extra("hedge", "won" if used else "failed" if failed else "lost")

    def _start(self) -> None:
        self.second = self._hedger.second_request(self._attempt, self._call, self._started)
        if self.second is not None:
            self.second.add_done_callback(self._second_done)

    def _second_done(self, task: asyncio.Task[T]) -> None:
        if _failed(task) or self._over or self._first_failed:
            return
        self._won = True
        self._owner.cancel()


async def _as_coroutine(attempt: Attempt[T], call: Call) -> T:
    return await attempt(call)


def _failed(task: asyncio.Task[T]) -> bool:
    return task.cancelled() or task.exception() is not None


def _worth_repeating(error: DownstreamError) -> bool:
    """Failures that another connection or another instance behind the same address may not have."""
    if isinstance(error, StatusError):
        return error.status in (502, 503, 504)
    return error.failure in (Failure.UNREACHABLE, Failure.CLOSED)
