"""What the connections of one worker share: who owns a session, who is let in, the timers, the tasks, the heartbeat."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from orchestrator.core.ring import owner
from orchestrator.server import handoff
from orchestrator.server.auth import Authenticator, Grant
from orchestrator.server.collector import Collector
from orchestrator.server.entry import Entry
from orchestrator.server.head import ParsedHead, Refusal
from orchestrator.server.limits import PING_INTERVAL_S
from orchestrator.server.slots import HEARTBEAT_NS, SlotTable
from orchestrator.server.wheel import TimerWheel
from orchestrator.settings import Settings
from orchestrator.telemetry.observer import Observer

if TYPE_CHECKING:
    from orchestrator.conversation.registry import Sessions
    from orchestrator.server.connection import Connection
    from orchestrator.server.handoff import Handed
    from orchestrator.server.http import Asset, MetricsPage

HEARTBEAT_S: Final = HEARTBEAT_NS / 1e9
SHED_LAG_S: Final = 0.02
"""A loop this late, two beats in a row, does no optional work: speculation and hedges help who has time to spare."""

MAX_HOPS: Final = 3
HANDOFFS_PER_WAKE: Final = 64
RETRY_AFTER_S: Final = {"full": "5", "lag": "1", "draining": "2", "busy": "1"}
_PING_SPREAD: Final = 40

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shared:
    """What a worker brings from before the fork."""

    settings: Settings
    table: SlotTable
    slot: int
    authenticator: Authenticator
    assets: Mapping[str, Asset]
    metrics: MetricsPage


class Census:
    """How many of something there are; `none` is set while there is none."""

    __slots__ = ("count", "none")

    def __init__(self) -> None:
        self.count = 0
        self.none = asyncio.Event()
        self.none.set()

    def change(self, by: int) -> None:
        """One came (+1) or went (-1)."""
        self.count += by
        if self.count:
            self.none.clear()
        else:
            self.none.set()


class Hub:
    """One a worker, made after the fork. `sessions` is set once it is built, before the first connection."""

    sessions: Sessions

    def __init__(self, shared: Shared, observer: Observer, loop: asyncio.AbstractEventLoop) -> None:
        self.settings = shared.settings
        self.table = shared.table
        self.slot = shared.slot
        self.assets = shared.assets
        self.metrics = shared.metrics
        self.authenticator = shared.authenticator
        self.observer = observer
        self.loop = loop
        self.wheel = TimerWheel(loop.time())
        self.connections: dict[str, Connection] = {}
        self.no_connections = asyncio.Event()
        self.no_connections.set()
        self.heads = Census()
        self.transports = Census()
        self.draining = False
        self.collector = Collector(observer.gc_paused)
        self._shedding = False
        self.lag_s = 0.0
        self._last_lag = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._connection_numbers = itertools.count(1)
        self._ping_turns = itertools.cycle(range(_PING_SPREAD))
        self._beat: asyncio.TimerHandle | None = None
        self._next_beat = 0.0

    # Heartbeat.

    def start_heartbeat(self) -> None:
        """Show peers that the loop runs, and drive the timer wheel, every HEARTBEAT_S seconds."""
        self._next_beat = time.monotonic()
        self._on_beat()

    def stop_heartbeat(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None

    def _on_beat(self) -> None:
        now = time.monotonic()
        lag = max(0.0, now - self._next_beat)
        # One pause is no overload, two late beats in a row are.
        self.lag_s = min(lag, self._last_lag)
        if self._shedding != (self.lag_s > SHED_LAG_S):
            self._shedding = not self._shedding
            self.sessions.shed(self._shedding)
        self._last_lag = lag
        self.observer.loop_lag(lag)
        self.table.beat(self.slot, time.monotonic_ns(), redis_connected=self.sessions.store_connected)
        self.wheel.advance(self.loop.time())
        self.collector.tick(idle=self.sessions.idle)
        self._next_beat = max(self._next_beat + HEARTBEAT_S, now)
        self._beat = self.loop.call_later(self._next_beat - now, self._on_beat)

    # Who owns a session, and who is let in.

    def place(self, session_id: str, hops: int) -> int:
        """The slot that is to serve `session_id`; this one when nobody else can, to refuse it."""
        if hops and (not self.draining or hops >= MAX_HOPS):
            return self.slot
        ring = self.table.ring(time.monotonic_ns())
        return owner(session_id, ring) if ring else self.slot

    def admit(self, head: ParsedHead) -> Grant | Refusal:
        """Whether the WebSocket request may be upgraded here and now. A place is taken in the slot table if so."""
        verdict = self.authenticator.admit(head.token, head.session_id)
        if isinstance(verdict, Refusal):
            self.observer.session_rejected("unauthorised" if verdict.status == 401 else "forbidden")
            return verdict
        allowed = self.settings.allowed_origins
        if allowed and head.origin is not None and head.origin.rstrip("/") not in allowed:
            self.observer.session_rejected("origin")
            return Refusal(403, "this origin is not allowed")
        if self.draining:
            return self.refuse_for_now("draining", "the server is going; connect again")
        if self.lag_s * 1000.0 > self.settings.loop_lag_limit_ms:
            return self.refuse_for_now("lag", "the server is overloaded")
        if head.session_id not in self.connections and not self._take_place():
            return self.refuse_for_now("full", "MAX_CONCURRENT_SESSIONS is reached")
        return verdict

    def refuse_for_now(self, reason: str, text: str) -> Refusal:
        """A 503 with Retry-After."""
        self.observer.session_rejected(reason)
        return Refusal(503, text, (("Retry-After", RETRY_AFTER_S[reason]),))

    def _take_place(self) -> bool:
        """Count first, then look: two workers may both give way at the limit, but never both pass it."""
        here = len(self.connections)
        self.table.set_attached(self.slot, here + 1)
        if self.table.total_attached() <= self.settings.max_concurrent_sessions:
            return True
        self.table.set_attached(self.slot, here)
        return False

    def enter(self, connection: Connection) -> None:
        """`connection` is its session's newest."""
        self.connections[connection.session_id] = connection
        self.no_connections.clear()
        self.table.set_attached(self.slot, len(self.connections))

    def leave(self, connection: Connection) -> None:
        """`connection` no longer serves its session."""
        if self.connections.get(connection.session_id) is connection:
            del self.connections[connection.session_id]
            self.table.set_attached(self.slot, len(self.connections))
            if not self.connections:
                self.no_connections.set()

    def next_connection_id(self) -> str:
        return f"{os.getpid():x}-{next(self._connection_numbers):x}"

    def first_ping_delay(self) -> float:
        """Connections that arrive together do not send their pings together (seconds)."""
        return PING_INTERVAL_S * (0.5 + 0.5 * next(self._ping_turns) / _PING_SPREAD)

    # Handing over.

    def hand_over(self, slot: int, sock: socket.socket, head: bytes, rest: bytes, hops: int) -> bool:
        """Give the connection to the worker of `slot`; after True the caller drops its own descriptor."""
        done = handoff.offer(
            self.table.sender(slot), sock.fileno(), sock.family, head, rest,
            hops=hops + 1, now_ns=time.monotonic_ns(),
        )  # fmt: skip
        self.observer.handed_off("sent" if done else "failed")
        return done

    def start_receiving(self) -> None:
        """Take over the connections that other workers hand to this slot."""
        self.loop.add_reader(self.table.receiver(self.slot).fileno(), self.receive_handed)

    def stop_receiving(self) -> None:
        self.loop.remove_reader(self.table.receiver(self.slot).fileno())

    def receive_handed(self) -> int:
        """Take over what waits now; how many there were."""
        receiver = self.table.receiver(self.slot)
        for count in range(HANDOFFS_PER_WAKE):
            handed = handoff.take(receiver, time.monotonic_ns())
            if handed is None:
                return count
            self.observer.handed_off("received")
            self.spawn(self._adopt(handed))
        return HANDOFFS_PER_WAKE

    async def _adopt(self, handed: Handed) -> None:
        entry = Entry(self, handed)
        try:
            await self.loop.connect_accepted_socket(lambda: entry, handed.sock)
        except OSError:
            handed.sock.close()

    # Tasks.

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, owned by this worker: its failure is logged, and `finish_tasks` waits for it."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task failed", exc_info=task.exception())

    async def finish_tasks(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for all tasks, then cancel the rest and await them."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=timeout)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
