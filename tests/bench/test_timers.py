from __future__ import annotations

import asyncio
import random
from time import monotonic

import pytest
import uvloop

from bench.timers import KernelTimers, LoopTimers, clock_for, timers_for


async def _fires_in_order() -> None:
    loop = asyncio.get_running_loop()
    timers = timers_for(loop)
    assert isinstance(timers, KernelTimers)
    start = clock_for(loop)()
    rng = random.Random(1)
    wanted = [start + rng.uniform(0, 0.05) for _ in range(200)]
    fired: list[tuple[float, float]] = []
    done = loop.create_future()
    for when in wanted:
        timers.at(when, lambda when=when: fired.append((when, monotonic())))
    cancelled = timers.at(start + 0.01, fired.clear)
    cancelled.cancel()
    cancelled.cancel()
    timers.at(start + 0.06, done.set_result, None)
    await done
    timers.close()
    assert [when for when, _ in fired] == sorted(wanted)
    assert all(at >= when - 0.0001 for when, at in fired)


def test_kernel_timers_fire_in_order_and_never_early() -> None:
    uvloop.run(_fires_in_order())


async def _nests() -> list[str]:
    timers = timers_for(asyncio.get_running_loop())
    order: list[str] = []
    done = asyncio.get_running_loop().create_future()

    def outer() -> None:
        order.append("outer")
        timers.at(monotonic() - 1, order.append, "already due")
        timers.at(monotonic() + 0.002, done.set_result, None)

    timers.at(monotonic() + 0.002, outer)
    await done
    timers.close()
    return order


def test_timer_set_from_a_timer_fires() -> None:
    assert uvloop.run(_nests()) == ["outer", "already due"]


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_other_loops_use_their_own_time(looptime: object) -> None:
    loop = asyncio.get_running_loop()
    timers = timers_for(loop)
    assert isinstance(timers, LoopTimers)
    done = loop.create_future()
    timers.at(clock_for(loop)() + 3600.0, done.set_result, None)
    await done
    assert clock_for(loop)() >= 3600.0
