"""The observer that counts in Prometheus, for all workers of the pool together.

Each worker writes its values into memory-mapped files named by its slot, not its process: a worker that replaces a dead
one goes on counting in the same files, so counters survive and files do not pile up. Any worker can read all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from prometheus_client.values import MultiProcessValue

from orchestrator.telemetry.observer import Observer

DIRECTORY_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

STAGES: Final = ("stt", "intent", "rag", "intent_rag", "llm_first_token", "first_clause", "tts_first_chunk")
STATES: Final = ("IDLE", "LISTENING", "THINKING", "SPEAKING", "INTERRUPT")
BREAKER_LEVELS: Final = {"closed": 0, "half_open": 1, "open": 2}

STAGE_BUCKETS: Final = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.065, 0.075, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.445, 0.6, 1.0, 2.0, 5.0,
)  # fmt: skip
"""Every stage target (50, 80, 100, 75 ms) and the 445 ms budget is an edge."""

E2E_BUCKETS: Final = (
    0.05, 0.075, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.425, 0.445, 0.475, 0.5, 0.6, 0.8, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
FINE_BUCKETS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.008, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0,
)  # fmt: skip


def use_directory(path: str, slot: int) -> None:
    """Keep this process's values in `path`, in the files of `slot`. Call before the first metric is made."""
    os.environ[DIRECTORY_VARIABLE] = path
    values.ValueClass = MultiProcessValue(lambda: slot)  # type: ignore[no-untyped-call]  # the library has no types here


def forget_gauges(path: str, slot: int) -> None:
    """The worker of `slot` is gone: what it gauged is no longer so. Its counters stay."""
    mark_process_dead(slot, path)  # type: ignore[no-untyped-call]  # the library has no types here


def render(path: str, restarts: int) -> bytes:
    """All workers' metrics in the text format. Takes milliseconds and reads files: not for the event loop's thread."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path)  # type: ignore[no-untyped-call]  # the library has no types here
    registry.register(_Restarts(restarts))
    return generate_latest(registry)


class _Restarts(Collector):
    def __init__(self, restarts: int) -> None:
        self._restarts = restarts

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "orchestrator_worker_restarts", "Workers replaced because they died.", value=self._restarts
        )


class PrometheusObserver(Observer):
    """Counts what happens in this worker; one a process, after `use_directory`."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._make_turn_metrics(registry)
        self._make_connection_metrics(registry)
        self._make_service_metrics(registry)

    def _make_turn_metrics(self, registry: CollectorRegistry) -> None:
        stage = Histogram(
            "orchestrator_stage_seconds", "Time a stage of a turn took.", ("stage",),
            buckets=STAGE_BUCKETS, registry=registry,
        )  # fmt: skip
        self._stages = [(f"{name}_ms", stage.labels(name)) for name in STAGES]
        self._e2e = Histogram(
            "orchestrator_turn_e2e_seconds", "End of the user's speech to the first audio byte.",
            buckets=E2E_BUCKETS, registry=registry,
        )  # fmt: skip
        self._overhead = Histogram(
            "orchestrator_turn_overhead_seconds", "A turn's time minus its slowest chain of downstream waits.",
            buckets=FINE_BUCKETS, registry=registry,
        )  # fmt: skip
        self._stop = Histogram(
            "orchestrator_barge_in_stop_seconds", "Receipt of a barge-in to `interrupted` written.",
            buckets=FINE_BUCKETS, registry=registry,
        )  # fmt: skip
        self._turns = _Children(Counter("orchestrator_turns", "Turns ended.", ("outcome",), registry=registry))
        self._exceeded = _Children(
            Counter(
                "orchestrator_budget_exceeded", "Turns over budget, by the stage that broke it.", ("stage",),
                registry=registry,
            )
        )  # fmt: skip
        self._speculation = _Children(
            Counter("orchestrator_speculation", "Speculative calls ended.", ("result",), registry=registry)
        )

    def _make_connection_metrics(self, registry: CollectorRegistry) -> None:
        sessions = Gauge(
            "orchestrator_sessions", "Connected sessions.", ("state",), registry=registry, multiprocess_mode="livesum"
        )
        self._sessions = {state: sessions.labels(state) for state in STATES}
        for gauge in self._sessions.values():
            gauge.set(0)
        self._rejected = _Children(
            Counter("orchestrator_sessions_rejected", "Refused connections.", ("reason",), registry=registry)
        )
        self._handoffs = _Children(
            Counter("orchestrator_handoffs", "Accepted connections by where they went.", ("result",), registry=registry)
        )
        self._gc = Histogram(
            "orchestrator_gc_pause_seconds", "How long a collection of cyclic garbage held the event loop.",
            buckets=FINE_BUCKETS, registry=registry,
        )  # fmt: skip
        self._lag = Histogram(
            "orchestrator_loop_lag_seconds", "How late the event loop ran its heartbeat.",
            buckets=FINE_BUCKETS, registry=registry,
        )  # fmt: skip

    def _make_service_metrics(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "orchestrator_downstream_requests", "Calls to services.", ("service", "outcome"), registry=registry
        )
        self._request_children: dict[tuple[str, str], Counter] = {}
        self._seconds = Histogram(
            "orchestrator_downstream_seconds", "Time of calls to services.", ("service",),
            buckets=STAGE_BUCKETS, registry=registry,
        )  # fmt: skip
        self._second_children: dict[str, Histogram] = {}
        self._extra = Counter(
            "orchestrator_extra_requests", "Hedged and repeated calls to services.", ("service", "kind", "result"),
            registry=registry,
        )  # fmt: skip
        self._breaker = Gauge(
            "orchestrator_breaker_state", "Circuit breaker: 0 closed, 1 half-open, 2 open; the worst worker's.",
            ("service",), registry=registry, multiprocess_mode="livemax",
        )  # fmt: skip
        self._writes = _Children(
            Counter("orchestrator_store_writes", "Session writes to the store.", ("result",), registry=registry)
        )
        self._dirty = Gauge(
            "orchestrator_store_dirty", "Sessions waiting to be written.", registry=registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self._connected = Gauge(
            "orchestrator_redis_connected", "1 when every worker reaches the store.", registry=registry,
            multiprocess_mode="livemin",
        )  # fmt: skip
        self._dirty.set(0)
        self._connected.set(0)

    def turn_ended(self, outcome: str, breakdown: Mapping[str, float | bool | str]) -> None:
        self._turns.of(outcome).inc()
        for key, histogram in self._stages:
            if key in breakdown:
                histogram.observe(float(breakdown[key]) / 1000.0)
        if outcome not in ("completed", "truncated", "interrupted"):
            return
        if "total_ms" in breakdown:
            self._e2e.observe(float(breakdown["total_ms"]) / 1000.0)
        if "overhead_ms" in breakdown:
            self._overhead.observe(float(breakdown["overhead_ms"]) / 1000.0)
        if breakdown.get("within_budget") is False:
            self._exceeded.of(str(breakdown.get("budget_broken_by", "unknown"))).inc()

    def barge_in_stopped(self, seconds: float) -> None:
        self._stop.observe(seconds)

    def speculation(self, result: str) -> None:
        self._speculation.of(result).inc()

    def session_state(self, state: str, change: int) -> None:
        gauge = self._sessions.get(state)
        if gauge is not None:
            gauge.inc(change)

    def session_rejected(self, reason: str) -> None:
        self._rejected.of(reason).inc()

    def handed_off(self, result: str) -> None:
        self._handoffs.of(result).inc()

    def downstream(self, service: str, outcome: str, seconds: float) -> None:
        calls = self._request_children.get((service, outcome))
        if calls is None:
            calls = self._request_children[service, outcome] = self._requests.labels(service, outcome)
        calls.inc()
        times = self._second_children.get(service)
        if times is None:
            times = self._second_children[service] = self._seconds.labels(service)
        times.observe(seconds)

    def extra_request(self, service: str, kind: str, result: str) -> None:
        self._extra.labels(service, kind, result).inc()

    def breaker_state(self, service: str, state: str) -> None:
        self._breaker.labels(service).set(BREAKER_LEVELS[state])

    def store_written(self, result: str, count: int) -> None:
        self._writes.of(result).inc(count)

    def store_state(self, connected: bool, dirty: int) -> None:
        self._connected.set(1 if connected else 0)
        self._dirty.set(dirty)

    def gc_paused(self, seconds: float) -> None:
        self._gc.observe(seconds)

    def loop_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)


class _Children:
    """A counter with one label, its children looked up once: `labels()` costs more than counting."""

    __slots__ = ("_children", "_counter")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._children: dict[str, Counter] = {}

    def of(self, label: str) -> Counter:
        child = self._children.get(label)
        if child is None:
            child = self._children[label] = self._counter.labels(label)
        return child
