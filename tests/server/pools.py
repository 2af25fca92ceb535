"""A real pool in processes of its own, for tests: started, asked, and stopped without a trace."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 20.0
STOP_SECONDS = 15.0

_FAKE_CONFIG = """
import os
from orchestrator.server.pool import gunicorn_config
from {module} import {name}
globals().update(gunicorn_config(os.environ, {name}))
"""


class RunningPool:
    """One `gunicorn -c …` process with its workers."""

    def __init__(self, process: subprocess.Popen[bytes], log_file: Path) -> None:
        self.process = process
        self.log_file = log_file
        self.port = 0
        self._seen: set[int] = set()

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/orchestrate"

    def wait_ready(self) -> None:
        """Until the pool says that it listens; its port is known then."""

        def listening() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the pool ended with {self.process.returncode}:\n{self.log}")
            found = re.search(r"listening on http://[^\s]*:(\d+)", self.log)
            if found:
                self.port = int(found[1])
            return bool(found)

        until(listening, START_SECONDS, lambda: f"the pool does not listen:\n{self.log}")
        self.workers()

    def workers(self) -> list[int]:
        """The workers' process ids, in the order of their start."""
        pid = self.process.pid
        with contextlib.suppress(OSError):
            children = [int(part) for part in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            self._seen.update(children)
            return children
        return []

    def ask(self, path: str, method: str = "GET", headers: str = "") -> tuple[int, dict[str, str], bytes]:
        """One HTTP request: status, headers (names in lower case), body."""
        request = f"{method} {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n"
        return parse_response(self.exchange(request.encode()))

    def exchange(self, data: bytes, timeout: float = 10.0) -> bytes:
        """Send bytes on a connection of their own and read until the server ends it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as client:
            client.sendall(data)
            answer = b""
            while chunk := client.recv(65536):
                answer += chunk
            return answer

    def stop(self) -> int:
        """SIGTERM, then, where that does not help, SIGKILL for this pool's processes; the exit code."""
        self.workers()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.workers()
                self.process.kill()
                self.process.wait()
        for pid in self._seen:
            if is_child_of_a_pool(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return self.process.returncode


def is_child_of_a_pool(pid: int) -> bool:
    """Whether process `pid` runs and is a gunicorn process."""
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and b"gunicorn" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def until(true: Callable[[], bool], seconds: float, why: Callable[[], str] | str) -> None:
    """Wait until `true()`; fail with `why` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(why if isinstance(why, str) else why())
        time.sleep(0.02)


def parse_response(raw: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, body


def spawn_pool(
    directory: Path, env: Mapping[str, str], workers: int, compose: str | None, arguments: tuple[str, ...] = ()
) -> RunningPool:
    """Start a pool without waiting for it. `compose` is `module:function`; None is the real conversation layer."""
    config = ROOT / "gunicorn.conf.py"
    if compose is not None:
        module, _, name = compose.partition(":")
        config = directory / "gunicorn_for_test.conf.py"
        config.write_text(_FAKE_CONFIG.format(module=module, name=name))
    environment = {
        "PATH": os.environ["PATH"],
        "HOST": "127.0.0.1",
        "PORT": "0",
        "WEB_CONCURRENCY": str(workers),
        "PYTHONPATH": str(ROOT),
        **env,
    }
    log_file = directory / f"pool-{time.monotonic_ns()}.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "gunicorn"), "-c", str(config), *arguments],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return RunningPool(process, log_file)


@contextlib.contextmanager
def pools(directory: Path) -> Iterator[Callable[..., RunningPool]]:
    """A function that starts pools; all of them are stopped at the end."""
    running: list[RunningPool] = []

    def start(
        env: Mapping[str, str] | None = None,
        workers: int = 1,
        *,
        compose: str | None = None,
        arguments: tuple[str, ...] = (),
        wait: bool = True,
    ) -> RunningPool:
        pool = spawn_pool(directory, env or {}, workers, compose, arguments)
        running.append(pool)
        if wait:
            pool.wait_ready()
        return pool

    try:
        yield start
    finally:
        for pool in running:
            pool.stop()
