"""The timer wheel on a clock of its own."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.server.wheel import NOT_SCHEDULED, RESOLUTION_S, TimerWheel


class Item:
    def __init__(self, on_wake: Callable[[float], None] | None = None) -> None:
        self.wheel_tick = NOT_SCHEDULED
        self.woken: list[float] = []
        self.on_wake = on_wake

    def on_timer(self, now: float) -> None:
        self.woken.append(now)
        if self.on_wake is not None:
            self.on_wake(now)


def run(wheel: TimerWheel, start: float, seconds: float) -> None:
    for step in range(1, int(seconds / 0.05) + 1):
        wheel.advance(start + step * 0.05)


@given(st.floats(0, 1e6), st.floats(0.01, 30))
def test_an_item_is_woken_once_and_neither_early_nor_late(start, delay):
    wheel, item = TimerWheel(start), Item()
    wheel.schedule(item, start + delay)
    run(wheel, start, delay + 1.0)
    assert len(item.woken) == 1
    assert -1e-6 <= item.woken[0] - (start + delay) <= RESOLUTION_S * 2 + 0.05
    assert item.wheel_tick == NOT_SCHEDULED
    assert len(wheel) == 0


def test_a_moved_item_is_woken_at_its_last_wish_only():
    wheel, item = TimerWheel(0.0), Item()
    wheel.schedule(item, 1.0)
    wheel.schedule(item, 5.0)
    wheel.schedule(item, 2.0)
    run(wheel, 0.0, 10.0)
    assert len(item.woken) == 1
    assert 2.0 <= item.woken[0] < 2.5


def test_a_cancelled_item_sleeps_on():
    wheel, item = TimerWheel(0.0), Item()
    wheel.schedule(item, 1.0)
    wheel.cancel(item)
    wheel.cancel(item)
    run(wheel, 0.0, 3.0)
    assert item.woken == []


def test_an_item_may_schedule_itself_again():
    wheel = TimerWheel(0.0)
    item = Item(lambda now: wheel.schedule(item, now + 1.0) if len(item.woken) < 3 else None)
    wheel.schedule(item, 1.0)
    run(wheel, 0.0, 10.0)
    assert len(item.woken) == 3


def test_one_failing_item_does_not_keep_the_others_asleep():
    def fail(now: float) -> None:
        raise RuntimeError("told to fail")

    wheel = TimerWheel(0.0)
    items = [Item(fail), Item(), Item(fail), Item()]
    for item in items:
        wheel.schedule(item, 1.0)
    run(wheel, 0.0, 2.0)
    assert [len(item.woken) for item in items] == [1, 1, 1, 1]


def test_a_long_pause_of_the_loop_wakes_everything_that_came_due():
    wheel, early, late = TimerWheel(0.0), Item(), Item()
    wheel.schedule(early, 1.0)
    wheel.schedule(late, 500.0)
    wheel.advance(400.0)
    assert (len(early.woken), len(late.woken)) == (1, 0)
    wheel.advance(600.0)
    assert len(late.woken) == 1
