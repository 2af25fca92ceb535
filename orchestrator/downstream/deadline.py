"""The time limit of one downstream call, over as many awaits as the call needs."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from orchestrator.errors import DownstreamError, Failure

_TOLERANCE_SECONDS = 0.0005
"""uvloop's clock and timers count whole milliseconds; a timer that ran this little early counts as due."""


class Deadline:
    """Turns waiting too long into DownstreamError, with one timer for a whole stream.

    `with deadline:` stands around each await on the service. Until the first `progress()` the limit is `timeout`
    seconds after construction (failure `timeout`); from then on it is `stall` seconds of waiting (failure `stalled`).
    Time that passes outside the `with` is the consumer's and never expires anything. `progress()` only sets a flag; the
    timer is moved lazily, when it runs. A cancellation that came from elsewhere is passed on as it is. `close()` gives
    the timer back and must be called once.
    """

    __slots__ = ("_cancelling", "_expired", "_failure", "_fresh", "_handle", "_limit", "_loop", "_service", "_stall",
                 "_task", "_timer_at")  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, service: str, timeout: float, stall: float = 0.0) -> None:
        self._loop = loop
        self._service = service
        self._stall = stall
        self._limit = loop.time() + timeout
        self._failure = Failure.TIMEOUT
        self._handle: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._fresh = False
        self._expired = False

    @property
    def remaining(self) -> float:
        """Seconds left, possibly negative, if the wait began now."""
        if self._fresh:
            return self._stall
        return self._limit - self._loop.time()

    def progress(self) -> None:
        """The service delivered: from here the stall limit holds, counted from the next wait."""
        self._fresh = True

    def __enter__(self) -> Self:
        task = asyncio.current_task(self._loop)
        if task is None or self._task is not None:
            raise RuntimeError("a deadline is entered by one task at a time")
        if self._fresh:
            self._fresh = False
            self._failure = Failure.STALLED
            self._limit = self._loop.time() + self._stall
        if self._handle is None:
            if self._limit <= self._loop.time():
                raise DownstreamError(self._service, self._failure, "no time left")
            self._arm()
        elif self._limit < self._timer_at:
            self._handle.cancel()
            self._arm()
        self._task = task
        self._cancelling = task.cancelling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if not self._expired:
            return
        assert task is not None
        self._expired = False
        ours = task.uncancel() <= self._cancelling
        if kind is not None and ours and (issubclass(kind, asyncio.CancelledError) or issubclass(kind, Exception)):
            raise DownstreamError(self._service, self._failure) from error

    def close(self) -> None:
        """Give the timer back."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self) -> None:
        self._timer_at = self._limit
        self._handle = self._loop.call_at(self._limit, self._due)

    def _due(self) -> None:
        self._handle = None
        task = self._task
        if task is None:
            return
        if self._limit > self._loop.time() + _TOLERANCE_SECONDS:
            self._arm()
            return
        self._expired = True
        task.cancel()
