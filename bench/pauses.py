"""`bench pauses`: how long the garbage collector holds the event loop, over minutes of steady conversation."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

import uvloop

from bench import report
from bench.fakes import FakeConfig
from bench.runs import Plan, Result, Stack, Target, connected_crowd, load, no_collections, stack
from bench.timers import timers_for

SESSIONS = 600
TURNS_PER_SECOND = 50.0
BAR_MS = 5.0
_WINDOW_S = 30.0
_METRIC = "orchestrator_gc_pause_seconds"


@dataclass(frozen=True, slots=True)
class Pauses:
    """A histogram of pauses: `counts` by upper edge in ms (the last one is infinite), `total_ms` of all."""

    counts: dict[float, int]
    total_ms: float

    @classmethod
    def parse(cls, text: str) -> Pauses:
        """From a page of metrics. Raises ValueError where there is no such histogram."""
        rows = re.findall(rf'^{_METRIC}_bucket\{{le="([^"]+)"\}} (\S+)$', text, re.MULTILINE)
        total = re.search(rf"^{_METRIC}_sum (\S+)$", text, re.MULTILINE)
        if not rows or total is None:
            raise ValueError(f"no histogram {_METRIC}")
        upto = {float(edge) * 1000: int(float(count)) for edge, count in rows}
        edges = sorted(upto)
        counts = {edge: upto[edge] - (upto[edges[i - 1]] if i else 0) for i, edge in enumerate(edges)}
        return cls(counts, float(total[1]) * 1000)

    def since(self, before: Pauses) -> Pauses:
        counts = {edge: count - before.counts.get(edge, 0) for edge, count in self.counts.items()}
        return Pauses(counts, self.total_ms - before.total_ms)

    @property
    def number(self) -> int:
        return sum(self.counts.values())

    @property
    def longest_ms(self) -> float:
        """An upper bound: the edge of the highest bucket that holds any; 0 without a pause."""
        return max((edge for edge, count in self.counts.items() if count), default=0.0)


async def _measure(up: Stack, plan: Plan) -> tuple[Result, Pauses]:
    """From the first turns to shortly before the last: not while hundreds connect, nor when nobody speaks any more."""
    timers = timers_for(asyncio.get_running_loop())
    crowd = await connected_crowd(up, plan.sessions, timers)
    try:
        reading = asyncio.create_task(_read(up, plan))
        with no_collections():
            result = await load(up, plan, crowd, timers, up.target.name)
        return result, await reading
    finally:
        crowd.close()
        await asyncio.sleep(0.1)
        timers.close()


async def _read(up: Stack, plan: Plan) -> Pauses:
    await asyncio.sleep(plan.warmup_s / 2)
    before = await asyncio.to_thread(_pauses, up)
    await asyncio.sleep(plan.seconds - plan.warmup_s / 2 - 1.0)
    return (await asyncio.to_thread(_pauses, up)).since(before)


def _pauses(up: Stack) -> Pauses:
    return Pauses.parse(up.server.get("/metrics")[1].decode())


def run(target: Target, config: FakeConfig, *, minutes: float = 10.0) -> dict[str, Any]:
    """Keeps conversations going, reads the server's own histogram while they do, prints the difference."""
    windows = max(1, round(minutes * 60 / _WINDOW_S))
    plan = Plan(SESSIONS, TURNS_PER_SECOND, windows, _WINDOW_S, extra_windows=0)
    with stack(target, config) as up:
        result, seen = uvloop.run(_measure(up, plan))
    rows = [[f"≤ {edge:g}", str(count)] for edge, count in sorted(seen.counts.items()) if count]
    title = f"Pauses by garbage collection, {target.name}, {minutes:g} minutes at {TURNS_PER_SECOND:g} turns/s"
    report.table(("ms", "pauses"), rows, title=title)
    average_ms = seen.total_ms / max(1, seen.number)
    report.note(f"{len(result.turns)} turns; {seen.number} pauses, {average_ms:.2f} ms on average")
    bars = [report.verdict("longest pause by garbage collection, at most", seen.longest_ms, BAR_MS, "ms")]
    data = {
        "target": target.name,
        "minutes": minutes,
        "turns": len(result.turns),
        "pauses_by_upper_edge_ms": {str(edge): count for edge, count in seen.counts.items()},
        "total_ms": seen.total_ms,
        "bars": bars,
    }
    report.save(f"pauses-{target.name}", data)
    return data
