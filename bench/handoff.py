"""`bench handoff`: what it costs a connection that its worker is not the one that accepted it."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from time import monotonic
from typing import Any

import uvloop

from bench import report
from bench.crowd import Crowd
from bench.fakes import FakeConfig
from bench.measure import Spread, quantile
from bench.runs import Stack, Target, no_collections, stack
from bench.timers import timers_for

_REPEATS = 5
_CONNECTIONS = 300


@dataclass(frozen=True, slots=True)
class Opened:
    """One repeat: connections opened one after the other."""

    times_ms: list[float]
    cpu_us: float
    handed_over: float
    slots: int

    def ms(self, q: float) -> float:
        return quantile(self.times_ms, q)


def _handoffs(up: Stack) -> float:
    """Connections that a worker sent to another; 0 where the server has no such metric."""
    text = up.server.get("/metrics")[1].decode("utf-8", "replace")
    sent = re.search(r'^orchestrator_handoffs_total\{[^}]*result="sent"[^}]*\} (\S+)$', text, re.MULTILINE)
    return float(sent[1]) if sent else 0.0


async def measure(up: Stack) -> list[Opened]:
    timers = timers_for(asyncio.get_running_loop())
    done: list[Opened] = []
    for repeat in range(_REPEATS + 1):
        crowd = Crowd(up.server.host, up.server.port, timers, prefix=f"handoff-{repeat}")
        times: list[float] = []
        slots: set[Any] = set()
        handed, cpu = _handoffs(up), up.server.cpu_s()
        with no_collections():
            for _ in range(_CONNECTIONS):
                started = monotonic()
                greeting = (await crowd.connect(1))[0]
                times.append((monotonic() - started) * 1000)
                slots.add(greeting.get("slot"))
        cpu_us = (up.server.cpu_s() - cpu) * 1e6 / _CONNECTIONS
        moved = (_handoffs(up) - handed) / _CONNECTIONS
        crowd.close()
        await asyncio.sleep(0.5)
        done.append(Opened(times, cpu_us, moved, len(slots)))
    timers.close()
    return done[1:]


def run(target: Target, config: FakeConfig, *, workers: int = 4) -> dict[str, Any]:
    """Opens connections against one worker and against several on the same core; prints the difference."""
    measured: dict[int, list[Opened]] = {}
    for count in (1, workers):
        with stack(target, config, workers=count) as up:
            measured[count] = uvloop.run(measure(up))
    rows = []
    for count, done in measured.items():
        rows.append(
            [
                str(count),
                Spread.over(done, lambda o: o.ms(0.5)).text(3),
                Spread.over(done, lambda o: o.ms(0.99)).text(3),
                Spread.over(done, lambda o: o.cpu_us).text(0),
                f"{Spread.over(done, lambda o: o.handed_over).median * 100:.0f} %",
                str(max(each.slots for each in done)),
            ]
        )
    headings = ("workers", "connect → connected p50 ms", "p99", "CPU µs", "handed over", "slots seen")
    title = f"Hand-off, {target.name}: {_CONNECTIONS} connections one by one, {_REPEATS} times, all on one core"
    report.table(headings, rows, title=title)
    one, many = (Spread.over(measured[count], lambda o: o.ms(0.5)).median for count in (1, workers))
    share = Spread.over(measured[workers], lambda o: o.handed_over).median
    if share:
        report.note(f"per connection handed over: {(many - one) * 1000 / share:+.0f} µs at p50")
    data = {
        "target": target.name,
        "runs": {
            str(count): {
                "p50_ms": Spread.over(done, lambda o: o.ms(0.5)).json(),
                "p99_ms": Spread.over(done, lambda o: o.ms(0.99)).json(),
                "cpu_us": Spread.over(done, lambda o: o.cpu_us).json(),
                "handed_over": Spread.over(done, lambda o: o.handed_over).json(),
            }
            for count, done in measured.items()
        },
        "added_us_per_handoff": (many - one) * 1000 / share if share else None,
    }
    report.save("handoff", data)
    return data
