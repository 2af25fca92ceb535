"""The slot table: which slots own sessions through starts, deaths, refills and scale-downs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from orchestrator.server.slots import (
    MAX_FAILED_STARTS,
    REFILL_NS,
    SLOTS,
    STALE_NS,
    SlotState,
    SlotTable,
)

SECOND = 1_000_000_000


@pytest.fixture
def table() -> Iterator[SlotTable]:
    table = SlotTable(now_ns=0)
    yield table
    table.close()


def run_workers(table: SlotTable, count: int, now_ns: int = 0) -> None:
    table.reserve(count, now_ns)
    for slot in range(count):
        assert table.take(now_ns) == slot
        table.start(slot, 100 + slot, now_ns)
        table.go_live(slot, now_ns)


def test_reserved_slots_are_on_the_ring_before_their_workers_run(table):
    table.reserve(3, now_ns=0)
    assert table.ring(now_ns=0) == [0, 1, 2]
    assert table.live(now_ns=0) == []
    assert table.take(now_ns=0) == 0


def test_a_reserved_slot_stays_while_the_arbiter_is_still_starting_others(table):
    table.reserve(3, now_ns=0)
    for step in range(3):
        now = step * 2 * SECOND
        assert table.take(now) == step
        table.go_live(step, now)
        table.beat(0, now, redis_connected=True)
        table.beat(min(step, 1), now, redis_connected=True)
    assert table.ring(4 * SECOND) == [0, 1, 2]


def test_a_dead_worker_keeps_its_slot_and_the_next_worker_takes_it(table):
    run_workers(table, 4)
    table.set_attached(2, 17)
    assert table.release(2, now_ns=SECOND) is False
    assert table.view(2).state is SlotState.RESTARTING
    assert table.total_attached() == 0
    assert table.ring(SECOND) == [0, 1, 2, 3]
    assert table.take(SECOND) == 2
    assert table.restarts() == 1
    table.go_live(2, SECOND)
    assert table.live(SECOND) == [0, 1, 2, 3]


def test_a_slot_that_nobody_refills_loses_its_sessions(table):
    run_workers(table, 2)
    table.release(1, now_ns=0)
    table.beat(0, REFILL_NS, redis_connected=True)
    assert table.ring(REFILL_NS) == [0]


def test_a_worker_that_went_on_purpose_frees_its_slot(table):
    run_workers(table, 3)
    table.go_draining(0, now_ns=0)
    assert table.ring(0) == [1, 2]
    assert table.release(0, now_ns=0) is True
    assert table.view(0).state is SlotState.FREE
    assert table.ring(0) == [1, 2]
    assert table.take(0) == 0
    assert table.restarts() == 0


def test_a_hanging_worker_gets_no_new_sessions_until_it_runs_again(table):
    run_workers(table, 2)
    table.beat(0, STALE_NS, redis_connected=True)
    assert table.ring(STALE_NS) == [0]
    table.beat(1, STALE_NS, redis_connected=True)
    assert table.ring(STALE_NS) == [0, 1]


def test_a_slot_whose_workers_cannot_start_owns_nothing_until_one_does(table):
    run_workers(table, 2)
    table.release(1, now_ns=0)
    for _ in range(MAX_FAILED_STARTS):
        assert table.take(0) == 1
        table.release(1, 0)
    assert table.take(0) == 1
    assert table.ring(0) == [0]
    table.go_live(1, 0)
    assert table.ring(0) == [0, 1]


def test_the_pool_drains_when_nobody_takes_sessions(table):
    run_workers(table, 2)
    table.go_draining(0, 0)
    assert table.draining(0) is False
    table.go_draining(1, 0)
    assert table.draining(0) is True
    assert table.ring(0) == []


def test_sums_over_all_workers(table):
    run_workers(table, 3)
    for slot, attached in enumerate((5, 7, 11)):
        table.set_attached(slot, attached)
        table.beat(slot, 0, redis_connected=slot != 1)
    assert table.total_attached() == 23
    assert table.redis_connected(0) is False
    table.beat(1, 0, redis_connected=True)
    assert table.redis_connected(0) is True


def test_readiness_is_announced_once_and_not_before_every_worker_runs(table):
    table.reserve(2, 0)
    table.take(0)
    table.go_live(0, 0)
    assert table.claim_announcement() is False
    table.take(0)
    table.go_live(1, 0)
    assert table.claim_announcement() is True
    assert table.claim_announcement() is False


def test_no_slot_is_left_in_a_full_table(table):
    assert [table.take(0) for _ in range(SLOTS)] == list(range(SLOTS))
    assert table.take(0) is None


def test_what_one_process_writes_another_reads(table):
    child = os.fork()
    if child == 0:
        table.start(5, os.getpid(), 9)
        table.set_attached(5, 42)
        os._exit(0)
    os.waitpid(child, 0)
    assert (table.view(5).pid, table.view(5).attached, table.view(5).heartbeat_ns) == (child, 42, 9)


def test_a_worker_keeps_only_its_own_receiving_end(table):
    table.keep_only(3)
    table.sender(3).send(b"x")
    assert table.receiver(3).recv(10) == b"x"
    with pytest.raises(ValueError, match="slot 4"):
        table.receiver(4)
