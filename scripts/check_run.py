"""Runs `make run` as a person at a terminal would: waits until it says ready, asks /health, presses Ctrl-C.

Exits with 0 when the server answered, make ended with 0 within the limit and left no process behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import IO

READY_SECONDS = 600.0
STOP_SECONDS = 20.0


def main() -> int:
    """The check; 0 when all is well."""
    make = subprocess.Popen(
        ["make", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore SIGINT, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert make.stdout is not None
    problems = []
    if _wait_until_ready(make.stdout):
        port = os.environ.get("PORT", "8004")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            health = json.load(answer)
        _say(f"/health: {health}")
        if health["status"] != "healthy":
            problems.append(f"the server is {health['status']}")
    else:
        problems.append("`make run` was not ready")
    began = time.monotonic()
    os.killpg(make.pid, signal.SIGINT)
    try:
        rest, _ = make.communicate(timeout=STOP_SECONDS)
        _say(rest.rstrip())
        if "***" in rest:
            problems.append("make complained after Ctrl-C")
    except subprocess.TimeoutExpired:
        problems.append(f"it was still there {STOP_SECONDS:g} s after Ctrl-C")
        os.killpg(make.pid, signal.SIGKILL)
    if make.returncode not in (0, -signal.SIGINT):
        problems.append(f"make ended with {make.returncode}")
    problems += [f"left running: {line}" for line in _processes_here()]
    _say(f"ended {time.monotonic() - began:.1f} s after Ctrl-C")
    for problem in problems:
        _say(f"PROBLEM: {problem}")
    return 1 if problems else 0


def _wait_until_ready(output: IO[str]) -> bool:
    deadline = time.monotonic() + READY_SECONDS
    for line in output:
        _say(line.rstrip())
        if line.startswith("Ctrl-C stops everything"):
            return True
        if time.monotonic() > deadline:
            return False
    return False


def _processes_here() -> list[str]:
    """Command lines of the processes that run out of this folder's virtual environment."""
    ours = str(Path(".venv").resolve())
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if ours in command:
            found.append(f"{folder.name} {command}")
    return found


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
