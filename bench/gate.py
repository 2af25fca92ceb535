"""`bench gate`: is this commit clearly slower than where it branched off?

Both trees are measured in the same run by this tree's harness, one after the other in changing order (A B, B A, …),
so that what slows the machine slows both. Compared are the microbenchmarks (the least of many short repeats: noise
only ever adds) and, for whole turns, the server's CPU time per turn and its p50 overhead.

How it decides, for each figure by itself:
1. `pairs` ratios new/old are taken. The figure is *suspect* if their median is at least 1 + `CLEAR` and all but one
   of them are over 1 + `SURELY`: a shift of the whole distribution, not a few bad moments.
2. A suspect figure is measured again with as many fresh pairs. Only if it is suspect again does the gate fail.
A true slowdown of 20 % passes both with room to spare; two equal builds would have to be unlucky twice in nearly
every pair.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import uvloop

from bench import report
from bench.fakes import FakeConfig
from bench.micro import SLOWDOWN_VARIABLE
from bench.runs import Plan, Target, run_plan, stack
from bench.sut import StartError

CLEAR = 0.10
SURELY = 0.04
MICRO_PAIRS = 8
TURN_PAIRS = 4
_MICRO_REPEATS = 25
_TURNS = Plan(300, 40.0, windows=1, window_s=5.0, extra_windows=0)
_ROOT = Path(__file__).parents[1]
_DRAG = Path(__file__).parent / "drag"

Figures = Mapping[str, float]


def suspect(ratios: Sequence[float], clear: float = CLEAR, surely: float = SURELY) -> bool:
    """The first step's rule: a clear median, and hardly a pair that does not agree."""
    if len(ratios) < 3:
        return False
    agreeing = sum(ratio > 1 + surely for ratio in ratios)
    return statistics.median(ratios) >= 1 + clear and agreeing >= len(ratios) - 1


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two builds: a folder to run from, and what to add to its environment."""

    name: str
    folder: Path
    env: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome for one figure."""

    figure: str
    first: tuple[float, ...]
    again: tuple[float, ...]

    @property
    def failed(self) -> bool:
        return suspect(self.first) and suspect(self.again)

    @property
    def ratio(self) -> float:
        return statistics.median(self.first + self.again)


def compare(measure: Callable[[Side], Figures], old: Side, new: Side, pairs: int, label: str) -> list[Verdict]:
    """Measures both sides `pairs` times in changing order, and suspects once more."""
    first = _ratios(measure, old, new, pairs, label)
    doubtful = [name for name, ratios in first.items() if suspect(ratios)]
    again = _ratios(measure, old, new, pairs, f"{label}, again") if doubtful else {}
    return [
        Verdict(name, tuple(ratios), tuple(again.get(name, ())) if name in doubtful else ())
        for name, ratios in first.items()
    ]


def _ratios(measure: Callable[[Side], Figures], old: Side, new: Side, pairs: int, label: str) -> dict[str, list[float]]:
    ratios: dict[str, list[float]] = {}
    with click.progressbar(length=pairs, label=label, file=sys.stderr) as bar:
        for number in range(pairs):
            order = (old, new) if number % 2 == 0 else (new, old)
            seen = {side.name: measure(side) for side in order}
            for name, value in seen[new.name].items():
                base = seen[old.name].get(name)
                if base:
                    ratios.setdefault(name, []).append(value / base)
            bar.update(1)
    return ratios


def micro_figures(side: Side) -> Figures:
    """Least nanoseconds by case, measured in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.micro", str(_MICRO_REPEATS)],
        cwd=side.folder,
        env={**os.environ, **dict(side.env)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise StartError(f"the microbenchmarks of {side.name} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def turn_figures(target: Target) -> Callable[[Side], Figures]:
    """CPU per turn of a fresh server. (Its overhead is printed by `bench e2e`; a p50 of 1 ms is all noise here.)"""

    def measure(side: Side) -> Figures:
        with stack(target.with_env(**dict(side.env)).at(side.folder), FakeConfig()) as up:
            result = uvloop.run(run_plan(up, _TURNS, side.name))
        if sum(result.failures.values()) * 100 > len(result.turns):
            raise StartError(f"turns of {side.name} failed: {result.failures}")
        return {"CPU per turn": result.cpu_ms_per_turn.median}

    return measure


@contextlib.contextmanager
def trees(base: str) -> Iterator[tuple[Side, Side, str]]:
    """The base commit's code and the work tree's as two sides under one harness.

    Raises ClickException without git history.
    """
    commit = _git("merge-base", "HEAD", base) if base else _default_base()
    with tempfile.TemporaryDirectory(prefix="bench-gate-") as folder:
        archive = subprocess.run(
            ["git", "archive", commit, "orchestrator"], cwd=_ROOT, capture_output=True, check=False
        )
        if archive.returncode:
            raise click.ClickException(f"git archive: {archive.stderr.decode().strip()}")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(Path(folder) / "code", filter="data")
        old = _side("base", Path(folder), Path(folder) / "code" / "orchestrator")
        yield old, _side("this", Path(folder), _copy(Path(folder) / "this")), commit


def _copy(folder: Path) -> Path:
    """A copy of the work tree's code: both sides are loaded from fresh files alike."""
    shutil.copytree(_ROOT / "orchestrator", folder / "orchestrator", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "orchestrator"


def _side(name: str, folder: Path, code: Path) -> Side:
    """A folder to run from, with this tree's harness and the given code."""
    view = folder / f"view-{name}"
    view.mkdir()
    (view / "bench").symlink_to(_ROOT / "bench")
    (view / "orchestrator").symlink_to(code)
    return Side(name, view)


def _default_base() -> str:
    """Where this commit branched off the main branch; on that branch itself, the commit before."""
    head = _git("rev-parse", "HEAD")
    for branch in ("origin/main", "main"):
        with contextlib.suppress(click.ClickException):
            base = _git("merge-base", "HEAD", branch)
            if base != head:
                return base
    return _git("rev-parse", "HEAD~1")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def show(verdicts: Sequence[Verdict], title: str) -> bool:
    """Prints the outcome; True where nothing failed."""
    rows = [
        [
            verdict.figure,
            f"{verdict.ratio:.3f}",
            f"{min(verdict.first):.3f}–{max(verdict.first):.3f}",
            f"{statistics.median(verdict.again):.3f}" if verdict.again else "",
            "SLOWER" if verdict.failed else "ok",
        ]
        for verdict in verdicts
    ]
    report.table(("figure", "new/old", "range", "again", ""), rows, title=title)
    return not any(verdict.failed for verdict in verdicts)


def run(target: Target, base: str, *, turns: bool) -> bool:
    """Compares the work tree with its base; True if it is not clearly slower."""
    with trees(base) as (old, new, commit):
        verdicts = compare(micro_figures, old, new, MICRO_PAIRS, "microbenchmarks")
        if turns:
            verdicts += compare(turn_figures(target), old, new, TURN_PAIRS, "turns")
    passed = show(verdicts, f"This tree against {commit[:10]}")
    report.save("gate", {"base": commit, "passed": passed, "verdicts": [_json(v) for v in verdicts]})
    return passed


def _json(verdict: Verdict) -> dict[str, Any]:
    return {
        "figure": verdict.figure,
        "ratio": verdict.ratio,
        "first": verdict.first,
        "again": verdict.again,
        "failed": verdict.failed,
    }


def prove(target: Target, *, rounds: int, turns: bool) -> bool:
    """Two equal builds must pass `rounds` times in a row, and one made 20 % slower must be caught."""
    with tempfile.TemporaryDirectory(prefix="bench-gate-") as folder:
        old, new = (_side(name, Path(folder), _copy(Path(folder) / name)) for name in ("old", "new"))
        outcome = _prove_micro(old, new, rounds)
        if turns:
            outcome["turns"] = _prove_turns(target, old, new)
    good = outcome["proved"] and outcome.get("turns", outcome)["proved"]
    report.save("gate-proof", outcome)
    return bool(good)


def _prove_micro(old: Side, new: Side, rounds: int) -> dict[str, Any]:
    passes = 0
    highest = 0.0
    for number in range(1, rounds + 1):
        verdicts = compare(micro_figures, old, new, MICRO_PAIRS, f"equal builds {number}/{rounds}")
        passes += not any(verdict.failed for verdict in verdicts)
        highest = max(highest, *(verdict.ratio for verdict in verdicts))
    report.note(f"equal builds passed {passes} of {rounds} times; highest median ratio {highest:.3f}")
    slowed = replace(new, env=((SLOWDOWN_VARIABLE, "0.2"),))
    caught = compare(micro_figures, old, slowed, MICRO_PAIRS, "slowed by 20 %")
    show(caught, "Injected slowdown of 20 %, microbenchmarks")
    report.note(f"slowdown caught in {sum(v.failed for v in caught)} of {len(caught)} figures")
    return {
        "rounds": rounds,
        "passes": passes,
        "highest_ratio": highest,
        "injected": [_json(v) for v in caught],
        "proved": passes == rounds and all(verdict.failed for verdict in caught),
    }


def _prove_turns(target: Target, old: Side, new: Side) -> dict[str, Any]:
    equal = compare(turn_figures(target), old, new, TURN_PAIRS, "equal builds, turns")
    dragged = replace(new, env=(("PYTHONPATH", str(_DRAG)), (SLOWDOWN_VARIABLE, "0.2")))
    slowed = compare(turn_figures(target), old, dragged, TURN_PAIRS, "slowed by 20 %, turns")
    passed = show(equal, "Equal builds, turns")
    caught = not show(slowed, "Injected slowdown of 20 %, turns")
    return {
        "equal": [_json(v) for v in equal],
        "injected": [_json(v) for v in slowed],
        "proved": passed and caught,
    }
