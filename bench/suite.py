"""`bench all`: the whole of it within ten minutes, and one list of the bars at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from bench import barge_in, capacity, compare, e2e, handoff, micro, report
from bench.fakes import FakeConfig
from bench.runs import Target
from bench.sut import StartError

_LIMIT_S = 585.0
_EXTRA_WINDOWS = 1


def run(target: Target, peers: Sequence[Target]) -> bool:
    """Runs every measurement that there is time for; True if every bar was met and nothing failed to run."""
    config = FakeConfig()
    # Each with about the seconds it takes, so that the suite as a whole keeps its limit.
    parts: Sequence[tuple[str, float, Callable[[], dict[str, Any]]]] = (
        ("micro", 10, lambda: micro.run(30)),
        ("e2e", 140, lambda: e2e.run(
            target, config, points=e2e.QUICK_POINTS, window_s=4.0, extra_windows=_EXTRA_WINDOWS
        )),
        ("barge-in", 80, lambda: barge_in.run(target, config, protocols=("openai", "stream"), rounds=4)),
        ("handoff", 15, lambda: handoff.run(target, config)),
        ("capacity", 160, lambda: capacity.run(target, config, extra_windows=_EXTRA_WINDOWS)),
        ("peers", 120, lambda: compare.run(peers, config, extra_windows=0)),
    )  # fmt: skip
    started = time.monotonic()
    bars: list[dict[str, Any]] = []
    unfinished: list[str] = []
    for name, seconds, part in parts:
        if time.monotonic() - started + seconds > _LIMIT_S:
            unfinished.append(f"{name}: no time left")
            continue
        try:
            bars += part().get("bars", [])
        except StartError as error:
            unfinished.append(f"{name}: {error}")
    _summary(bars, unfinished, time.monotonic() - started)
    report.save("all", {"bars": bars, "unfinished": unfinished})
    return not unfinished and all(bar["met"] for bar in bars)


def _summary(bars: Sequence[dict[str, Any]], unfinished: Sequence[str], seconds: float) -> None:
    rows = [
        [
            bar["label"],
            f"{bar['value']:.2f}",
            f"{'≥' if bar['at_least'] else '≤'} {bar['bar']:g}",
            bar["unit"],
            "met" if bar["met"] else "MISSED",
        ]
        for bar in bars
    ]
    report.table(("bar", "measured", "wanted", "", ""), rows, title=f"The bars, after {seconds:.0f} s")
    for line in unfinished:
        report.note(f"not measured: {line}")
