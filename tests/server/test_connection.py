"""The Link that sessions write to, on a transport and clock of the test's own: joining, dropping, holding, timing."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import CLIENT, Protocol, State

from orchestrator.conversation.registry import ConnectQuery
from orchestrator.server import limits
from orchestrator.server.connection import Connection
from orchestrator.server.hub import Census
from orchestrator.server.wheel import TimerWheel
from orchestrator.settings import load_settings
from tests.server.fakes import AUDIO_FRAME, FakeSession, FakeSessions

HANDSHAKE = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
QUERY = ConnectQuery(frozenset(), None)


class Transport:
    """Records what is written; a test decides when the client is slow."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.reading = True
        self.ended = False
        self.aborted = False
        self.limits: tuple[int, int] = (0, 0)

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        self.limits = (high, low)

    def write(self, data: bytes) -> None:
        assert not self.ended
        self.writes.append(data)

    def write_eof(self) -> None:
        self.ended = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


class Loop:
    """Time stands still unless the test moves it; callbacks run when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.soon: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[..., None], *arguments: Any) -> None:
        self.soon.append((callback, arguments))

    def tick(self) -> None:
        soon, self.soon = self.soon, []
        for callback, arguments in soon:
            callback(*arguments)


class Hub:
    """What a connection needs of the worker's hub."""

    def __init__(self, **environ: str) -> None:
        self.settings = load_settings(environ)
        self.loop = Loop()
        self.wheel = TimerWheel(self.loop.now)
        self.sessions = FakeSessions(self.settings, slot=3)
        self.transports = Census()
        self.left: list[Connection] = []
        self.opening: list[Any] = []

    def enter(self, connection: Connection) -> None:
        pass

    def leave(self, connection: Connection) -> None:
        self.left.append(connection)

    def first_ping_delay(self) -> float:
        return limits.PING_INTERVAL_S

    def spawn(self, work: Any) -> None:
        self.opening.append(work)

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.25)):
            self.loop.now += 0.25
            self.wheel.advance(self.loop.now)
            self.loop.tick()


class Client:
    """A connection under test, with a client's engine at the other end."""

    def __init__(self, hub: Hub | None = None, session_id: str = "test_001", query: ConnectQuery = QUERY) -> None:
        self.hub = hub if hub is not None else Hub()
        self.transport = Transport()
        self.connection = Connection(self.hub, session_id, query, "c1")  # type: ignore[arg-type]
        self.engine = Protocol(CLIENT, state=State.OPEN)

    def begin(self, rest: bytes = b"") -> None:
        self.connection.begin(self.transport, HANDSHAKE, rest)  # type: ignore[arg-type]

    def open(self) -> FakeSession:
        self.begin()
        self.finish_opening()
        self.hub.loop.tick()
        self.frames()
        session = self.hub.sessions.find(self.connection.session_id)
        assert session is not None
        return session

    def finish_opening(self) -> None:
        asyncio.run(self.hub.opening.pop())

    def send(self, text: str) -> None:
        self.engine.send_text(text.encode())
        self.deliver()

    def deliver(self) -> None:
        self.connection.data_received(b"".join(self.engine.data_to_send()))

    def frames(self) -> list[Frame]:
        """The frames that were written since the last call."""
        written = b"".join(self.transport.writes).removeprefix(HANDSHAKE)
        self.transport.writes.clear()
        if written:
            self.engine.receive_data(written)
        return [event for event in self.engine.events_received() if isinstance(event, Frame)]

    def close_code(self) -> int | None:
        self.hub.loop.tick()
        self.frames()
        return self.engine.close_rcvd.code if self.engine.close_rcvd is not None else None


FRAGMENT = '{"type":"stt_fragment","text":"%s"}'


def test_the_handshake_and_the_first_message_are_one_write():
    client = Client()
    client.begin()
    client.finish_opening()
    client.hub.loop.tick()
    assert len(client.transport.writes) == 1
    assert client.transport.writes[0].startswith(HANDSHAKE)
    assert b'"connected"' in client.transport.writes[0]
    assert client.transport.limits == (limits.WRITE_HIGH_WATER, limits.WRITE_LOW_WATER)


def test_a_slow_store_does_not_hold_up_the_handshake():
    client = Client()
    client.begin()
    client.hub.loop.tick()
    assert client.transport.writes == [HANDSHAKE]
    client.finish_opening()


def test_answers_to_one_read_leave_in_one_write():
    client = Client()
    client.open()
    for word in ("what", "what are"):
        client.engine.send_text((FRAGMENT % word).encode())
    client.engine.send_text(b'{"type":"vad_end"}')
    client.deliver()
    assert len(client.transport.writes) == 1
    assert [frame.opcode for frame in client.frames()] == [Opcode.TEXT] * 3 + [Opcode.BINARY] * 2


def test_messages_of_one_tick_leave_in_one_write():
    client = Client()
    session = client.open()
    session.send("one")
    session.link.send_audio(AUDIO_FRAME)
    session.send("two")
    assert client.transport.writes == []
    client.hub.loop.tick()
    assert len(client.transport.writes) == 1
    assert [frame.opcode for frame in client.frames()] == [Opcode.TEXT, Opcode.BINARY, Opcode.TEXT]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 200_000])
def test_frames_of_every_length_class(size):
    client = Client()
    session = client.open()
    session.link.send_audio(b"a" * size)
    session.link.send_text(b"t" * size)
    client.hub.loop.tick()
    assert [len(frame.data) for frame in client.frames()] == [size, size]


def test_dropped_audio_is_never_written_and_text_keeps_its_order():
    client = Client()
    session = client.open()
    session.send("one")
    session.link.send_audio(AUDIO_FRAME)
    session.send("two")
    session.link.send_audio(AUDIO_FRAME)
    session.link.drop_audio()
    session.send("three")
    session.link.send_audio(b"kept")
    session.link.flush()
    frames = client.frames()
    assert [frame.opcode for frame in frames] == [Opcode.TEXT] * 3 + [Opcode.BINARY]
    assert bytes(frames[-1].data) == b"kept"


def test_what_a_slow_client_has_not_taken_can_still_be_dropped():
    client = Client()
    session = client.open()
    client.connection.pause_writing()
    assert session.link.writable is False
    session.link.send_audio(AUDIO_FRAME)
    session.link.flush()
    client.hub.loop.tick()
    assert client.transport.writes == []
    session.link.drop_audio()
    session.send("interrupted")
    client.connection.resume_writing()
    client.hub.loop.tick()
    assert session.link.writable is True
    assert session.resumed_writing == 1
    assert [frame.opcode for frame in client.frames()] == [Opcode.TEXT]


def test_a_client_that_never_reads_is_given_up_at_a_bound():
    client = Client()
    session = client.open()
    client.connection.pause_writing()
    for _ in range(limits.MAX_QUEUED_BYTES // len(AUDIO_FRAME) + 1):
        session.link.send_audio(AUDIO_FRAME)
    client.hub.loop.tick()
    assert session.link is None
    client.hub.pass_time(3.0)
    assert client.transport.aborted is True


def test_bytes_that_come_while_the_session_opens_are_kept_and_reading_waits():
    client = Client()
    client.engine.send_text(b'{"type":"ping","id":1}')
    client.begin(rest=b"".join(client.engine.data_to_send()))
    client.engine.send_text(b'{"type":"ping","id":2}')
    client.deliver()
    assert client.transport.reading is False
    client.finish_opening()
    assert client.transport.reading is True
    client.hub.loop.tick()
    assert [b'"pong"' in frame.data for frame in client.frames()] == [False, True, True]


def test_a_client_that_goes_while_the_session_opens_leaves_nothing():
    client = Client()
    client.begin()
    client.connection.connection_lost(None)
    client.finish_opening()
    session = client.hub.sessions.find("test_001")
    assert session is not None
    assert session.link is None
    assert client.hub.left == [client.connection]
    assert client.hub.transports.count == 0
    assert len(client.hub.wheel) == 0


def test_a_session_that_cannot_be_opened_is_1011():
    client = Client(session_id="broken-1")
    client.begin()
    client.finish_opening()
    assert client.close_code() == 1011


def test_a_session_that_breaks_closes_its_own_connection_only(caplog):
    client, other = Client(), Client()
    session = client.open()
    other.open()
    with caplog.at_level(logging.CRITICAL):
        client.send(FRAGMENT % "!break")
    assert client.close_code() == 1011
    assert session.link is None
    other.send('{"type":"ping","id":1}')
    assert len(other.frames()) == 1


def test_the_sessions_close_is_sent_once_behind_what_was_queued():
    client = Client()
    session = client.open()
    client.send(FRAGMENT % "!close 4409")
    frames = client.frames()
    assert [frame.opcode for frame in frames] == [Opcode.TEXT, Opcode.CLOSE]
    assert client.close_code() == 4409
    assert session.link is None
    client.deliver()
    assert client.transport.ended is True


def test_a_client_that_does_not_answer_a_close_is_cut_off():
    client = Client()
    session = client.open()
    session.link.close(4409, "a newer connection took the session")
    client.hub.pass_time(limits.CLOSING_TIMEOUT_S + 1.0)
    assert client.transport.aborted is True


def test_a_reason_that_is_too_long_for_a_close_frame_is_cut():
    client = Client()
    session = client.open()
    session.link.close(4409, "ä" * 100)
    assert client.close_code() == 4409
    assert client.engine.close_rcvd is not None
    assert client.engine.close_rcvd.reason == "ä" * 61


def test_the_clients_close_is_echoed_after_its_last_message_is_answered():
    client = Client()
    session = client.open()
    client.engine.send_text(b'{"type":"ping","id":1}')
    client.engine.send_close(1000, "bye")
    client.deliver()
    assert [frame.opcode for frame in client.frames()] == [Opcode.TEXT, Opcode.CLOSE]
    assert client.transport.ended is True
    client.hub.loop.tick()
    assert session.link is None


def test_pings_are_answered_in_order_with_data():
    client = Client()
    client.open()
    client.engine.send_text(b'{"type":"ping","id":1}')
    client.engine.send_ping(b"are you there")
    client.deliver()
    frames = client.frames()
    assert [frame.opcode for frame in frames] == [Opcode.TEXT, Opcode.PONG]
    assert frames[1].data == b"are you there"


def test_a_silent_client_is_pinged_and_one_that_answers_stays():
    client = Client()
    client.open()
    pings = 0
    for _ in range(6):
        client.hub.pass_time(10.0)
        pings += sum(frame.opcode is Opcode.PING for frame in client.frames())
        client.deliver()
    assert 4 <= pings <= 6
    assert client.close_code() is None


def test_a_busy_client_is_not_pinged():
    client = Client()
    client.open()
    for _ in range(20):
        client.hub.pass_time(2.0)
        client.send('{"type":"ping","id":1}')
        assert all(frame.opcode is Opcode.TEXT for frame in client.frames())


def test_a_client_without_a_pong_is_1011_after_20_seconds():
    client = Client()
    client.open()
    client.hub.pass_time(10.5)
    assert [frame.opcode for frame in client.frames()] == [Opcode.PING]
    client.engine.data_to_send()
    client.hub.pass_time(limits.PONG_TIMEOUT_S - 1.5)
    assert client.close_code() is None
    client.hub.pass_time(2.0)
    assert client.close_code() == 1011


def test_an_unasked_pong_does_not_stand_for_the_missing_one():
    client = Client()
    client.open()
    client.hub.pass_time(10.5)
    client.frames()
    client.engine.data_to_send()
    client.engine.send_pong(b"whatever")
    client.deliver()
    client.hub.pass_time(limits.PONG_TIMEOUT_S + 1.0)
    assert client.close_code() == 1011


def test_an_expired_token_is_4401():
    client = Client(query=ConnectQuery(frozenset(), None, token_expires_at=time.time() - 1.0))
    client.open()
    client.hub.pass_time(0.5)
    assert client.close_code() == 4401


def test_a_token_that_is_still_good_changes_nothing():
    client = Client(query=ConnectQuery(frozenset(), None, token_expires_at=time.time() + 3600.0))
    client.open()
    client.hub.pass_time(9.0)
    assert client.close_code() is None


def test_a_message_flood_is_4429():
    client = Client()
    client.open()
    for _ in range(int(limits.MESSAGE_BURST) + 1):
        client.send('{"type":"ping","id":1}')
    assert client.close_code() == 4429


def test_the_sustained_message_rate_passes():
    client = Client()
    client.open()
    for _ in range(40):
        for _ in range(50):
            client.send('{"type":"ping","id":1}')
        client.hub.pass_time(0.25)
    assert client.close_code() is None


def test_a_ping_flood_is_1008():
    client = Client()
    client.open()
    for _ in range(int(limits.CONTROL_FRAME_BURST) + 1):
        client.engine.send_ping(b"")
    client.deliver()
    assert client.close_code() == 1008


def test_nothing_after_a_violation_reaches_the_session():
    client = Client(Hub(STT_SERVICE_URL=""))
    session = client.open()
    client.engine.send_binary(b"\x00\x00")
    client.engine.send_text(b'{"type":"ping","id":1}')
    client.deliver()
    assert client.close_code() == 1003
    assert session.seq == 1


def test_endless_empty_fragments_are_1009():
    client = Client()
    client.open()
    client.engine.send_text(b"", fin=False)
    for _ in range(limits.MAX_FRAGMENTS):
        client.engine.send_continuation(b"", fin=False)
    client.deliver()
    assert client.close_code() == 1009


def test_fragments_with_control_frames_between_them():
    client = Client()
    client.open()
    text = (FRAGMENT % "grüße").encode()
    client.engine.send_text(text[:30], fin=False)
    client.engine.send_ping(b"between")
    client.engine.send_continuation(b"", fin=False)
    client.engine.send_continuation(text[30:], fin=True)
    client.deliver()
    frames = client.frames()
    assert sorted(frame.opcode.name for frame in frames) == ["PONG", "TEXT"]
    assert any("grüße".encode() in frame.data for frame in frames)


def test_bytes_may_come_one_by_one():
    client = Client()
    client.open()
    client.engine.send_text(b'{"type":"ping","id":1}')
    for byte in b"".join(client.engine.data_to_send()):
        client.connection.data_received(bytes((byte,)))
    assert len(client.frames()) == 1


def test_bad_messages_are_answered_and_the_tenth_is_4400():
    client = Client()
    client.open()
    for _ in range(limits.MAX_BAD_MESSAGES - 1):
        client.send('{"type":"nonsense"}')
    assert [b"bad_message" in frame.data for frame in client.frames()] == [True] * (limits.MAX_BAD_MESSAGES - 1)
    assert client.close_code() is None
    client.send("{")
    assert client.close_code() == 4400


@pytest.mark.parametrize("payload", [b'{"type":"ping","id":"\xff"}', b"\xc0\xaf", b"\xed\xa0\x80"])
def test_invalid_utf8_is_1007(payload):
    client = Client()
    client.open()
    client.engine.send_text(payload)
    client.deliver()
    assert client.close_code() == 1007


def test_a_lost_connection_is_freed_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        client = Client()
        client.open()
        client.send('{"type":"ping","id":1}')
        freed = weakref.ref(client.connection._engine)
        client.connection.connection_lost(None)
        client.hub.left.clear()
        client.hub.loop.tick()
        del client
        assert freed() is None
    finally:
        gc.enable()


def test_the_client_engine_of_websockets_accepts_the_handshake():
    from websockets.http11 import Response
    from websockets.uri import parse_uri

    from orchestrator.server.entry import _handshake
    from orchestrator.server.head import ParsedHead, parse_head

    engine = ClientProtocol(parse_uri("ws://localhost/orchestrate?session_id=test_001"), subprotocols=["bearer.a.b"])  # type: ignore[list-item]
    engine.send_request(engine.connect())
    request = parse_head(engine.data_to_send()[0])
    assert isinstance(request, ParsedHead)
    engine.receive_data(_handshake(request))
    (event,) = engine.events_received()
    assert isinstance(event, Response)
    assert engine.state is State.OPEN
    assert engine.subprotocol == "bearer.a.b"
