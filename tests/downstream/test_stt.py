"""The microphone relay against real WebSocket services that are good, slow, dead and wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from orchestrator.downstream import stt
from orchestrator.downstream.stt import (
    QUEUE_BYTES,
    SttEvent,
    SttFragmentEvent,
    SttRelay,
    SttTimeout,
    SttUserSpeaking,
    SttVadEnd,
)
from orchestrator.downstream.ws_link import WsEndpoint
from orchestrator.errors import DownstreamError, Failure
from tests.downstream.running import Connection, serving
from tests.downstream.ws_peers import Peer, WsServer, ws_serving
from tests.loops import live, until

FRAME = b"\x01\x00" * 320
"""20 ms of audio."""


class Session:
    """Whoever gets the relay's events."""

    def __init__(self, url: str, session_id: str = "test_001") -> None:
        self.events: list[SttEvent] = []
        self.failures: list[DownstreamError] = []
        endpoint = WsEndpoint("stt", url, "/api/v1/transcribe/stream")
        self.relay = SttRelay(session_id, endpoint, self.events.append, self.failures.append)


@asynccontextmanager
async def relaying(url: str) -> AsyncIterator[Session]:
    session = Session(url)
    try:
        yield session
    finally:
        await session.relay.close()


class Heard:
    """A service that remembers what it got."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.audio = bytearray()
        self.frames: list[bytes] = []

    async def __call__(self, peer: Peer) -> None:
        await peer.send("connected")
        while True:
            message = await peer.receive()
            if isinstance(message, bytes):
                self.audio += message
                self.frames.append(message)
            else:
                self.commands.append(message["type"])


@live
async def test_audio_goes_out_and_events_come_in() -> None:
    heard = Heard()

    async def handler(peer: Peer) -> None:
        await peer.send("connected")
        assert (await peer.receive()) == {"type": "start_capture"}
        await peer.send("capture_started")
        assert await peer.receive() == FRAME
        await peer.send("fragment", text="what are", is_final=False, timestamp=1.5, extra=[1])
        await peer.send("user_speaking", confidence=0.8)
        await peer.send("fragment", text="what are the requirements", is_final=True, timestamp=2)
        await peer.send("vad_end")
        await heard(peer)

    async with ws_serving(handler) as server, relaying(server.url) as session:
        assert server.connections == 0
        session.relay.feed(FRAME)
        await until(lambda: len(session.events) == 4)
        assert session.events == [
            SttFragmentEvent("what are", False, 1.5),
            SttUserSpeaking(0.8),
            SttFragmentEvent("what are the requirements", True, 2.0),
            SttVadEnd(1.0),
        ]
        session.relay.feed(b"")
        session.relay.feed(FRAME * 2)
        await until(lambda: bytes(heard.audio) == FRAME * 2)
        assert (server.peers[0].path, server.peers[0].session_id) == ("/api/v1/transcribe/stream", "test_001")
        await session.relay.close()
        await until(lambda: heard.commands == ["stop_capture"] and server.open == 0)
        session.relay.feed(FRAME)
        await asyncio.sleep(0.02)
        assert server.connections == 1
        assert session.failures == []


@live
async def test_what_was_said_while_connecting_arrives_in_order() -> None:
    heard = Heard()
    async with ws_serving(heard) as server, relaying(server.url) as session:
        frames = [bytes((index, 0)) * 320 for index in range(50)]
        for frame in frames:
            session.relay.feed(frame)
        await until(lambda: len(heard.frames) == 50)
        assert heard.frames == frames
        assert heard.commands == ["start_capture"]
        assert server.connections == 1


@live
async def test_samples_are_never_torn() -> None:
    heard = Heard()
    sound = bytes(range(256)) * 10
    async with ws_serving(heard) as server, relaying(server.url) as session:
        for start in range(0, len(sound), 33):
            session.relay.feed(sound[start : start + 33])
        await until(lambda: bytes(heard.audio) == sound)
        assert all(len(frame) % 2 == 0 for frame in heard.frames)


@live
async def test_a_timeout_starts_capturing_again_with_the_next_audio() -> None:
    heard = Heard()
    async with ws_serving(heard) as server, relaying(server.url) as session:
        session.relay.feed(FRAME)
        await until(lambda: len(heard.frames) == 1)
        await server.peers[0].send("timeout", message="no speech")
        await until(lambda: session.events == [SttTimeout()])
        assert heard.commands == ["start_capture"]
        session.relay.feed(FRAME)
        await until(lambda: heard.commands == ["start_capture", "start_capture"])


@pytest.mark.parametrize(
    "message",
    ["hello", "7", "[]", '{"type":7}', '{"type":"fragment","text":7}', '{"type":"vad_end","confidence":2}',
     '{"type":"fragment","text":"a","is_final":"yes"}', '{"type":"x","text":' + "[" * 100_000,
     '{"type":"fragment","text":"' + "ä" * 3000 + '"}', b"\x00\xff", '{"type":"new_thing","text":"x"}'],
)  # fmt: skip
def test_wrong_messages_are_dropped_and_right_ones_still_count(message: str | bytes) -> None:
    @live
    async def run() -> None:
        async def handler(peer: Peer) -> None:
            await peer.socket.send(message)
            await peer.send("vad_end")
            await Heard()(peer)

        async with ws_serving(handler) as server, relaying(server.url) as session:
            session.relay.feed(FRAME)
            await until(lambda: session.events == [SttVadEnd(1.0)])
            assert server.open == 1

    run()


@live
async def test_an_error_of_the_service_is_reported() -> None:
    async def handler(peer: Peer) -> None:
        await peer.send("error", message="model\nlost")
        await Heard()(peer)

    async with ws_serving(handler) as server, relaying(server.url) as session:
        session.relay.feed(FRAME)
        await until(lambda: len(session.failures) == 1)
        assert session.failures[0].failure is Failure.BAD_ANSWER
        assert str(session.failures[0]).isprintable()


ENDS: dict[str, Callable[[Peer], Any]] = {
    "a close": lambda peer: peer.socket.close(1011),
    "a drop": lambda peer: peer.socket.transport.abort(),
    "bad framing": lambda peer: peer.socket.transport.write(b"\xff\xff\xff\xff"),
    "a message of two megabytes": lambda peer: peer.send("fragment", text="x" * 2_000_000),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_a_lost_connection_is_told_once_and_opened_again(end: Callable[[Peer], Any]) -> None:
    @live
    async def run() -> None:
        heard = Heard()

        async def handler(peer: Peer) -> None:
            if len(server.peers) == 1:
                await peer.receive()
                result = end(peer)
                if result is not None:
                    await result
                await peer.socket.wait_closed()
            else:
                await heard(peer)

        async with ws_serving(handler) as server, relaying(server.url) as session:
            session.relay.feed(FRAME)
            await until(lambda: len(session.failures) == 1)
            assert session.failures[0].failure is Failure.CLOSED
            session.relay.feed(FRAME)
            await until(lambda: len(heard.frames) == 1)
            assert heard.commands == ["start_capture"]
            assert len(session.failures) == 1

    run()


@live
async def test_without_audio_nothing_is_opened_again() -> None:
    async def handler(peer: Peer) -> None:
        await peer.receive()
        await peer.receive()
        await peer.socket.close()

    async with ws_serving(handler) as server, relaying(server.url) as session:
        session.relay.feed(FRAME)
        await until(lambda: server.connections == 1 and server.open == 0)
        await asyncio.sleep(0.3)
        assert server.connections == 1


@live
async def test_a_dead_service_keeps_the_last_two_seconds_and_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stt, "LAST_BACKOFF_SECONDS", 0.1)
    heard = Heard()
    async with ws_serving(heard) as server:
        port = server.port
    async with relaying(f"http://127.0.0.1:{port}") as session:
        frames = [index.to_bytes(2, "little") * 320 for index in range(400)]
        for frame in frames:
            session.relay.feed(frame)
        await until(lambda: len(session.failures) == 1)
        await asyncio.sleep(0.25)
        assert len(session.failures) == 1
        assert session.failures[0].failure is Failure.UNREACHABLE
        kept = QUEUE_BYTES // len(FRAME)
        assert session.relay.dropped_bytes == (400 - kept) * len(FRAME)
        await server.start(port)
        await until(lambda: len(heard.frames) == kept)
        assert heard.frames == frames[-kept:]
        await session.relay.close()
        await server.stop()


@live
async def test_a_service_that_takes_nothing_harms_its_own_session_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stt, "_STUCK_SECONDS", 0.2)
    heard = Heard()

    async def handler(peer: Peer) -> None:
        if peer.session_id == "slow":
            peer.socket.transport.pause_reading()
            await peer.socket.wait_closed()
        else:
            await heard(peer)

    async with ws_serving(handler) as server, relaying(server.url) as good:
        slow = Session(server.url, "slow")
        big = FRAME * 10
        for _ in range(200):
            slow.relay.feed(big)
            good.relay.feed(FRAME)
            await asyncio.sleep(0)
        await until(lambda: len(heard.frames) == 200)
        for _ in range(200):
            slow.relay.feed(big)
            await asyncio.sleep(0.002)
            if slow.failures:
                break
        assert [error.failure for error in slow.failures] == [Failure.CLOSED]
        assert slow.relay.dropped_bytes > 0
        assert good.failures == []
        await slow.relay.close()
        for peer in server.peers:
            if peer.session_id == "slow":
                peer.socket.transport.abort()


@pytest.mark.parametrize("status", [404, 500])
def test_a_refused_connection(status: int) -> None:
    @live
    async def run() -> None:
        async with ws_serving(Heard()) as server, relaying(server.url) as session:
            server.refuse = status
            session.relay.feed(FRAME)
            await until(lambda: len(session.failures) == 1)
            assert session.failures[0].failure is Failure.STATUS

    run()


@live
async def test_closing_while_connecting_or_waiting_to_connect() -> None:
    async def handler(connection: Connection) -> None:
        await connection.gone()

    async with serving(handler) as server:
        session = Session(server.url)
        session.relay.feed(FRAME)
        await until(lambda: server.open == 1)
        await session.relay.close()
        await until(lambda: server.open == 0)
        port = server.port
    session = Session(f"http://127.0.0.1:{port}")
    session.relay.feed(FRAME)
    await until(lambda: len(session.failures) == 1)
    await session.relay.close()
    assert len(session.failures) == 1


@live
async def test_closing_twice_and_before_anything() -> None:
    async with ws_serving(Heard()) as server:
        session = Session(server.url)
        await session.relay.close()
        await session.relay.close()
        assert isinstance(server, WsServer)
        assert server.connections == 0
