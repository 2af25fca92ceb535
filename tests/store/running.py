"""How the store's tests run: on uvloop, with a bound, leaving no task behind."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

import uvloop

P = ParamSpec("P")


def live(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        uvloop.run(asyncio.wait_for(_leaving_nothing(test(*args, **kwargs)), 30))

    return run


async def _leaving_nothing(test: Coroutine[Any, Any, None]) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    before = asyncio.all_tasks()
    await test
    for _ in range(5):
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - before
    assert not left, f"tasks left behind: {left}"
    assert not complaints, f"the loop complained: {complaints}"


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Returns as soon as the condition holds; fails the test if that takes too long."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
