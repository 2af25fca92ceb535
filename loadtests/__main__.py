"""`python -m loadtests`: fakes, store and server up, Locust against them, everything down again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from bench.fakes import FakeConfig, FakeProcess
from bench.sut import ORCHESTRATOR, Server, StartError, Store

_HERE = Path(__file__).parent


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--users", default=60, show_default=True, type=click.IntRange(1, 5000))
@click.option("--spawn-rate", default=20.0, show_default=True, help="users started per second")
@click.option("--seconds", default=60, show_default=True, type=click.IntRange(5))
@click.option("--workers", default=0, help="WEB_CONCURRENCY of the server; default: cores")
@click.option("--host", default="", help="test this server (http://…) instead of starting one")
@click.option("--ui", is_flag=True, help="Locust's web page instead of a headless run")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(users: int, spawn_rate: float, seconds: int, workers: int, host: str, ui: bool, more: tuple[str, ...]) -> None:
    """Runs the load test; arguments after `--` go to Locust (its limits: `-- --limit-first-audio-p99 445`).

    The exit code is 0 if all limits were kept, 2 if one was broken.
    """
    if host:
        raise SystemExit(_locust(host, users, spawn_rate, seconds, ui, more))
    cpus = frozenset(os.sched_getaffinity(0))
    try:
        with FakeProcess(FakeConfig(keep_requests=0)) as fakes, Store(cpus) as store:
            env = {**fakes.env, "REDIS_URL": store.url}
            with Server(ORCHESTRATOR, env, cpus, workers=workers or len(cpus)) as server:
                address = f"http://{server.host}:{server.port}"
                code = _locust(address, users, spawn_rate, seconds, ui, more)
    except StartError as error:
        raise click.ClickException(str(error)) from None
    raise SystemExit(code)


def _locust(host: str, users: int, spawn_rate: float, seconds: int, ui: bool, more: tuple[str, ...]) -> int:
    command = [
        sys.executable, "-m", "locust", "-f", str(_HERE / "locustfile.py"), "--host", host,
        "-u", str(users), "-r", str(spawn_rate), "--results", str(_HERE / "results" / "latest.json"),
    ]  # fmt: skip
    if not ui:
        command += ["--headless", "-t", f"{seconds}s", "--only-summary"]
    root = str(_HERE.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    try:
        return subprocess.run([*command, *more], check=False, env={**os.environ, "PYTHONPATH": path}).returncode
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    main()
