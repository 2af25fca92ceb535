"""`bench peers`: the same services and the same client against other ways to build this, in the same run."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import uvloop

from bench import report
from bench.e2e import complain, describe, result_json
from bench.fakes import FakeConfig
from bench.runs import Plan, Result, Target, run_plan, stack
from bench.sut import PEERS_PYTHON

# The lower rate is what a Pipecat worker carries at ease on one core, the higher what a FastAPI one does.
LOW = Plan(50, 6.0, windows=3, window_s=5.0)
HIGH = Plan(400, 60.0, windows=3, window_s=5.0)
_RATIO_BARS = {"fastapi": (1 / 3, 1 / 2), "pipecat": (1 / 10, 1 / 10)}


def why_missing(target: Target) -> str:
    """Why a peer cannot run here, or an empty string."""
    if target.name == "fastapi":
        gone = [name for name in ("fastapi", "uvicorn", "httptools") if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(gone)} (extra `peers`)" if gone else ""
    if target.name == "pipecat":
        if not PEERS_PYTHON.exists():
            return "no environment .venv-peers with pipecat-ai, fastapi and uvicorn (see bench/README.md)"
        done = subprocess.run(
            [str(PEERS_PYTHON), "-c", "import importlib.util as u; assert u.find_spec('pipecat')"],
            capture_output=True,
            check=False,
        )
        return "pipecat-ai is not installed in .venv-peers" if done.returncode else ""
    return ""


def run(targets: Sequence[Target], config: FakeConfig, *, extra_windows: int = 2) -> dict[str, Any]:
    """Measures every target that can run at the same rates; prints the figures and the ratios."""
    results: list[Result] = []
    for target in targets:
        missing = why_missing(target)
        if missing:
            report.note(f"{target.name} left out: {missing}")
            continue
        plans = (LOW,) if target.name == "pipecat" else (LOW, HIGH)
        with stack(target, config) as up:
            for plan in plans:
                label = f"{target.name} {plan.rate:g}/s"
                whole = replace(plan, extra_windows=extra_windows)
                results.append(uvloop.run(run_plan(up, whole, label)))
    rows = [
        [
            result.target,
            f"{result.plan.rate:g}",
            result.total(0.5).text(1),
            result.overhead(0.5).text(),
            result.overhead(0.99).text(),
            result.cpu_ms_per_turn.text(),
            f"{result.within(445.0) * 100:.1f} %",
            f"{result.others.high * 100:.0f} %",
        ]
        for result in results
    ]
    headings = (
        "server", "turns/s", "total p50 ms", "overhead p50 ms", "p99", "CPU ms/turn", "in 445 ms", "others",
    )  # fmt: skip
    report.table(headings, rows, title="Peers, one core each, same services and client; median [min–max]")
    report.note("overhead counts from the ideal for each one's own first clause: a later cut is not held against it")
    complain(results)
    ratios = _ratios(results)
    data = {
        "config": describe(config),
        "runs": [{"target": result.target, **result_json(result)} for result in results],
        "ratios": ratios,
        "bars": _bars(ratios),
    }
    report.save("peers", data)
    report.picture("peers", lambda figure: _draw(figure, results))
    return data


def _ratios(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The orchestrator's figures over each peer's, at every rate that both ran at."""
    ours = {result.plan.rate: result for result in results if result.target == "orchestrator"}
    found = []
    for peer in results:
        mine = ours.get(peer.plan.rate)
        if mine is None or peer is mine:
            continue
        found.append(
            {
                "peer": peer.target,
                "rate": peer.plan.rate,
                "cpu": mine.cpu_ms_per_turn.median / peer.cpu_ms_per_turn.median,
                "overhead_p50": mine.overhead(0.5).median / peer.overhead(0.5).median,
                "overhead_p99": mine.overhead(0.99).median / peer.overhead(0.99).median,
            }
        )
    if found:
        rows = [
            [
                f"{each['peer']} at {each['rate']:g}/s",
                f"{each['cpu']:.2f}",
                f"{each['overhead_p50']:.2f}",
                f"{each['overhead_p99']:.2f}",
            ]
            for each in found
        ]
        headings = ("orchestrator over", "CPU per turn", "overhead p50", "overhead p99")
        report.table(headings, rows, title="Ratios (less than 1: the orchestrator takes less)")
    return found


def _bars(ratios: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    bars = []
    for peer, (cpu_bar, tail_bar) in _RATIO_BARS.items():
        of_peer = [each for each in ratios if each["peer"] == peer]
        if of_peer:
            top = max(of_peer, key=lambda each: float(each["rate"]))
            name = f"against {peer} at {top['rate']:g}/s"
            bars.append(report.verdict(f"CPU per turn {name}", top["cpu"], round(cpu_bar, 3), "×"))
            bars.append(report.verdict(f"p99 overhead {name}", top["overhead_p99"], tail_bar, "×"))
    return bars


def _draw(figure: Any, results: Sequence[Result]) -> None:
    left, right = figure.subplots(1, 2)
    names = [f"{result.target}\n{result.plan.rate:g}/s" for result in results]
    places = range(len(results))
    cost = [result.cpu_ms_per_turn.median for result in results]
    tail = [result.overhead(0.99).median for result in results]
    for axes, values, colour, title in (
        (left, cost, "#4c78a8", "CPU per turn (ms)"),
        (right, tail, "#e45756", "overhead p99 (ms)"),
    ):
        axes.bar_label(axes.bar(places, values, color=colour), fmt="%.1f", fontsize=9)
        axes.set_title(title)
        axes.set_xticks(places, names, fontsize=8)
        axes.grid(axis="y", alpha=0.3)
