"""The garbage collector's schedule: young generations often, everything only when nobody would notice."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from orchestrator.server.collector import FULL_SECONDS, YOUNG_SECONDS, Collector


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
    clock[0] += 1.5 * YOUNG_SECONDS
    collector.tick(idle=False)
    assert nodes() == 0
    assert len(pauses) == 1


def test_what_survives_is_not_looked_at_again_until_the_worker_is_idle(
    collector: Collector, clock: list[float]
) -> None:
    held = Node()
    held.other = held
    clock[0] += 1.5 * YOUNG_SECONDS
    collector.tick(idle=False)
    frozen = gc.get_freeze_count()
    assert frozen > 0
    del held
    for _ in range(20):
        clock[0] += 1.5 * YOUNG_SECONDS
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
