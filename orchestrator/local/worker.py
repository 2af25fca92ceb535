"""One thread for a model's calls, most urgent first."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(order=True, slots=True)
class _Job:
    priority: int
    number: int
    call: Callable[[], Any] = field(compare=False)
    result: asyncio.Future[Any] = field(compare=False)


class InferenceWorker:
    """Runs blocking model calls off the event loop, one at a time.

    Waiting calls are taken by priority (lower first), then in order of arrival. A caller that is cancelled while
    its call waits takes it out of the queue; one that is cancelled while it runs leaves it to finish unseen. All
    calls come from one event loop.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._jobs: list[_Job] = []
        self._numbers = count()
        self._busy = False

    async def run(self, call: Callable[[], T], priority: int = 0) -> T:
        """The result of `call`; what it raises is raised here."""
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._jobs, _Job(priority, next(self._numbers), call, result))
        self._start_next()
        return await result

    def close(self) -> None:
        """Wait for the call that runs (at most one inference), drop the rest."""
        for job in self._jobs:
            job.result.cancel()
        self._jobs.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _start_next(self) -> None:
        while self._jobs and not self._busy:
            job = heapq.heappop(self._jobs)
            if job.result.done():
                continue
            self._busy = True
            self._executor.submit(job.call).add_done_callback(partial(self._report, job))

    def _report(self, job: _Job, done: Future[Any]) -> None:
        job.result.get_loop().call_soon_threadsafe(self._finished, job, done)

    def _finished(self, job: _Job, done: Future[Any]) -> None:
        self._busy = False
        if not job.result.done():
            error = done.exception()
            if error is not None:
                job.result.set_exception(error)
            else:
                job.result.set_result(done.result())
        self._start_next()
