"""The pool of workers: what `gunicorn.conf.py` and `orchestrator serve` configure, and gunicorn's hooks.

Everything that all workers share is made here, in the arbiter, before the first fork.
"""

from __future__ import annotations

import atexit
import errno
import logging
import math
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from gunicorn import sock as gunicorn_sockets  # type: ignore[import-untyped]  # gunicorn has no types
from gunicorn import systemd
from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]  # gunicorn has no types
from gunicorn.glogging import Logger  # type: ignore[import-untyped]  # gunicorn has no types

from orchestrator.errors import SettingsError
from orchestrator.server.auth import Authenticator
from orchestrator.server.http import Asset, load_assets
from orchestrator.server.slots import MAX_WORKERS, SlotTable
from orchestrator.settings import Settings, load_settings
from orchestrator.telemetry import logs, prometheus
from orchestrator.telemetry.observer import Observer

if TYPE_CHECKING:
    import asyncio

    from orchestrator.conversation.registry import Sessions

BAD_SETTINGS_EXIT: Final = 2
CANNOT_LISTEN_EXIT: Final = 1
BACKLOG: Final = 2048
WORKER_TIMEOUT_S: Final = 15
"""A worker whose loop hangs for this long is killed and replaced."""

DRAIN_MARGIN_S: Final = 14
"""Between a worker's own end of its drain and the arbiter's SIGKILL."""

CONSOLE_DIRECTORY: Final = Path(__file__).parent / "console"
SHARED_MEMORY: Final = Path("/dev/shm")

log = logging.getLogger(__name__)

Compose = Callable[[Settings, int, Observer, "asyncio.AbstractEventLoop"], Awaitable["Sessions"]]


def wsgi(environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """What gunicorn loads; answers only when somebody took the worker class away."""
    start_response("500 Internal Server Error", [("Content-Type", "text/plain; charset=utf-8")])
    return [b"the orchestrator needs its own worker class: start it with -c gunicorn.conf.py and no -k\n"]


class PoolLogger(Logger):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's log lines go where ours go, in the same format."""

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg
        self._access_log_enabled = False
        for logger in (self.error_log, self.access_log):
            logger.handlers.clear()
            logger.propagate = True
            logger.setLevel(logging.NOTSET)


class Pool:
    """What the arbiter holds for its workers. Made when the configuration is read, filled by `on_starting`."""

    table: SlotTable
    compose: Compose
    authenticator: Authenticator
    metrics_directory: str

    def __init__(self, settings: Settings, compose: Compose | None) -> None:
        self.settings = settings
        self.assets: dict[str, Asset] = {}
        self.started = False
        self._compose = compose
        self._arbiter_pid = 0

    def configure(self, settings: Settings) -> dict[str, Any]:
        """gunicorn's configuration. After a reload, new workers get these settings."""
        self.settings = settings
        logs.configure(settings)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        memory = str(SHARED_MEMORY) if os.access(SHARED_MEMORY, os.W_OK) else None
        return {
            "bind": [f"{host}:{settings.port}"],
            "workers": settings.web_concurrency,
            "worker_class": "orchestrator.server.worker.OrchestratorWorker",
            "wsgi_app": "orchestrator.server.pool:wsgi",
            "preload_app": True,
            "backlog": BACKLOG,
            "timeout": WORKER_TIMEOUT_S,
            "graceful_timeout": math.ceil(settings.drain_timeout_seconds) + DRAIN_MARGIN_S,
            "logger_class": "orchestrator.server.pool.PoolLogger",
            "loglevel": settings.log_level.lower(),
            "control_socket_disable": True,
            "worker_tmp_dir": memory,
            "proc_name": "orchestrator",
            "on_starting": self.on_starting,
            "nworkers_changed": self.nworkers_changed,
            "pre_fork": self.pre_fork,
            "post_fork": self.post_fork,
            "child_exit": self.child_exit,
            "on_exit": self.on_exit,
        }

    # gunicorn's hooks, in the order in which they are called.

    def nworkers_changed(self, server: Any, new: int, old: int | None) -> None:
        """SIGTTIN goes no further than the slot table does."""
        if new > MAX_WORKERS:
            log.warning("at most %d workers are started", MAX_WORKERS)
            server._num_workers = MAX_WORKERS

    def on_starting(self, server: Any) -> None:
        """In the arbiter, before it listens: make what all workers share. Ends the process on what cannot work."""
        self._arbiter_pid = os.getpid()
        if self.settings.otel_endpoint:
            log.warning(
                "OTEL_EXPORTER_OTLP_ENDPOINT=%r has no effect: this release exports no traces",
                self.settings.otel_endpoint,
            )
        try:
            self.authenticator = Authenticator(self.settings)
        except SettingsError as error:
            _exit_with(str(error), BAD_SETTINGS_EXIT)
        if not server.LISTENERS and not server.master_pid and not systemd.listen_fds(unset_environment=False):
            server.LISTENERS = _listen(server.cfg, server.log)
        _raise_file_limit()
        self.compose = self._compose if self._compose is not None else _load_compose()
        self.assets = load_assets(CONSOLE_DIRECTORY)
        now_ns = time.monotonic_ns()
        self.table = SlotTable(now_ns)
        self.table.reserve(server.num_workers, now_ns)
        parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
        self.metrics_directory = tempfile.mkdtemp(prefix="orchestrator-metrics-", dir=parent)
        os.environ[prometheus.DIRECTORY_VARIABLE] = self.metrics_directory
        atexit.register(self._at_exit)
        self.started = True

    def pre_fork(self, server: Any, worker: Any) -> None:
        """In the arbiter: give the next worker its slot."""
        worker.pool = self
        worker.slot = self.table.take(time.monotonic_ns())

    def post_fork(self, server: Any, worker: Any) -> None:
        """In the worker: signals that came before it handled any are in the arbiter's queue."""
        worker.signals_before_boot = server.SIG_QUEUE

    def child_exit(self, server: Any, worker: Any) -> None:
        """In the arbiter: the worker's slot is free, or waits for the worker that replaces a dead one."""
        if worker.slot is None:
            return
        on_purpose = self.table.release(worker.slot, time.monotonic_ns())
        prometheus.forget_gauges(self.metrics_directory, worker.slot)
        if not on_purpose:
            log.warning("the worker of slot %d died", worker.slot)

    def on_exit(self, server: Any) -> None:
        """In the arbiter, at its end."""
        self.remove_metrics_directory()

    def remove_metrics_directory(self) -> None:
        """Remove the workers' metric files; more calls do nothing."""
        shutil.rmtree(self.metrics_directory, ignore_errors=True)

    def _at_exit(self) -> None:
        if os.getpid() == self._arbiter_pid:
            self.remove_metrics_directory()


_pool: Pool | None = None


def gunicorn_config(environ: Mapping[str, str], compose: Compose | None = None) -> dict[str, Any]:
    """gunicorn's settings by name, for a configuration file. Read again on SIGHUP, for new workers.

    `compose` builds a worker's sessions; without it the real conversation layer is used. Settings that are not accepted
    end the process with one line on stderr, or are refused with one line in the log when the pool is running.
    """
    global _pool
    try:
        settings = load_settings(environ)
    except SettingsError as error:
        if _pool is None or not _pool.started:
            _exit_with(str(error), BAD_SETTINGS_EXIT)
        log.error("the new settings are refused: %s", error)
        settings = _pool.settings
    if _pool is None:
        _pool = Pool(settings, compose)
    return _pool.configure(settings)


def run(environ: Mapping[str, str], compose: Compose | None = None) -> NoReturn:
    """Run the pool in this process until it is told to stop, as `gunicorn -c gunicorn.conf.py` does. Never returns."""
    _Application(environ, compose).run()
    sys.exit(0)


class _Application(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    def __init__(self, environ: Mapping[str, str], compose: Compose | None) -> None:
        self._environ = environ
        self._compose = compose
        super().__init__()

    def load_config(self) -> None:
        for name, value in gunicorn_config(self._environ, self._compose).items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> Callable[..., Any]:
        return wsgi


def _load_compose() -> Compose:
    from orchestrator.server.compose import build_sessions

    return build_sessions


def _exit_with(line: str, code: int) -> NoReturn:
    sys.stderr.write(f"{logs.printable(line)}\n")
    sys.stderr.flush()
    sys.exit(code)


def _raise_file_limit() -> None:
    """A connection is a descriptor, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen(cfg: Any, logger: Any) -> list[Any]:
    """Listening sockets for the configuration's addresses; one that cannot be had is one line and the end."""
    descriptors = []
    for address in cfg.address:
        if not isinstance(address, tuple):
            return []
        host, port = address[0], address[1]
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
            bound.listen(BACKLOG)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                reason = "the port is already in use; stop what listens there or choose another PORT"
            _exit_with(f"HOST={host!r} PORT={port} cannot be listened on: {reason}", CANNOT_LISTEN_EXIT)
        descriptors.append(bound.detach())
    listeners: list[Any] = gunicorn_sockets.create_sockets(cfg, logger, descriptors)
    return listeners
