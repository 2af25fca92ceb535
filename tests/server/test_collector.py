"""The garbage collector's schedule: young generations often, everything only when nobody would notice."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from orchestrator.server.collector import FULL_SECONDS, GOOD_PAUSE_SECONDS, LONGEST_YOUNG_SECONDS, Collector


class Node:
    other: Node | None = None


def make_cycle() -> None:
    first, second = Node(), Node()
    first.other, second.other = second, first


def nodes() -> int:
    return sum(isinstance(thing, Node) for thing in gc.get_objects())


@pytest.fixture
def clock() -> list[float]:
    return [100.0]


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def collector(clock: list[float], pauses: list[float]) -> Iterator[Collector]:
    collector = Collector(pauses.append, lambda: clock[0])
    collector.start()
    yield collector
    collector.stop()
    assert gc.isenabled()


def test_young_garbage_goes_at_the_next_beat(collector: Collector, clock: list[float], pauses: list[float]) -> None:
    make_cycle()
    collector.tick(idle=False)
    assert nodes() == 2
    clock[0] += 1.5 * LONGEST_YOUNG_SECONDS
    collector.tick(idle=False)
    assert nodes() == 0
    assert len(pauses) == 1


def test_what_survives_is_not_looked_at_again_until_the_worker_is_idle(
    collector: Collector, clock: list[float]
) -> None:
    held = Node()
    held.other = held
    clock[0] += 1.5 * LONGEST_YOUNG_SECONDS
    collector.tick(idle=False)
    frozen = gc.get_freeze_count()
    assert frozen > 0
    del held
    for _ in range(20):
        clock[0] += 1.5 * LONGEST_YOUNG_SECONDS
        collector.tick(idle=False)
    gc.unfreeze()
    assert nodes() == 1
    gc.freeze()
    clock[0] += FULL_SECONDS
    collector.tick(idle=False)
    collector.tick(idle=True)
    gc.unfreeze()
    assert nodes() == 0


def test_the_automatic_collector_is_off_meanwhile(collector: Collector) -> None:
    assert not gc.isenabled()


def test_long_pauses_make_the_next_ones_come_sooner(
    collector: Collector, clock: list[float], pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a made-up stop watch: a collection takes 2 % of the time since the last one, as under a heavy load."""
    watch = [0.0]
    last = [clock[0]]

    def measured(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            watch[0] += 0.02 * (clock[0] - last[0])
            last[0] = clock[0]

    monkeypatch.setattr("orchestrator.server.collector.time.perf_counter", lambda: watch[0])
    gc.callbacks.append(measured)
    try:
        for _ in range(400):
            clock[0] += 0.01
            collector.tick(idle=False)
    finally:
        gc.callbacks.remove(measured)
    assert pauses[0] == pytest.approx(0.02 * LONGEST_YOUNG_SECONDS, rel=0.1)
    assert pauses[-1] == pytest.approx(GOOD_PAUSE_SECONDS, rel=0.2)
    assert len(pauses) > 20
