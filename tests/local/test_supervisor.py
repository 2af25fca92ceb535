"""The supervisor without models: what stops a start, and with which line."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.local import stack as stack_module
from orchestrator.local.errors import LocalStackError, load_module, package_folder
from orchestrator.local.stack import LocalStack, PartExit, log_tail
from tests.conftest import FREE_PORTS


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra were there; these tests never load a model."""
    monkeypatch.setattr(stack_module, "missing_packages", lambda _modules: [])


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def start(stack: LocalStack) -> None:
    asyncio.run(stack.start(lambda _line: None))


@pytest.mark.usefixtures("installed")
def test_a_port_that_is_taken_is_one_line_and_nothing_is_started(tmp_path: Path, taken_port: int) -> None:
    stack = LocalStack(tmp_path / "run", replace(FREE_PORTS, rag=taken_port))
    children = set(psutil.Process().children())
    with pytest.raises(LocalStackError) as caught:
        start(stack)
    assert str(caught.value) == (
        f"port {taken_port} on 127.0.0.1 for the rag service cannot be used (Address already in use): "
        "stop the program that holds it or choose another port"
    )
    assert isinstance(caught.value, OrchestratorError)
    assert set(psutil.Process().children()) == children
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("port", [-1, 70_000])
def test_a_port_that_is_none_is_one_line(tmp_path: Path, port: int) -> None:
    with pytest.raises(LocalStackError, match=rf"^port {port} on 127\.0\.0\.1 for the tts service cannot be used"):
        start(LocalStack(tmp_path, replace(FREE_PORTS, tts=port)))


def test_without_the_extra_the_line_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module, "_MODULES", ("json", "no_such_voice", "no_such_ear"))
    with pytest.raises(LocalStackError) as caught:
        start(LocalStack(tmp_path, FREE_PORTS))
    assert str(caught.value) == (
        "the local stack needs no_such_voice, no_such_ear (not installed): "
        "pip install 'statemanager-orchestrator[local]'"
    )


def test_a_missing_module_or_folder_is_the_same_line() -> None:
    for load in (load_module, package_folder):
        with pytest.raises(LocalStackError, match=r"needs no_such_voice.*statemanager-orchestrator\[local\]"):
            load("no_such_voice")


@pytest.mark.usefixtures("installed")
def test_a_service_that_cannot_start_is_named_with_its_own_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = tmp_path / "failing"
    failing.write_text(f"#!{sys.executable}\nimport sys\nprint('first')\nprint('no model for', sys.argv[2][19:])\n")
    failing.chmod(0o755)
    monkeypatch.setattr(stack_module.sys, "executable", str(failing))
    stack = LocalStack(tmp_path / "run", FREE_PORTS)
    with pytest.raises(
        LocalStackError, match=r"^the local (\w+) service ended while it started: no model for \1 \(log: "
    ):
        start(stack)
    assert stack.pids == {}


@pytest.mark.usefixtures("installed")
def test_a_start_that_takes_too_long_or_is_cancelled_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeping = tmp_path / "sleeping"
    sleeping.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeping.chmod(0o755)
    monkeypatch.setattr(stack_module.sys, "executable", str(sleeping))
    children = set(psutil.Process().children())
    stack = LocalStack(tmp_path / "run", FREE_PORTS, start_timeout_s=0.2)
    with pytest.raises(LocalStackError, match=r"^not ready after 0\.2 s: stt, intent, rag, llm, tts \(logs in "):
        start(stack)

    async def cancel_it() -> None:
        task = asyncio.ensure_future(LocalStack(tmp_path / "run", FREE_PORTS).start(lambda _line: task.cancel()))
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_it())
    assert set(psutil.Process().children()) == children


def test_stop_without_start_is_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        stack = LocalStack(tmp_path)
        await stack.stop()
        await stack.stop()

    asyncio.run(main())


def test_an_exit_is_told_in_words() -> None:
    assert str(PartExit("rag", -9, "")) == "the local rag service ended (signal SIGKILL)"
    assert str(PartExit("tts", 1, "")) == "the local tts service ended (exit code 1)"


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_tail(log) == ""
    log.write_text("\n".join(str(number) for number in range(5000)))
    assert log_tail(log).splitlines() == [str(number) for number in range(4988, 5000)]


def run_service(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"orchestrator.local.{name}", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_service_alone_says_in_one_line_that_its_port_is_taken(taken_port: int) -> None:
    pytest.importorskip("numpy")
    done = run_service("intent", "--port", str(taken_port))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"intent: port {taken_port} on 127.0.0.1 for the intent service cannot be used (Address already in use): "
        "stop the program that holds it or choose another port"
    ]


def test_a_wrong_option_is_one_line() -> None:
    pytest.importorskip("numpy")
    done = run_service("stt", "--endpoint-ms", "soon")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("'soon' is not a number from 130 to 5000")


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is not None, reason="the optional model is installed")
def test_the_optional_model_says_in_one_line_what_it_needs() -> None:
    pytest.importorskip("numpy")
    done = run_service("llm", "--engine", "smollm2", "--port", "0")
    assert done.returncode == 1
    assert re.fullmatch(r"llm: the smollm2 engine needs xllamacpp.* \(not installed\): pip install .*\n", done.stderr)


def test_a_service_whose_supervisor_is_gone_does_not_start() -> None:
    pytest.importorskip("numpy")
    done = run_service("intent", "--port", "0", "--parent", str(os.getpid() + 1))
    assert done.returncode == 1
    assert "ended before the service had started" in done.stderr
    assert done.stdout == ""
