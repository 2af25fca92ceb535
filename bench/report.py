"""What a benchmark leaves behind: a table on the terminal, JSON and a picture in bench/results/."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import orjson

RESULTS = Path(__file__).parent / "results"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Prints columns, the first flush left and the others flush right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    if title:
        click.echo(f"\n{title}")
    for row in (headings, ["─" * width for width in widths], *rows):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def note(text: str) -> None:
    """One line under a table."""
    click.echo(f"  {text}")


def verdict(label: str, value: float, bar: float, unit: str, *, at_least: bool = False) -> dict[str, Any]:
    """Prints one measured figure against its bar; returns it for the JSON."""
    met = value >= bar if at_least else value <= bar
    sign = "≥" if at_least else "≤"
    click.echo(f"  {'met   ' if met else 'MISSED'}  {label}: {value:.2f} {unit} (bar {sign} {bar:g} {unit})")
    return {"label": label, "value": value, "bar": bar, "unit": unit, "at_least": at_least, "met": bool(met)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS.parent
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def save(name: str, data: Mapping[str, Any]) -> Path:
    """Writes bench/results/<name>.json with the machine's description; returns the path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {"benchmark": name, "machine": machine(), **data}
    path.write_bytes(orjson.dumps(whole, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))
    click.echo(f"  written: {_shown(path)}")
    return path


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def picture(name: str, draw: Any) -> Path | None:
    """Draws bench/results/<name>.png with `draw(figure)`; None, said on the terminal, without matplotlib."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib.figure import Figure
    except ImportError:
        click.echo("  no picture: matplotlib is not installed (extra `bench`)")
        return None
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    draw(figure)
    path = RESULTS / f"{name}.png"
    figure.savefig(path)
    click.echo(f"  written: {_shown(path)}")
    return path
