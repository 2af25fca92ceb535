"""How asynchronous tests run: on virtual time, or on uvloop with real sockets. Neither may leave a task behind."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

import looptime
import uvloop

P = ParamSpec("P")
Test = Callable[P, Coroutine[Any, Any, None]]


def virtual(test: Test[P]) -> Callable[P, None]:
    """Run a test on a loop whose clock jumps to the next timer. It may leave no task behind."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        loop = looptime.new_event_loop(start=1000.0)
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(_leaving_nothing(test(*args, **kwargs)))
        finally:
            loop.close()
            asyncio.set_event_loop(None)

    return run


def live(test: Test[P]) -> Callable[P, None]:
    """Run a test on uvloop with real sockets. It may leave no task behind; a hang ends it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        uvloop.run(asyncio.wait_for(_leaving_nothing(test(*args, **kwargs)), 30))

    return run


async def _leaving_nothing(test: Coroutine[Any, Any, None]) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    before = asyncio.all_tasks()
    await test
    left = await settled(before)
    assert not left, f"tasks left behind: {left}"
    gc.collect(1)
    assert not complaints, f"the loop complained: {complaints}"


async def settled(before: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """The tasks begun since `before` that do not end by themselves within a few steps."""
    for _ in range(200):
        left = asyncio.all_tasks() - before
        if not left:
            return set()
        await asyncio.sleep(0.005)
    return left


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Returns as soon as the condition holds; fails the test if that takes too long."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
