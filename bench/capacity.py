"""`bench capacity`: the rate at which one core's p99 overhead passes 20 ms, and what a turn and a session cost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import uvloop

from bench import report
from bench.e2e import complain, result_json
from bench.fakes import FakeConfig
from bench.runs import (
    TURN_S,
    Plan,
    Result,
    Stack,
    Target,
    connected_crowd,
    load,
    no_collections,
    run_plan,
    stack,
)
from bench.sut import Memory
from bench.timers import timers_for

KNEE_MS = 20.0
_FIRST_RATE = 60.0
_STEPS = (0.6, 0.75, 0.85, 0.95)
_IDLE_SESSIONS = 1000


def _plan(rate: float, extra_windows: int) -> Plan:
    # Enough sessions for everybody to be able to speak, and a fifth of them idle.
    return Plan(max(50, round(rate * TURN_S * 1.25)), rate, windows=3, window_s=4.0, extra_windows=extra_windows)


def _passes(result: Result) -> bool:
    failed = sum(result.failures.values())
    return result.overhead(0.99).median < KNEE_MS and failed * 1000 <= len(result.turns) and not result.lost


def ramp(up: Stack, extra_windows: int) -> list[Result]:
    """Measures rates up to the first that fails, then once between the last two."""

    def at(rate: float) -> Result:
        return uvloop.run(run_plan(up, _plan(rate, extra_windows), f"{up.target.name} {rate:g}/s"))

    first = at(_FIRST_RATE)
    results = [first]
    full = 1000 / first.cpu_ms_per_turn.median
    for share in _STEPS:
        rate = float(round(full * share))
        if rate <= results[-1].plan.rate:
            continue
        results.append(at(rate))
        if not _passes(results[-1]):
            break
    # Work per turn shrinks as ticks fill up, so the first estimate may have been too low.
    while _passes(results[-1]) and len(results) < 9:
        results.append(at(float(round(results[-1].plan.rate * 1.15))))
    passing = [result.plan.rate for result in results if _passes(result)]
    if passing and not _passes(results[-1]):
        results.append(at(float(round((max(passing) + results[-1].plan.rate) / 2))))
    return sorted(results, key=lambda result: result.plan.rate)


async def memory(up: Stack, sessions: int, rate: float) -> dict[str, Memory]:
    """The server's memory before anybody is connected, with everybody idle, and under load."""
    timers = timers_for(asyncio.get_running_loop())
    warm = await connected_crowd(up, 50, timers)
    with no_collections():
        await load(up, Plan(50, 10.0, windows=1, window_s=3.0), warm, timers, "memory: warm-up")
    warm.close()
    await asyncio.sleep(1.0)
    before = up.server.memory()
    crowd = await connected_crowd(up, sessions, timers)
    await asyncio.sleep(1.5)
    idle = up.server.memory()
    with no_collections():
        running = asyncio.create_task(
            load(up, Plan(sessions, rate, windows=1, window_s=5.0), crowd, timers, "memory: active")
        )
        await asyncio.sleep(TURN_S + 4.0)
        active = up.server.memory()
        await running
    crowd.close()
    await asyncio.sleep(0.1)
    timers.close()
    return {"before": before, "idle": idle, "active": active}


def run(target: Target, config: FakeConfig, *, extra_windows: int = 2) -> dict[str, Any]:
    """Measures, prints and writes results; returns what was written."""
    with stack(target, config) as up:
        results = ramp(up, extra_windows)
    knee = max((result.plan.rate for result in results if _passes(result)), default=0.0)
    with stack(target, config) as up:
        seen = uvloop.run(memory(up, _IDLE_SESSIONS, min(100.0, max(10.0, knee * 0.6))))
    per_session = {kind: (seen[kind].private - seen["before"].private) / _IDLE_SESSIONS for kind in ("idle", "active")}
    rows = [
        [
            f"{result.plan.rate:g}",
            str(result.plan.sessions),
            result.overhead(0.5).text(),
            result.overhead(0.99).text(),
            result.floor(0.99).text(),
            result.cpu_ms_per_turn.text(),
            f"{result.server_load.median * 100:.0f} %",
            f"{result.harness_load.median * 100:.0f} %",
            f"{result.others.high * 100:.0f} %",
            "yes" if _passes(result) else "no",
        ]
        for result in results
    ]
    headings = (
        "turns/s", "sessions", "overhead p50", "p99", "floor p99", "CPU ms/turn",
        "server", "harness", "others", f"p99 < {KNEE_MS:g} ms",
    )  # fmt: skip
    report.table(headings, rows, title=f"Capacity of one core, {target.name}; ms, median [min–max]")
    complain(results)
    report.note(f"turns/s per core with p99 overhead under {KNEE_MS:g} ms: {knee:g}")
    report.note(
        f"private memory per session, {_IDLE_SESSIONS} connected: idle {per_session['idle']:.1f} KiB, "
        f"active {per_session['active']:.1f} KiB (whole process {seen['active'].rss / 1024:.0f} MiB RSS)"
    )
    bars = []
    if target.name == "orchestrator":
        bars = [
            report.verdict("turns/s per core", knee, 300.0, "turns/s", at_least=True),
            report.verdict("RSS per idle session", per_session["idle"], 32.0, "KiB"),
        ]
    data = {
        "target": target.name,
        "knee_turns_per_s": knee,
        "steps": [result_json(result) for result in results],
        "memory_kib": {name: {"rss": m.rss, "pss": m.pss, "private": m.private} for name, m in seen.items()},
        "private_kib_per_session": per_session,
        "bars": bars,
    }
    report.save(f"capacity-{target.name}", data)
    report.picture(f"capacity-{target.name}", lambda figure: _draw(figure, results))
    return data


def _draw(figure: Any, results: Sequence[Result]) -> None:
    axes = figure.subplots()
    rates = [result.plan.rate for result in results]
    for q, colour in ((0.5, "tab:blue"), (0.99, "tab:red")):
        spreads = [result.overhead(q) for result in results]
        axes.plot(rates, [s.median for s in spreads], marker="o", color=colour, label=f"overhead p{q * 100:g}")
        axes.fill_between(rates, [s.low for s in spreads], [s.high for s in spreads], color=colour, alpha=0.15)
    axes.axhline(KNEE_MS, color="black", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if _near(tick, results)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("turns/s on one core")
    axes.set_ylabel("overhead (ms)")
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(rates, [r.cpu_ms_per_turn.median for r in results], marker="s", color="tab:green", label="CPU per turn")
    right.set_ylim(bottom=0)
    right.set_ylabel("CPU per turn (ms)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)


def _near(tick: float, results: Sequence[Result]) -> bool:
    """Whether a tick of the logarithmic axis is close enough to the figures to be shown."""
    least = min(result.overhead(0.5).low for result in results)
    most = max(KNEE_MS, *(result.overhead(0.99).high for result in results))
    return least / 2.5 <= tick <= most * 2.5
