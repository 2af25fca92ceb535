"""All sessions of a worker: opened, found, resumed, forgotten after their time."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from orchestrator.conversation.outbox import Link
from orchestrator.conversation.runtime import Runtime
from orchestrator.conversation.session import Session
from orchestrator.downstream.stt import SttEvent
from orchestrator.errors import StoreUnavailable

CLOSE_TAKEN_OVER = 4409
CLOSE_EXPIRED = 4410
FORGET_STORED_SECONDS = 30.0
"""A session without a connection leaves memory after this, once the store has it."""

CLOSE_TIMEOUT_SECONDS = 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectQuery:
    """What the client asked for in the connection's query. `token_expires_at` is Unix seconds."""

    events: frozenset[str]
    last_seq: int | None
    token_expires_at: float | None = None


class Sessions:
    """The worker's sessions. All calls on the loop's thread."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._sessions: dict[str, Session] = {}
        self._opening: dict[str, asyncio.Future[None]] = {}
        self._ending_tasks: set[asyncio.Task[None]] = set()
        self._attached = 0
        self._busy = 0
        self._draining_ms: int | None = None
        self._sweeper = runtime.loop.create_task(self._sweep())

    @property
    def attached(self) -> int:
        """Sessions with a live connection."""
        return self._attached

    @property
    def idle(self) -> bool:
        """Whether nobody speaks and nobody is answered."""
        return self._busy == 0

    @property
    def accepts_audio(self) -> bool:
        """Whether there is an STT service to relay microphone audio to."""
        return self._runtime.services.stt_relay is not None

    @property
    def store_connected(self) -> bool:
        return self._runtime.store.connected

    async def open(self, session_id: str, link: Link, query: ConnectQuery) -> Session:
        """The session `session_id` with `link` as its connection, restored from the store if need be.

        An older connection of the session is closed with 4409.
        """
        while (opening := self._opening.get(session_id)) is not None:
            await asyncio.shield(opening)
        resumed = session_id in self._sessions
        if not resumed:
            gate = self._opening[session_id] = self._runtime.loop.create_future()
            try:
                resumed = await self._load(session_id)
            finally:
                del self._opening[session_id]
                gate.set_result(None)
        session = self._sessions[session_id]
        older = session.link
        if older is not None:
            session.detach(older)
            older.close(CLOSE_TAKEN_OVER, "a newer connection took the session")
        session.attach(link, query.events, query.last_seq, resumed)
        if self._draining_ms is not None:
            session.drain(self._draining_ms)
        return session

    def own(self, task: asyncio.Task[None]) -> None:
        """Keep a task that is ending until it is over."""
        if not task.done():
            self._ending_tasks.add(task)
            task.add_done_callback(self._ending_tasks.discard)

    def count_attached(self, change: int) -> None:
        self._attached += change

    def count_busy(self, change: int) -> None:
        self._busy += change

    def shed(self, overloaded: bool) -> None:
        """Leave out optional work, or take it up again."""
        self._runtime.overloaded = overloaded

    async def health(self) -> dict[str, str]:
        """The circuit breaker's state of each service."""
        return self._runtime.services.breaker_states()

    def find(self, session_id: str) -> Session | None:
        return self._sessions.get(session_id)

    async def describe(self, session_id: str) -> dict[str, Any] | None:
        """The session for `GET /sessions/<id>`, from memory or from the store; None if nobody knows it."""
        session = self._sessions.get(session_id)
        if session is None:
            try:
                record = await self._runtime.store.load(session_id)
            except StoreUnavailable:
                return None
            if record is None:
                return None
            session = Session(self._runtime, session_id, self)
            session.restore(record)
        return session.describe()

    def deliver_stt(self, session_id: str, event: SttEvent) -> None:
        """An event that STT published for a session; sessions of other workers are not ours to serve."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.receive_stt(event)

    def drain(self, reconnect_after_ms: int) -> None:
        """Tell every client, and close each connection at its session's next IDLE."""
        self._draining_ms = reconnect_after_ms
        for session in list(self._sessions.values()):
            session.drain(reconnect_after_ms)

    async def close(self) -> None:
        """Stop every turn and wait, within a bound, until nothing of it is left. The caller closes the store."""
        self._sweeper.cancel()
        for session in list(self._sessions.values()):
            if session.link is not None:
                link = session.link
                session.detach(link)
                link.close(1012, "the worker is going")
        if self._ending_tasks:
            await asyncio.wait(self._ending_tasks, timeout=CLOSE_TIMEOUT_SECONDS)
        await asyncio.gather(self._sweeper, return_exceptions=True)

    async def _load(self, session_id: str) -> bool:
        session = Session(self._runtime, session_id, self)
        try:
            record = await self._runtime.store.load(session_id)
        except StoreUnavailable:
            record = None
        if record is not None:
            session.restore(record)
        self._sessions[session_id] = session
        return record is not None

    async def _sweep(self) -> None:
        """Forget sessions whose time is over."""
        ttl = self._runtime.settings.session_ttl_seconds
        while True:
            await asyncio.sleep(min(FORGET_STORED_SECONDS, ttl) / 4.0)
            now = self._runtime.clock()
            for session_id, session in list(self._sessions.items()):
                idle = now - session.last_active
                if idle > ttl and session.link is not None:
                    session.link.close(CLOSE_EXPIRED, "the session was idle for longer than SESSION_TTL_SECONDS")
                elif session.link is None and (
                    idle > ttl or (idle > FORGET_STORED_SECONDS and self._stored(session_id))
                ):
                    del self._sessions[session_id]

    def _stored(self, session_id: str) -> bool:
        return self._runtime.store.connected and not self._runtime.store.is_dirty(session_id)
