"""How the real stack ends: asked to, by the death of a part, by the death of its supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.local.stack import LocalStack
from tests.conftest import FREE_PORTS

pytestmark = pytest.mark.local_stack

SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from orchestrator.local.stack import LocalPorts, LocalStack

async def main():
    stack = LocalStack(Path(sys.argv[1]), LocalPorts(0, 0, 0, 0, 0))
    await stack.start(lambda line: None)
    print(*stack.pids.values(), flush=True)
    await stack.wait_for_exit()

asyncio.run(main())
"""


def test_a_part_that_dies_is_named_and_stop_leaves_nothing(tmp_path: Path) -> None:
    lines: list[str] = []

    async def main() -> list[int]:
        stack = LocalStack(tmp_path, FREE_PORTS)
        await stack.start(lines.append)
        pids = stack.pids
        watching = asyncio.ensure_future(stack.wait_for_exit())
        await asyncio.sleep(0)
        os.kill(pids["rag"], signal.SIGKILL)
        exit_of = await asyncio.wait_for(watching, 10)
        assert str(exit_of) == "the local rag service ended (signal SIGKILL)"
        assert "listening on" in exit_of.log_tail
        await stack.stop()
        await stack.stop()
        return list(pids.values())

    pids = asyncio.run(main())
    assert len(pids) == 5
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert lines[0].startswith("starting stt, intent, rag, llm, tts")
    assert sorted(line.split()[0] for line in lines[1:-1]) == ["intent", "llm", "rag", "stt", "tts"]
    assert lines[-1].startswith("all services healthy after")


def test_all_parts_die_with_their_supervisor(tmp_path: Path) -> None:
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with supervisor:
        assert supervisor.stdout is not None
        parts = [psutil.Process(int(pid)) for pid in supervisor.stdout.readline().split()]
        supervisor.kill()
    assert len(parts) == 5
    _, alive = psutil.wait_procs(parts, timeout=5)
    assert alive == []
