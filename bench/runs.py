"""One measured run: fakes, store and server up, warm-up, equal windows, everything down again."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

import click

from bench.client import Turn
from bench.crowd import Crowd, failures
from bench.fakes import FakeConfig, FakeProcess
from bench.floor import FloorLoad
from bench.ideal import Timing, ideal_ms, spoken_clauses, waits_ms
from bench.measure import Spread, quantile
from bench.sut import FASTAPI_PEER, ORCHESTRATOR, PIPECAT_PEER, Cores, Server, Store, busy_seconds, cpu_seconds
from bench.timers import Handle, Timers, timers_for

# A turn of the default answer: 290 ms to the first audio, then four seconds of speech.
TURN_S = 4.5
_UNFIT = 0.25


@dataclass(frozen=True, slots=True)
class Target:
    """A server that can be put under test."""

    name: str
    command: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    has_store: bool = False
    folder: str | None = None

    def with_env(self, **env: str) -> Target:
        return replace(self, env=(*self.env, *env.items()))

    def at(self, folder: Path) -> Target:
        """The same, started from another folder: with `python -m`, from another tree."""
        return replace(self, folder=str(folder))


ORCHESTRATOR_TARGET = Target(
    "orchestrator", ORCHESTRATOR, (("SPECULATION", "off"), ("TTS_PROTOCOL", "openai")), has_store=True
)
FASTAPI_TARGET = Target("fastapi", FASTAPI_PEER)
PIPECAT_TARGET = Target("pipecat", PIPECAT_PEER)


@dataclass(frozen=True, slots=True)
class Stack:
    """What is up during a run."""

    target: Target
    config: FakeConfig
    cores: Cores
    fakes: FakeProcess
    server: Server


@contextlib.contextmanager
def stack(target: Target, config: FakeConfig, workers: int = 1) -> Iterator[Stack]:
    """Fakes, store and load on the harness's cores, the server on its own. Raises StartError."""
    cores = Cores.split()
    config = replace(config, keep_requests=0)
    before = os.sched_getaffinity(0)
    with contextlib.ExitStack() as up:
        fakes = up.enter_context(FakeProcess(config, cpu=min(cores.harness)))
        env = {**fakes.env, "TTS_SAMPLE_RATE": str(config.sample_rate), **dict(target.env)}
        if target.has_store:
            env["REDIS_URL"] = up.enter_context(Store(cores.harness)).url
        server = up.enter_context(Server(target.command, env, cores.server, workers=workers, folder=target.folder))
        os.sched_setaffinity(0, cores.harness)
        up.callback(os.sched_setaffinity, 0, before)
        yield Stack(target, config, cores, fakes, server)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Keeps the load client's own garbage collector from adding pauses to what it measures."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@dataclass(frozen=True, slots=True)
class Plan:
    """A load: `rate` turns/s over `sessions` connections, `windows` × `window_s` measured after `warmup_s`."""

    sessions: int
    rate: float
    windows: int = 3
    window_s: float = 5.0
    warmup_s: float = TURN_S + 1.0
    partials: bool = False
    speculated: bool = False
    extra_windows: int = 2
    barge: Callable[[random.Random], float | None] | None = None

    @property
    def seconds(self) -> float:
        return self.warmup_s + self.windows * self.window_s

    @property
    def floor_rate(self) -> float:
        return min(20.0, max(4.0, self.rate / 5))


@dataclass(slots=True)
class Window:
    """What fell into one stretch of the run, by intended time. Overheads in ms, CPU in seconds."""

    start: float
    end: float
    turns: list[Turn] = field(default_factory=list)
    overheads: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    server_cpu_s: float = 0.0
    fakes_cpu_s: float = 0.0
    client_cpu_s: float = 0.0
    server_core_s: float = 0.0

    @property
    def others(self) -> float:
        """Share of the server's CPU that went to somebody else: what makes a window unfit to judge by, 0…1."""
        return max(0.0, self.server_core_s - self.server_cpu_s) / (self.end - self.start)

    @property
    def good(self) -> list[Turn]:
        return [turn for turn in self.turns if not turn.error and turn.first_audio]

    @property
    def cpu_ms_per_turn(self) -> float:
        return self.server_cpu_s * 1000 / len(self.turns) if self.turns else float("nan")

    @property
    def harness_load(self) -> float:
        """Share of one CPU that fakes and client used, 0…1."""
        return (self.fakes_cpu_s + self.client_cpu_s) / (self.end - self.start)


@dataclass(slots=True)
class Result:
    """A finished run."""

    target: str
    plan: Plan
    windows: list[Window]
    failures: dict[str, int]
    lost: list[str]
    waited: int
    ideal_ms: float

    def total(self, q: float) -> Spread:
        return Spread.over(self.windows, lambda w: quantile((turn.total_ms for turn in w.good), q))

    def raw_overhead(self, q: float) -> Spread:
        return Spread.over(self.windows, lambda w: quantile(w.overheads, q))

    def floor(self, q: float) -> Spread:
        return Spread.over(self.windows, lambda w: quantile(w.floor, q))

    def overhead(self, q: float) -> Spread:
        """Raw overhead less the floor's median: only what the harness always adds is taken off a tail."""
        return self.raw_overhead(q) - self.floor(0.5).median

    @property
    def cpu_ms_per_turn(self) -> Spread:
        return Spread.over(self.windows, lambda w: w.cpu_ms_per_turn)

    @property
    def server_load(self) -> Spread:
        """Share of one CPU that the server used, 0…1."""
        return Spread.over(self.windows, lambda w: w.server_cpu_s / (w.end - w.start))

    @property
    def others(self) -> Spread:
        """Share of the server's CPU that other programs took, 0…1."""
        return Spread.over(self.windows, lambda w: w.others)

    @property
    def harness_load(self) -> Spread:
        return Spread.over(self.windows, lambda w: w.harness_load)

    def within(self, budget_ms: float) -> float:
        """Share of the turns whose total was within the budget; a failed turn was not."""
        turns = [turn for window in self.windows for turn in window.turns]
        kept = sum(not turn.error and turn.total_ms <= budget_ms for turn in turns)
        return kept / len(turns) if turns else float("nan")

    @property
    def turns(self) -> list[Turn]:
        return [turn for window in self.windows for turn in window.turns]


async def tick(label: str, until: float) -> None:
    """Sleeps until `until` (monotonic s), showing a progress bar on a terminal."""
    start = monotonic()
    steps = max(1, round((until - start) * 4))
    if not sys.stderr.isatty():
        await asyncio.sleep(max(0.0, until - start))
        return
    with click.progressbar(length=steps, label=label, file=sys.stderr) as bar:
        for step in range(steps):
            await asyncio.sleep(max(0.0, start + (until - start) * (step + 1) / steps - monotonic()))
            bar.update(1)


async def load(up: Stack, plan: Plan, crowd: Crowd, timers: Timers, label: str = "") -> Result:
    """Runs one plan on a crowd that is already connected.

    A window in which other programs took more than `_UNFIT` of the server's CPU is measured again, at most
    `extra_windows` times in all; if too few fit ones come together, the unfit ones count as well.
    """
    floor = FloorLoad(up.fakes.urls, up.config, timers)
    await floor.warm(round(plan.floor_rate) + 12)
    already, lost_before = len(crowd.turns), len(crowd.lost)

    def arrivals(start: float, seconds: float) -> list[Handle]:
        coming = crowd.poisson(start, seconds, plan.rate, partials=plan.partials, barge=plan.barge)
        return coming + floor.poisson(start, seconds, plan.floor_rate)

    at = monotonic() + 0.5
    arrivals(at, plan.warmup_s)
    at += plan.warmup_s
    windows: list[Window] = []
    arrivals(at, plan.window_s)
    await tick(f"{label} warm-up", at)
    while _wanted(windows, plan):
        window = Window(at, at + plan.window_s)
        # The next window's talkers begin to speak before it does; if it is not wanted they are called off.
        coming = arrivals(window.end, plan.window_s)
        before = _cpu(up)
        await tick(f"{label} window {len(windows) + 1}", window.end)
        spent = [b - a for a, b in zip(before, _cpu(up), strict=True)]
        window.server_cpu_s, window.fakes_cpu_s, window.client_cpu_s, window.server_core_s = spent
        windows.append(window)
        at = window.end
    for arrival in coming:
        arrival.cancel()
    await crowd.settle(TURN_S + 8.0)
    await floor.settle()
    floor.close()
    fit = [window for window in windows if window.others <= _UNFIT]
    windows = fit[: plan.windows] if len(fit) >= plan.windows else windows
    turns = crowd.turns[already:]
    _sort_in(windows, turns, floor.totals_ms, up, plan)
    ideal = ideal_ms(up.config, spoken_clauses(up.config)[0], speculated=plan.speculated)
    return Result(up.target.name, plan, windows, failures(turns), crowd.lost[lost_before:], crowd.waited, ideal)


def _wanted(windows: Sequence[Window], plan: Plan) -> bool:
    fit = sum(window.others <= _UNFIT for window in windows)
    return fit < plan.windows and len(windows) < plan.windows + plan.extra_windows


def _cpu(up: Stack) -> tuple[float, float, float, float]:
    return (
        up.server.cpu_s(),
        cpu_seconds(up.fakes.pid),
        cpu_seconds(os.getpid()),
        busy_seconds(up.cores.server),
    )


def _sort_in(
    windows: Sequence[Window],
    turns: Sequence[Turn],
    floor_totals: Sequence[tuple[float, float]],
    up: Stack,
    plan: Plan,
) -> None:
    logged: dict[str, list[Timing]] = defaultdict(list)
    if up.config.log_timings:
        for row in up.fakes.timings():
            logged[row[1]].append(row)
    floor_ideal = ideal_ms(up.config, spoken_clauses(up.config)[0], speculated=False)
    for window in windows:
        window.floor = [total - floor_ideal for at, total in floor_totals if window.start <= at < window.end]
        window.turns = [turn for turn in turns if window.start <= turn.intended < window.end]
        for turn in window.good:
            if up.config.log_timings:
                wait = waits_ms(up.config, turn, logged[f"{turn.session_id}/{turn.number}"])
            else:
                wait = ideal_ms(up.config, turn.first_clause, speculated=plan.speculated)
            window.overheads.append(turn.total_ms - wait)


async def connected_crowd(up: Stack, sessions: int, timers: Timers) -> Crowd:
    crowd = Crowd(up.server.host, up.server.port, timers)
    await crowd.connect(sessions)
    return crowd


async def run_plan(up: Stack, plan: Plan, label: str) -> Result:
    """Connects a crowd, runs the plan, hangs up."""
    timers = timers_for(asyncio.get_running_loop())
    crowd = await connected_crowd(up, plan.sessions, timers)
    try:
        with no_collections():
            return await load(up, plan, crowd, timers, label)
    finally:
        crowd.close()
        await asyncio.sleep(0.1)
        timers.close()
