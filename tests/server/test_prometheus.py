"""Metrics across processes: what several workers count, and what is left when one dies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.telemetry import prometheus
from orchestrator.telemetry.prometheus import PrometheusObserver, forget_gauges, render, use_directory

BREAKDOWN = {
    "stt_ms": 50.0, "intent_ms": 50.0, "rag_ms": 80.0, "intent_rag_ms": 80.0, "llm_first_token_ms": 100.0,
    "first_clause_ms": 115.0, "tts_first_chunk_ms": 75.0, "overhead_ms": 0.9, "total_ms": 445.0, "budget_ms": 445.0,
    "within_budget": True,
}  # fmt: skip
NAMES = {
    "orchestrator_stage_seconds", "orchestrator_turn_e2e_seconds", "orchestrator_turn_overhead_seconds",
    "orchestrator_turns", "orchestrator_budget_exceeded", "orchestrator_barge_in_stop_seconds",
    "orchestrator_speculation", "orchestrator_sessions", "orchestrator_sessions_rejected", "orchestrator_handoffs",
    "orchestrator_downstream_requests", "orchestrator_downstream_seconds", "orchestrator_breaker_state",
    "orchestrator_extra_requests",
    "orchestrator_store_writes", "orchestrator_store_dirty", "orchestrator_redis_connected",
    "orchestrator_loop_lag_seconds", "orchestrator_gc_pause_seconds", "orchestrator_worker_restarts",
}  # fmt: skip


def in_worker(directory: Path, slot: int, work: Callable[[PrometheusObserver], None]) -> None:
    """Run `work` in a process of its own, as the worker of `slot`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            use_directory(str(directory), slot)
            work(PrometheusObserver())
            code = 0
        finally:
            # Never back into the test runner, whatever happened.
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def everything(observer: PrometheusObserver) -> None:
    observer.turn_ended("completed", BREAKDOWN)
    observer.turn_ended("completed", {**BREAKDOWN, "within_budget": False, "budget_broken_by": "first_clause"})
    observer.turn_ended("failed", {"intent_ms": 100.0})
    observer.barge_in_stopped(0.0004)
    observer.speculation("adopted")
    observer.session_state("IDLE", 1)
    observer.session_state("IDLE", 1)
    observer.session_state("nonsense", 1)
    observer.session_rejected("full")
    observer.handed_off("local")
    observer.downstream("intent", "ok", 0.05)
    observer.extra_request("rag", "hedge", "won")
    observer.breaker_state("rag", "half_open")
    observer.store_written("ok", 3)
    observer.store_state(True, 2)
    observer.loop_lag(0.001)
    observer.gc_paused(0.001)


def samples(directory: Path, restarts: int = 0) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = render(str(directory), restarts).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_metric_of_the_protocol_is_there(tmp_path: Path):
    in_worker(tmp_path, 0, everything)
    text = render(str(tmp_path), 0).decode()
    assert {family.name for family in text_string_to_metric_families(text)} == NAMES


def test_workers_are_summed_and_the_worst_counts(tmp_path: Path):
    def other(observer: PrometheusObserver) -> None:
        everything(observer)
        observer.breaker_state("rag", "open")
        observer.store_state(False, 5)

    in_worker(tmp_path, 0, everything)
    in_worker(tmp_path, 1, other)
    seen = samples(tmp_path, restarts=7)
    assert seen["orchestrator_turns_total", (("outcome", "completed"),)] == 4
    assert seen["orchestrator_budget_exceeded_total", (("stage", "first_clause"),)] == 2
    assert seen["orchestrator_sessions", (("state", "IDLE"),)] == 4
    assert seen["orchestrator_breaker_state", (("service", "rag"),)] == 2
    assert seen["orchestrator_extra_requests_total", (("kind", "hedge"), ("result", "won"), ("service", "rag"))] == 2
    assert seen["orchestrator_redis_connected", ()] == 0
    assert seen["orchestrator_store_dirty", ()] == 7
    assert seen["orchestrator_store_writes_total", (("result", "ok"),)] == 6
    assert seen["orchestrator_worker_restarts_total", ()] == 7
    assert seen["orchestrator_turn_e2e_seconds_count", ()] == 4


@pytest.mark.parametrize(("stage", "edge"), [("stt", "0.05"), ("rag", "0.08"), ("llm_first_token", "0.1")])
def test_a_stage_at_its_target_is_within_the_bucket_of_that_edge(tmp_path: Path, stage, edge):
    in_worker(tmp_path, 0, lambda observer: observer.turn_ended("completed", BREAKDOWN))
    seen = samples(tmp_path)
    assert seen["orchestrator_stage_seconds_bucket", (("le", edge), ("stage", stage))] == 1
    assert seen["orchestrator_turn_e2e_seconds_bucket", (("le", "0.445"),)] == 1
    assert seen["orchestrator_turn_e2e_seconds_bucket", (("le", "0.425"),)] == 0


def test_counters_survive_a_worker_and_gauges_go_with_it(tmp_path: Path):
    in_worker(tmp_path, 0, everything)
    forget_gauges(str(tmp_path), 0)
    seen = samples(tmp_path)
    assert seen["orchestrator_turns_total", (("outcome", "failed"),)] == 1
    assert ("orchestrator_sessions", (("state", "IDLE"),)) not in seen
    in_worker(tmp_path, 0, lambda observer: observer.turn_ended("failed", {}))
    seen = samples(tmp_path)
    assert seen["orchestrator_turns_total", (("outcome", "failed"),)] == 2
    assert seen["orchestrator_sessions", (("state", "IDLE"),)] == 0


def test_files_are_as_many_as_slots_not_as_workers(tmp_path: Path):
    for _ in range(5):
        in_worker(tmp_path, 0, everything)
    in_worker(tmp_path, 1, everything)
    assert {file.name.rpartition("_")[2] for file in tmp_path.iterdir()} == {"0.db", "1.db"}


def test_the_process_of_the_test_itself_counts_nothing(tmp_path: Path):
    in_worker(tmp_path, 0, everything)
    assert prometheus.values.ValueClass.__name__ == "MutexValue"
