"""`bench e2e`: end of speech to first audio byte, over concurrency, without and with speculation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import uvloop

from bench import report
from bench.fakes import FakeConfig
from bench.measure import encoded, quantile
from bench.runs import Plan, Result, Target, run_plan, stack

BUDGET_MS = 445.0
# A session is busy for about 4.3 s a turn: fewer than six sessions for each turn/s would make turns wait for one.
POINTS = ((40, 4.0), (120, 20.0), (500, 50.0), (1000, 100.0))
SPECULATION_POINT = (400, 40.0)
QUICK_POINTS = ((40, 4.0), (240, 40.0), (1000, 100.0))


def run(
    target: Target,
    config: FakeConfig,
    *,
    points: Sequence[tuple[int, float]] = POINTS,
    speculation: bool = True,
    windows: int = 3,
    window_s: float = 5.0,
    extra_windows: int = 2,
) -> dict[str, Any]:
    """Measures, prints and writes results; returns what was written."""
    results: list[tuple[str, Result]] = []
    with stack(target, config) as up:
        for sessions, rate in points:
            plan = Plan(sessions, rate, windows, window_s, extra_windows=extra_windows)
            label = f"{target.name} {sessions}×{rate:g}/s"
            results.append(("plain", uvloop.run(run_plan(up, plan, label))))
    if speculation:
        sessions, rate = SPECULATION_POINT
        for mode in ("off", "on"):
            plan = Plan(
                sessions,
                rate,
                windows,
                window_s,
                partials=True,
                speculated=mode == "on",
                extra_windows=extra_windows,
            )
            with stack(target.with_env(SPECULATION=mode), config) as up:
                result = uvloop.run(run_plan(up, plan, f"{target.name} speculation {mode}"))
                results.append((f"partials, speculation {mode}", result))
    _print(target, results)
    bars = _bars(results) if target.name == "orchestrator" and config == FakeConfig() else []
    data = {
        "target": target.name,
        "config": describe(config),
        "runs": [{"case": case, **result_json(result)} for case, result in results],
        "bars": bars,
    }
    report.save(f"e2e-{target.name}", data)
    report.picture(f"e2e-{target.name}", lambda figure: _draw(figure, config, results))
    return data


def _print(target: Target, results: Sequence[tuple[str, Result]]) -> None:
    named = [(f"{case}, {result.plan.sessions} × {result.plan.rate:g}/s", result) for case, result in results]
    rows = [
        [
            name,
            str(len(result.turns)),
            f"{result.ideal_ms:.0f}",
            result.total(0.5).text(1),
            result.total(0.99).text(1),
            result.overhead(0.5).text(),
            result.overhead(0.99).text(),
            f"{result.within(BUDGET_MS) * 100:.1f} %",
        ]
        for name, result in named
    ]
    headings = ("sessions × turns/s", "turns", "ideal", "total p50", "p99", "overhead p50", "p99", "in 445 ms")
    title = f"End of speech to first audio, {target.name}; ms, median [min–max] of the windows"
    report.table(headings, rows, title=title)
    report.note("overhead = total − ideal for the fakes' delays − floor's p50 (the harness without a server)")
    rows = [
        [
            name,
            result.cpu_ms_per_turn.text(),
            f"{result.server_load.median * 100:.0f} %",
            result.floor(0.5).text(),
            result.floor(0.99).text(),
            f"{result.harness_load.median * 100:.0f} %",
            f"{result.others.high * 100:.0f} %",
        ]
        for name, result in named
    ]
    costs = ("sessions × turns/s", "CPU ms/turn", "server", "floor p50 ms", "p99", "harness", "others")
    report.table(costs, rows, title="What it took, and what the harness adds by itself")
    report.note("others: the most that other programs took of the server's CPU in one window")
    complain([result for _, result in results])


def complain(results: Sequence[Result]) -> None:
    """Says what went wrong in the runs, if anything did."""
    for result in results:
        for why, count in result.failures.items():
            report.note(f"failed turns at {result.plan.rate:g}/s: {count} × {why}")
        if result.lost:
            report.note(f"lost connections at {result.plan.rate:g}/s: {len(result.lost)}, first: {result.lost[0]}")
        if result.waited:
            report.note(
                f"{result.waited} turns at {result.plan.rate:g}/s waited for a free session, which counts as latency"
            )
        if result.harness_load.high > 0.85:
            report.note(f"at {result.plan.rate:g}/s the harness itself used {result.harness_load.high * 100:.0f} %")


def _bars(results: Sequence[tuple[str, Result]]) -> list[dict[str, Any]]:
    plain = [result for case, result in results if case == "plain"]
    by_case = dict(results)
    top = plain[-1]
    name = f"overhead {{}}, {top.plan.sessions} sessions, {top.plan.rate:g} turns/s"
    bars = [
        report.verdict(name.format("p50"), top.overhead(0.5).median, 1.5, "ms"),
        report.verdict(name.format("p99"), top.overhead(0.99).median, 8.0, "ms"),
        report.verdict("CPU per turn", top.cpu_ms_per_turn.median, 2.5, "ms"),
        report.verdict("total p50 over the ideal", plain[0].raw_overhead(0.5).median, 5.0, "ms"),
        report.verdict("total p99", max(result.total(0.99).median for result in plain), BUDGET_MS, "ms"),
    ]
    off, on = by_case.get("partials, speculation off"), by_case.get("partials, speculation on")
    if off is not None and on is not None:
        saved = off.total(0.5).median - on.total(0.5).median
        bars.append(report.verdict("p50 saved by speculation", saved, 70.0, "ms", at_least=True))
    return bars


def describe(config: FakeConfig) -> dict[str, Any]:
    return {
        "intent_ms": str(config.intent),
        "rag_ms": str(config.rag),
        "llm_first_token_ms": str(config.llm_first),
        "llm_gap_ms": config.llm_gap_ms,
        "tokens": len(config.tokens),
        "tts_first_chunk_ms": str(config.tts_first),
    }


def result_json(result: Result) -> dict[str, Any]:
    """A result for the JSON file: every figure with its windows, and the totals as an HdrHistogram."""
    totals = [turn.total_ms for window in result.windows for turn in window.good]
    return {
        "sessions": result.plan.sessions,
        "rate": result.plan.rate,
        "turns": len(result.turns),
        "ideal_ms": result.ideal_ms,
        "total_ms": {str(q): result.total(q).json() for q in (0.5, 0.9, 0.99, 1.0)},
        "raw_overhead_ms": {str(q): result.raw_overhead(q).json() for q in (0.5, 0.9, 0.99, 1.0)},
        "floor_ms": {str(q): result.floor(q).json() for q in (0.5, 0.99)},
        "overhead_ms": {str(q): result.overhead(q).json() for q in (0.5, 0.9, 0.99)},
        "within_budget": result.within(BUDGET_MS),
        "cpu_ms_per_turn": result.cpu_ms_per_turn.json(),
        "server_load": result.server_load.json(),
        "harness_load": result.harness_load.json(),
        "others_on_server_cpu": result.others.json(),
        "failures": result.failures,
        "lost": len(result.lost),
        "waited": result.waited,
        "server_stages_ms": stages(result),
        "total_us_hdr": encoded(totals),
    }


def stages(result: Result) -> dict[str, float]:
    """Medians of what the server's own `latency_breakdown` says, where it says it."""
    turns = [turn for window in result.windows for turn in window.good]
    names = sorted({name for turn in turns[:50] for name in turn.breakdown})
    return {
        name: quantile((float(turn.breakdown[name]) for turn in turns if _is_number(turn.breakdown.get(name))), 0.5)
        for name in names
        if _is_number(turns[0].breakdown.get(name))
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _draw(figure: Any, config: FakeConfig, results: Sequence[tuple[str, Result]]) -> None:
    cases = sum(case != "plain" for case, _ in results) + 1
    upper, lower = figure.subplots(2, 1, height_ratios=(0.25 + 0.25 * cases, 1.1))
    _waterfall(upper, config, results)
    plain = [result for case, result in results if case == "plain"]
    rates = [result.plan.rate for result in plain]
    for q, colour in ((0.5, "tab:blue"), (0.99, "tab:red")):
        spreads = [result.overhead(q) for result in plain]
        middle = [spread.median for spread in spreads]
        below = [spread.median - spread.low for spread in spreads]
        above = [spread.high - spread.median for spread in spreads]
        lower.errorbar(rates, middle, yerr=(below, above), marker="o", capsize=3, color=colour, label=f"p{q * 100:g}")
    lower.set_xlabel("turns/s")
    lower.set_ylabel("overhead (ms)")
    lower.set_ylim(bottom=0)
    lower.grid(alpha=0.3)
    lower.legend(loc="upper left")


def _waterfall(axes: Any, config: FakeConfig, results: Sequence[tuple[str, Result]]) -> None:
    cases = [results[0], *[item for item in results if item[0] != "plain"]]
    colours = {"Intent ∥ RAG": "#4c78a8", "LLM": "#f58518", "TTS": "#54a24b", "overhead": "#e45756"}
    for row, (_, result) in enumerate(cases):
        speech = result.ideal_ms - config.tts_first.p50_ms
        retrieval = 0.0 if result.plan.speculated else max(config.intent.p50_ms, config.rag.p50_ms)
        widths = {
            "Intent ∥ RAG": retrieval,
            "LLM": speech - retrieval,
            "TTS": config.tts_first.p50_ms,
            "overhead": max(0.0, result.total(0.5).median - result.ideal_ms),
        }
        left = 0.0
        for name, width in widths.items():
            axes.barh(row, width, left=left, color=colours[name], label=name if row == 0 else None)
            if width > 20:
                axes.text(left + width / 2, row, f"{width:.0f}", ha="center", va="center", color="white")
            left += width
        axes.text(left + 4, row, f"{left:.1f} ms", va="center")
    axes.axvline(BUDGET_MS, color="black", linestyle="--")
    axes.text(BUDGET_MS - 3, len(cases) - 0.55, f"budget {BUDGET_MS:g} ms", ha="right", va="bottom", fontsize=8)
    axes.set_yticks(range(len(cases)), [case for case, _ in cases])
    axes.set_xlim(0, BUDGET_MS * 1.08)
    axes.invert_yaxis()
    axes.set_xlabel("ms from the end of speech")
    axes.legend(loc="upper right", fontsize=8, ncols=4, bbox_to_anchor=(1, 1.22), frameon=False)
