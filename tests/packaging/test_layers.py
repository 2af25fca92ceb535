"""The contracts on imports hold (lint says so) and can be broken: each kind of forbidden import is caught."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.packaging.project import copy_source, tool

FORBIDDEN = (
    ("core/ring.py", "import asyncio", "orchestrator.core.ring -> asyncio"),
    ("core/fsm.py", "from time import monotonic", "orchestrator.core.fsm -> time"),
    (
        "conversation/prompt.py",
        "from orchestrator.server import head",
        "conversation.prompt -> orchestrator.server.head",
    ),
    ("downstream/types.py", "from orchestrator.store import record", "downstream.types -> orchestrator.store.record"),
    ("server/head.py", "from orchestrator.local import audio", "server.head -> orchestrator.local.audio"),
    (
        "store/record.py",
        "from orchestrator.telemetry import prometheus",
        "store.record -> orchestrator.telemetry.prometheus",
    ),
    ("conversation/pacing.py", "import aiohttp", "orchestrator.conversation.pacing -> aiohttp"),
)


def test_forbidden_imports_are_caught(tmp_path: Path) -> None:
    project = copy_source(tmp_path / "project", "orchestrator", "bench", "loadtests", "pyproject.toml")
    for file, line, _ in FORBIDDEN:
        with (project / "orchestrator" / file).open("a", encoding="utf-8") as module:
            module.write(f"\n{line}\n")
    (project / "orchestrator" / "sidedoor.py").write_text("", encoding="utf-8")
    done = subprocess.run(
        [tool("lint-imports"), "--no-logo", "--no-cache"], cwd=project, capture_output=True, text=True, check=False
    )
    report = " ".join(done.stdout.split())
    assert done.returncode == 1, report
    for _, _, chain in FORBIDDEN:
        assert chain in report, chain
    assert "not listed as layers: - orchestrator.sidedoor" in report
