"""A small conversation layer for the tests of the server: it answers at once, and some texts make it misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from typing import Any

from orchestrator.conversation.registry import ConnectQuery
from orchestrator.settings import Settings
from orchestrator.telemetry.observer import Observer
from orchestrator.wire.messages import Ping, SttFragment, VadEnd, encode_message

AUDIO_FRAME = b"\x01\x02" * 1600


class FakeSession:
    """Ids that begin with `busy-` never come to IDLE."""

    def __init__(self, session_id: str, sessions: FakeSessions) -> None:
        self.session_id = session_id
        self.link: Any = None
        self.seq = 0
        self.resumed_writing = 0
        self.audio_bytes = 0
        self._sessions = sessions

    def send(self, kind: str, **fields: Any) -> None:
        if self.link is not None:
            self.seq += 1
            self.link.send_text(encode_message(kind, self.session_id, self.seq, 0.0, fields))

    def receive(self, message: Any) -> None:
        if isinstance(message, Ping):
            self.send("pong", id=message.id)
        elif isinstance(message, SttFragment):
            self.send("state_update", text_buffer=[message.text])
        elif isinstance(message, VadEnd):
            self.send("response_ready", slot=self._sessions.slot)
            self.link.send_audio(AUDIO_FRAME)
            self.link.send_audio(memoryview(AUDIO_FRAME)[:100])
        if isinstance(message, SttFragment) and message.text.startswith("!"):
            self._obey(*message.text[1:].split())

    def _obey(self, order: str, *arguments: str) -> None:
        if order == "break":
            raise RuntimeError("told to break")
        if order == "close":
            self.link.close(int(arguments[0]), "as you wish")
            self.link.close(4999, "and again")
            self.send("never_sent")
        elif order == "audio":
            for _ in range(int(arguments[0])):
                self.link.send_audio(AUDIO_FRAME)
        elif order == "interrupt":
            self.link.send_audio(AUDIO_FRAME)
            self.link.drop_audio()
            self.send("interrupted")
            self.link.flush()

    def receive_audio(self, pcm: bytes) -> None:
        self.audio_bytes += len(pcm)
        self.link.send_audio(pcm)

    def reject(self, code: str, message: str) -> None:
        self.send("error", code=code, message=message, fatal=False)

    def resume_writing(self) -> None:
        self.resumed_writing += 1

    def detach(self, link: Any) -> None:
        if link is self.link:
            self.link = None


class FakeSessions:
    """Ids that begin with `slow-` take 150 ms to open, those with `broken-` cannot be opened."""

    def __init__(self, settings: Settings, slot: int) -> None:
        self.slot = slot
        self.sessions: dict[str, FakeSession] = {}
        self.accepts_audio = bool(settings.stt_service_url)
        self.store_connected = settings.redis_url != "redis://down:6379/0"
        self._draining_ms: int | None = None

    @property
    def attached(self) -> int:
        return sum(session.link is not None for session in self.sessions.values())

    async def open(self, session_id: str, link: Any, query: ConnectQuery) -> FakeSession:
        if session_id.startswith("slow-"):
            await asyncio.sleep(0.15)
        if session_id.startswith("broken-"):
            raise RuntimeError("told to break")
        session = self.sessions.get(session_id)
        resumed = session is not None
        if session is None:
            session = self.sessions[session_id] = FakeSession(session_id, self)
        if session.link is not None:
            older, session.link = session.link, None
            older.close(4409, "a newer connection took the session")
        session.link = link
        session.send(
            "connected", slot=self.slot, pid=os.getpid(), resumed=resumed, events=sorted(query.events),
            last_seq=query.last_seq, token_expires_at=query.token_expires_at,
        )  # fmt: skip
        if self._draining_ms is not None:
            self._drain(session)
        return session

    @property
    def idle(self) -> bool:
        return self.attached == 0

    def shed(self, overloaded: bool) -> None:
        pass

    def find(self, session_id: str) -> FakeSession | None:
        return self.sessions.get(session_id)

    async def describe(self, session_id: str) -> dict[str, Any] | None:
        if session_id == "everything":
            return {
                "pid": os.getpid(),
                "tasks": len(asyncio.all_tasks()),
                "attached": self.attached,
                "descriptors": len(os.listdir("/proc/self/fd")),
                "metrics": os.environ["PROMETHEUS_MULTIPROC_DIR"],
            }
        session = self.sessions.get(session_id)
        if session is None:
            return None
        return {
            "session_id": session_id, "slot": self.slot, "attached": session.link is not None,
            "audio_bytes": session.audio_bytes, "resumed_writing": session.resumed_writing,
            "writable": session.link is not None and session.link.writable,
        }  # fmt: skip

    async def health(self) -> dict[str, str]:
        return {"intent": "closed"}

    def drain(self, reconnect_after_ms: int) -> None:
        self._draining_ms = reconnect_after_ms
        for session in list(self.sessions.values()):
            if session.link is not None:
                self._drain(session)

    def _drain(self, session: FakeSession) -> None:
        session.send("draining", reconnect_after_ms=self._draining_ms)
        if not session.session_id.startswith("busy-"):
            session.link.close(1012, "the worker is draining")

    async def close(self) -> None:
        self.sessions.clear()


async def build_sessions(
    settings: Settings, slot: int, observer: Observer, loop: asyncio.AbstractEventLoop
) -> FakeSessions:
    return FakeSessions(settings, slot)


async def build_sessions_except_once(
    settings: Settings, slot: int, observer: Observer, loop: asyncio.AbstractEventLoop
) -> FakeSessions:
    """The first worker of the pool's second slot fails."""
    marker = os.path.join(os.environ["PROMETHEUS_MULTIPROC_DIR"], "failed-once")
    if slot == 1 and not os.path.exists(marker):
        os.mkdir(marker)
        raise RuntimeError("told to fail")
    return FakeSessions(settings, slot)


class StubbornSessions(FakeSessions):
    """Will not be closed, and leaves a thread behind that nobody can stop."""

    async def close(self) -> None:
        threading.Thread(target=time.sleep, args=(600.0,)).start()
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(600.0)


class ThreadedSessions(FakeSessions):
    """Leaves a thread behind that nobody can stop."""

    async def close(self) -> None:
        threading.Thread(target=time.sleep, args=(600.0,)).start()


async def build_stubborn_sessions(
    settings: Settings, slot: int, observer: Observer, loop: asyncio.AbstractEventLoop
) -> FakeSessions:
    return StubbornSessions(settings, slot)


async def build_threaded_sessions(
    settings: Settings, slot: int, observer: Observer, loop: asyncio.AbstractEventLoop
) -> FakeSessions:
    return ThreadedSessions(settings, slot)
