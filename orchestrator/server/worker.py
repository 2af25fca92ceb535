"""The worker process: gunicorn's worker class, and the life of one worker from the fork to its exit.

Nothing external is needed to start: gunicorn halts the whole pool when a worker fails while it boots.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import uvloop
from gunicorn.workers.base import Worker  # type: ignore[import-untyped]  # gunicorn has no types

from orchestrator.errors import SettingsError
from orchestrator.server.entry import HEAD_TIMEOUT_S, Entry
from orchestrator.server.http import MetricsPage
from orchestrator.server.hub import Hub, Shared
from orchestrator.telemetry.prometheus import PrometheusObserver, use_directory

if TYPE_CHECKING:
    from orchestrator.server.pool import Pool

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
IGNORED_SIGNALS: Final = (
    signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGTTIN, signal.SIGTTOU,
)  # fmt: skip
CLOSE_SERVICE_RESTART: Final = 1012
RECONNECT_AFTER_MS: Final = 250
TEND_S: Final = 0.25
CLOSE_S: Final = (1.0, 5.0)
CLOSE_AT_ONCE_S: Final = (0.3, 0.8)
"""Bounds for the closing handshakes and for the sessions' close; at once is within gunicorn's two seconds for that."""

TASKS_CLOSE_S: Final = 0.5
FORCED_EXIT_S: Final = 12.0
FORCED_EXIT_AT_ONCE_S: Final = 1.8
FORCED_EXIT_AFTER_LOOP_S: Final = 1.0
"""A name lookup that hangs in a thread, or a task that will not be cancelled, must not keep a worker from its end."""

RESTART_PAUSE_S: Final = 1.0
"""A worker that cannot start is replaced at once: this keeps a broken one from eating the machine."""

COMPOSE_TIMEOUT_S: Final = 10.0
SWITCH_INTERVAL_S: Final = 0.0005

BOOT_ERROR: Final = 3
"""gunicorn's exit code for a worker that must not be replaced: the pool stops."""

log = logging.getLogger(__name__)


class OrchestratorWorker(Worker):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's side of a worker. `pool` and `slot` are given before the fork."""

    pool: Pool
    slot: int | None = None
    signals_before_boot: queue.SimpleQueue[int] | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.early_signals: list[int] = []

    def init_signals(self) -> None:
        """Note stop signals until the event loop takes them over, also those that came between fork and here."""
        for ignored in IGNORED_SIGNALS:
            signal.signal(ignored, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for stop in STOP_SIGNALS:
            signal.signal(stop, self._note_signal)
        # gunicorn sends SIGABRT to a worker whose loop hangs: say where.
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        faulthandler.enable()
        if self.signals_before_boot is not None:
            with contextlib.suppress(queue.Empty):
                while True:
                    number = self.signals_before_boot.get_nowait()
                    if number in STOP_SIGNALS:
                        self.early_signals.append(number)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.early_signals.append(number)

    def run(self) -> None:
        """Serve until told to stop."""
        if self.slot is None:
            log.error("no slot is free for another worker")
            time.sleep(RESTART_PAUSE_S)
            return
        loop = uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(Life(self, self.pool, self.slot, loop).run())
        except SettingsError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(BOOT_ERROR)
        except Exception:
            log.exception("the worker of slot %d failed", self.slot)
            time.sleep(RESTART_PAUSE_S)
            sys.exit(1)
        finally:
            asyncio.set_event_loop(None)
            force_exit_after(FORCED_EXIT_AFTER_LOOP_S, self.slot)
            loop.close()


def force_exit_after(seconds: float, slot: int) -> None:
    """End the process `seconds` from now, unless it has ended by itself."""

    def end() -> None:
        log.warning("the worker of slot %d does not end: something outside the event loop hangs", slot)
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


class Life:
    """One worker, from the fork to its exit."""

    def __init__(self, worker: OrchestratorWorker, pool: Pool, slot: int, loop: asyncio.AbstractEventLoop) -> None:
        self._worker = worker
        self._pool = pool
        self._slot = slot
        self._loop = loop
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()
        self._interrupts = 0
        self._tender: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Start, serve, drain, go."""
        pool, table = self._pool, self._pool.table
        table.keep_only(self._slot)
        table.start(self._slot, os.getpid(), time.monotonic_ns())
        self._take_over_signals()
        self._tend()
        # A scrape runs in a thread: it must not keep the loop from the interpreter for the usual 5 ms at a time.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        use_directory(pool.metrics_directory, self._slot)
        observer = PrometheusObserver()
        metrics = MetricsPage(pool.metrics_directory, table)
        shared = Shared(pool.settings, table, self._slot, pool.authenticator, pool.assets, metrics)
        hub = Hub(shared, observer, self._loop)
        compose = pool.compose(pool.settings, self._slot, observer, self._loop)
        hub.sessions = await asyncio.wait_for(compose, COMPOSE_TIMEOUT_S)
        hub.start_heartbeat()
        hub.start_receiving()
        listeners = [
            await self._loop.create_server(partial(Entry, hub), sock=listener.sock, backlog=self._worker.cfg.backlog)
            for listener in self._worker.sockets
        ]
        hub.collector.start()
        table.go_live(self._slot, time.monotonic_ns())
        if table.claim_announcement():
            log.info("listening on %s", ", ".join(str(listener) for listener in self._worker.sockets))
        try:
            await self._stop.wait()
            await self._drain(hub)
        finally:
            await self._go(hub, listeners)

    # Signals and the parent.

    def _take_over_signals(self) -> None:
        for number in STOP_SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal, number)
        for early in self._worker.early_signals:
            self._on_signal(early)

    def _on_signal(self, number: int) -> None:
        """SIGTERM drains, however often it comes; SIGQUIT, or SIGINT for the second time, ends at once."""
        if number == signal.SIGINT:
            self._interrupts += 1
        if number == signal.SIGQUIT or self._interrupts > 1:
            self._at_once.set()
        self._stop.set()

    def _tend(self) -> None:
        """Tell gunicorn that the loop runs, and look whether gunicorn still does."""
        self._worker.notify()
        if os.getppid() != self._worker.ppid and not self._at_once.is_set():
            log.error("the pool's parent is gone: the worker of slot %d ends", self._slot)
            self._pool.remove_metrics_directory()
            self._at_once.set()
            self._stop.set()
        self._tender = self._loop.call_later(TEND_S, self._tend)

    # The end.

    async def _drain(self, hub: Hub) -> None:
        """Let every session come to its next IDLE, for at most DRAIN_TIMEOUT_SECONDS.

        Connections are accepted meanwhile: those of other slots are handed over as ever, and when the whole pool is
        going the answer is 503 rather than a refused connection.
        """
        self._pool.table.go_draining(self._slot, time.monotonic_ns())
        hub.draining = True
        if self._at_once.is_set():
            return
        log.info("slot %d drains %d sessions", self._slot, len(hub.connections))
        hub.sessions.drain(RECONNECT_AFTER_MS)
        await self._first_of(hub.no_connections, self._at_once, timeout=self._pool.settings.drain_timeout_seconds)

    async def _go(self, hub: Hub, listeners: list[asyncio.Server]) -> None:
        force_exit_after(FORCED_EXIT_AT_ONCE_S if self._at_once.is_set() else FORCED_EXIT_S, self._slot)
        for listener in listeners:
            listener.close()
        for connection in list(hub.connections.values()):
            connection.close(CLOSE_SERVICE_RESTART, "the worker is going")
        await self._first_of(hub.heads.none, self._at_once, timeout=HEAD_TIMEOUT_S + 0.5)
        hub.stop_receiving()
        while hub.receive_handed():
            pass
        handshakes, limit = CLOSE_AT_ONCE_S if self._at_once.is_set() else CLOSE_S
        # A client that has not read our close frame must not find its connection reset.
        await self._first_of(hub.transports.none, timeout=handshakes)
        try:
            await asyncio.wait_for(hub.sessions.close(), limit)
        except TimeoutError:
            log.warning("slot %d: sessions were not closed within %g s", self._slot, limit)
        await hub.finish_tasks(TASKS_CLOSE_S)
        hub.stop_heartbeat()
        hub.metrics.close()
        if self._tender is not None:
            self._tender.cancel()

    async def _first_of(self, *events: asyncio.Event, timeout: float) -> None:
        """Wait until one of `events` is set, for at most `timeout` seconds."""
        waits = [self._loop.create_task(event.wait()) for event in events]
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
