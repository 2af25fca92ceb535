"""Scripted services with exact delays for tests on virtual time, a recording link and a store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import looptime
import orjson

from orchestrator.conversation.pacing import PacingWheel
from orchestrator.conversation.registry import ConnectQuery, Sessions
from orchestrator.conversation.runtime import Runtime, Services
from orchestrator.conversation.session import Session
from orchestrator.core.fsm import Policy
from orchestrator.downstream.types import Call, Intent, Message, Retrieval
from orchestrator.errors import DownstreamError, Failure, StoreUnavailable
from orchestrator.settings import Settings
from orchestrator.store.record import SessionRecord
from orchestrator.telemetry.observer import Observer
from orchestrator.wire.messages import SttFragment, UserSpeaking, VadEnd

T = TypeVar("T")
RATE = 24_000
FRAME = bytes(RATE // 10 * 2)
"""100 ms of PCM16."""


def on_virtual_time(test: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `test` on a loop whose clock jumps to the next timer instead of waiting."""
    loop = looptime.new_event_loop(start=100.0)
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(test())
    finally:
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        loop.close()
        asyncio.set_event_loop(None)


@dataclass
class Calls:
    """What a scripted service saw. `aborted` counts calls given up by the orchestrator, `open` those under way."""

    started: list[tuple[float, str]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finished: int = 0
    aborted: int = 0
    failed: int = 0

    @property
    def open(self) -> int:
        return len(self.started) - self.finished - self.aborted - self.failed

    def begin(self, what: str, call: Call) -> None:
        self.started.append((asyncio.get_running_loop().time(), what))
        self.calls.append(call)


class _Scripted:
    def __init__(self, service: str, delay_ms: float, fails: Failure | None = None) -> None:
        self.service = service
        self.delay_ms = delay_ms
        self.fails = fails
        self.seen = Calls()

    async def _wait_first(self, call: Call) -> None:
        """The service's delay, cut off at the call's deadline as the real clients do."""
        await asyncio.sleep(min(self.delay_ms, call.timeout_ms) / 1000.0)
        if self.fails is not None or self.delay_ms > call.timeout_ms:
            raise DownstreamError(self.service, self.fails or Failure.TIMEOUT)

    async def _answered(self, call: Call, answer: T) -> T:
        try:
            await self._wait_first(call)
        except asyncio.CancelledError:
            self.seen.aborted += 1
            raise
        except DownstreamError:
            self.seen.failed += 1
            raise
        self.seen.finished += 1
        return answer


class ScriptedIntent(_Scripted):
    def __init__(self, delay_ms: float = 50, fails: Failure | None = None) -> None:
        super().__init__("intent", delay_ms, fails)

    async def classify(self, text: str, call: Call) -> Intent:
        self.seen.begin(text, call)
        return await self._answered(call, Intent("admission_requirements", 0.93, "know what to hand in"))


class ScriptedRag(_Scripted):
    answer = "You need a diploma. Send it by May."

    def __init__(self, delay_ms: float = 80, fails: Failure | None = None) -> None:
        super().__init__("rag", delay_ms, fails)
        self.pieces = ["You need a diploma. ", "Send it by May."]
        self.early: list[str] = []
        self.early_ms = 20.0
        self.incremental: list[str] = []

    async def query(self, text: str, call: Call) -> Retrieval:
        self.seen.begin(text, call)
        return await self._answered(call, Retrieval(self.answer, ("A diploma is required.",), 0.9))

    async def stream_query(self, text: str, call: Call) -> AsyncGenerator[str, None]:
        self.seen.begin(text, call)
        async for piece in _stream(self, call, self.pieces, 10.0, None):
            yield piece

    async def query_incremental(self, text: str, call: Call) -> None:
        self.early.append(text)
        await asyncio.sleep(self.early_ms / 1000.0)

    async def stream_incremental(self, text: str, call: Call) -> AsyncGenerator[str, None]:
        self.incremental.append(text)
        async for piece in self.stream_query(text, call):
            yield piece


class ScriptedLlm(_Scripted):
    def __init__(
        self,
        delay_ms: float = 100,
        tokens: Sequence[str] = ("You ", "need ", "a ", "diploma. ", "Send ", "it ", "by ", "May. ", "Good ", "luck!"),
        token_ms: float = 5,
        fails: Failure | None = None,
        stalls_after: int | None = None,
    ) -> None:
        super().__init__("llm", delay_ms, fails)
        self.tokens = tokens
        self.token_ms = token_ms
        self.stalls_after = stalls_after
        self.messages: list[Sequence[Message]] = []

    async def stream(self, messages: Sequence[Message], call: Call) -> AsyncGenerator[str, None]:
        self.seen.begin(messages[-1]["content"], call)
        self.messages.append(messages)
        async for token in _stream(self, call, self.tokens, self.token_ms, self.stalls_after):
            yield token


class ScriptedTts(_Scripted):
    sample_rate = RATE

    def __init__(
        self,
        delay_ms: float = 75,
        frames: int = 10,
        frame_ms: float = 0,
        fails: Failure | None = None,
        fails_from: int = 0,
        stalls_after: int | None = None,
    ) -> None:
        super().__init__("tts", delay_ms, None)
        self.frames = frames
        self.frame_ms = frame_ms
        self.failure = fails
        self.fails_from = fails_from
        self.stalls_after = stalls_after

    def prepare(self, session_id: str) -> None:
        pass

    def release(self, session_id: str) -> None:
        pass

    async def synthesize(self, text: str, call: Call) -> AsyncGenerator[bytes, None]:
        self.fails = self.failure if len(self.seen.started) >= self.fails_from else None
        self.seen.begin(text, call)
        sentences = max(1, sum(text.count(mark) for mark in ".!?"))
        async for frame in _stream(self, call, [FRAME] * self.frames * sentences, self.frame_ms, self.stalls_after):
            yield frame


async def _stream(
    service: _Scripted, call: Call, pieces: Sequence[T], gap_ms: float, stalls_after: int | None
) -> AsyncGenerator[T, None]:
    done = False
    try:
        await service._wait_first(call)
        for place, piece in enumerate(pieces):
            if stalls_after is not None and place >= stalls_after:
                await asyncio.sleep(call.stall_ms / 1000.0)
                raise DownstreamError(service.service, Failure.STALLED)
            if place and gap_ms:
                await asyncio.sleep(gap_ms / 1000.0)
            yield piece
        done = True
        service.seen.finished += 1
    except DownstreamError:
        done = True
        service.seen.failed += 1
        raise
    finally:
        if not done:
            service.seen.aborted += 1


class MemoryStore:
    """A store for tests of the conversation alone."""

    def __init__(self) -> None:
        self.connected = True
        self.records: dict[str, SessionRecord] = {}
        self.writes = 0

    async def load(self, session_id: str) -> SessionRecord | None:
        if not self.connected:
            raise StoreUnavailable("down")
        return self.records.get(session_id)

    def mark_dirty(self, session_id: str, snapshot: Callable[[], SessionRecord]) -> None:
        self.writes += 1
        if self.connected:
            self.records[session_id] = snapshot()

    def is_dirty(self, session_id: str) -> bool:
        return not self.connected


class CountingObserver(Observer):
    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.speculations: list[str] = []
        self.stops: list[float] = []
        self.states: dict[str, int] = {}

    def turn_ended(self, outcome: str, breakdown: Any) -> None:
        self.outcomes.append(outcome)

    def speculation(self, result: str) -> None:
        self.speculations.append(result)

    def barge_in_stopped(self, seconds: float) -> None:
        self.stops.append(seconds)

    def session_state(self, state: str, change: int) -> None:
        self.states[state] = self.states.get(state, 0) + change


@dataclass
class Sent:
    """One thing the client got: a message, or `audio` bytes. `at` is loop seconds."""

    at: float
    message: dict[str, Any]
    audio: int = 0

    @property
    def kind(self) -> str:
        return "audio" if self.audio else str(self.message["type"])


class RecordingLink:
    connection_id = "recording"

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.closed: tuple[int, str] | None = None
        self.writable = True
        self._arrived = asyncio.Event()

    def send_text(self, payload: bytes) -> None:
        self.sent.append(Sent(asyncio.get_running_loop().time(), orjson.loads(payload)))
        self._arrived.set()

    def send_audio(self, pcm: bytes | memoryview) -> None:
        assert self.writable
        self.sent.append(Sent(asyncio.get_running_loop().time(), {}, len(pcm)))
        self._arrived.set()

    def flush(self) -> None:
        pass

    def drop_audio(self) -> None:
        pass

    def close(self, code: int, reason: str) -> None:
        self.closed = self.closed or (code, reason)
        self._arrived.set()

    @property
    def kinds(self) -> list[str]:
        """What was sent, in order; runs of audio count once."""
        kinds: list[str] = []
        for sent in self.sent:
            if not (sent.audio and kinds[-1:] == ["audio"]):
                kinds.append(sent.kind)
        return kinds

    def messages(self, kind: str) -> list[dict[str, Any]]:
        return [sent.message for sent in self.sent if sent.kind == kind]

    def audio_ms(self) -> float:
        return sum(sent.audio for sent in self.sent) / (RATE * 2 / 1000.0)

    async def until(self, kind: str, count: int = 1, limit: float = 60.0) -> Sent:
        """The `count`th thing of `kind`, within `limit` virtual seconds."""
        async with asyncio.timeout(limit):
            while len(found := [sent for sent in self.sent if sent.kind == kind]) < count:
                self._arrived.clear()
                await self._arrived.wait()
        return found[count - 1]


class Stage:
    """A worker's conversation layer with scripted services, and one client."""

    def __init__(self, services: Services | None = None, **settings: Any) -> None:
        loop = asyncio.get_running_loop()
        self.intent, self.rag, self.llm, self.tts = ScriptedIntent(), ScriptedRag(), ScriptedLlm(), ScriptedTts()
        self.store, self.observer = MemoryStore(), CountingObserver()
        values = {"speculation": "off", **settings}
        self.settings = replace(Settings(), **values)
        self.runtime = Runtime(
            settings=self.settings,
            services=services or Services(self.intent, self.rag, self.llm, None, self.tts),
            store=self.store,
            observer=self.observer,
            loop=loop,
            wheel=PacingWheel(loop),
            policy=Policy(self.settings.barge_in_confidence, self.settings.barge_in_min_words),
            clock=loop.time,
            wall=lambda: 1_700_000_000.0 + loop.time(),
            node="test",
            slot=0,
        )
        self.sessions = Sessions(self.runtime)
        self.link = RecordingLink()

    @property
    def now(self) -> float:
        return self.runtime.loop.time()

    async def connect(
        self, session_id: str = "s1", events: frozenset[str] = frozenset(), last_seq: int | None = None
    ) -> Session:
        self.link = RecordingLink()
        return await self.sessions.open(session_id, self.link, ConnectQuery(events, last_seq))

    def say(self, session: Session, text: str = "What are admission requirements?", final: bool = True) -> None:
        session.receive(SttFragment(text=text, is_final=final))

    def end(self, session: Session) -> float:
        session.receive(VadEnd())
        return self.now

    def ask(self, session: Session, text: str = "What are admission requirements?") -> float:
        """Say `text` and be done; returns the time."""
        self.say(session, text)
        return self.end(session)

    def interrupt(self, session: Session, confidence: float = 1.0) -> None:
        session.receive(UserSpeaking(confidence=confidence))


def staged(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Decorates an async test: it runs on virtual time."""

    def run() -> None:
        async def main() -> None:
            await test()

        on_virtual_time(main)

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run
