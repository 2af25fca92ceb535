"""The WebSocket on real sockets: frames as RFC 6455 allows and forbids them, and the close codes of the protocol."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.server.fakes import AUDIO_FRAME
from tests.server.pools import RunningPool, until
from tests.server.test_head import head

pytestmark = pytest.mark.server

PING = b'{"type":"ping","id":1}'
OpenClient = Callable[[RunningPool, str], tuple[ClientConnection, dict[str, Any]]]
TEXT, BINARY, CLOSE, PING_OPCODE, PONG = 1, 2, 8, 9, 10


def frame(opcode: int, payload: bytes, *, fin: bool = True, rsv: int = 0, masked: bool = True) -> bytes:
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    mask_bit = 0x80 if masked else 0
    size = len(payload)
    if size < 126:
        header = struct.pack("!BB", first, mask_bit | size)
    elif size < 65_536:
        header = struct.pack("!BBH", first, mask_bit | 126, size)
    else:
        header = struct.pack("!BBQ", first, mask_bit | 127, size)
    if not masked:
        return header + payload
    key = os.urandom(4)
    return header + key + bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))


class RawClient:
    """A WebSocket client that sends whatever bytes a test wants."""

    def __init__(self, pool: RunningPool, session_id: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", pool.port), timeout=10)
        self.socket.sendall(head(f"/orchestrate?session_id={session_id}"))
        self._buffer = b""
        while b"\r\n\r\n" not in self._buffer:
            self._buffer += self.socket.recv(65536)
        self.handshake, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        opcode, payload = self.read()
        assert (opcode, json.loads(payload)["type"]) == (TEXT, "connected")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            chunk = self.socket.recv(65536)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def read(self) -> tuple[int, bytes]:
        first, size = self._exactly(2)
        assert not size & 0x80, "a server does not mask"
        if size == 126:
            (size,) = struct.unpack("!H", self._exactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self._exactly(8))
        return first & 0x0F, self._exactly(size)

    def close_code(self) -> int:
        """Read on until the close frame; after it the server must end the connection by itself."""
        while True:
            opcode, payload = self.read()
            if opcode == CLOSE:
                break
        self.send(frame(CLOSE, payload[:2]))
        with pytest.raises(EOFError):
            self._exactly(1)
        return int.from_bytes(payload[:2], "big") if payload else 1005


@pytest.fixture
def raw(fake_pool: RunningPool, request: pytest.FixtureRequest) -> Iterator[RawClient]:
    client = RawClient(fake_pool, f"raw-{abs(hash(request.node.nodeid))}")
    yield client
    client.socket.close()


@pytest.fixture
def open_client() -> Iterator[OpenClient]:
    """`open_client(pool, session_id)`: the client and its first message."""
    with contextlib.ExitStack() as clients:

        def open_one(pool: RunningPool, session_id: str) -> tuple[ClientConnection, dict[str, Any]]:
            client = clients.enter_context(connect(f"{pool.url}?session_id={session_id}"))
            return client, json.loads(client.recv(timeout=5))

        yield open_one


def test_nothing_is_negotiated_that_was_not_asked_for(raw: RawClient):
    lines = raw.handshake.decode().lower()
    assert "sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in lines
    assert "extensions" not in lines
    assert "protocol:" not in lines


def test_compression_is_not_negotiated(fake_pool: RunningPool):
    with connect(f"{fake_pool.url}?session_id=deflate", compression="deflate") as client:
        assert client.protocol.extensions == []


@pytest.mark.parametrize("pieces", [1, 2, 7, len(PING)])
def test_messages_in_fragments(raw: RawClient, pieces):
    size = -(-len(PING) // pieces)
    parts = [PING[at : at + size] for at in range(0, len(PING), size)]
    for index, part in enumerate(parts):
        raw.send(frame(TEXT if index == 0 else 0, part, fin=index == len(parts) - 1))
    assert json.loads(raw.read()[1])["type"] == "pong"


def test_control_frames_between_fragments(raw: RawClient):
    raw.send(frame(TEXT, PING[:5], fin=False) + frame(PING_OPCODE, b"in between") + frame(0, PING[5:]))
    answers = dict([raw.read(), raw.read()])
    assert answers[PONG] == b"in between"
    assert json.loads(answers[TEXT])["id"] == 1


@pytest.mark.parametrize("payload", [b"", b"x", b"y" * 125])
def test_pings_are_answered_with_their_payload(raw: RawClient, payload):
    raw.send(frame(PING_OPCODE, payload))
    assert raw.read() == (PONG, payload)


def test_bytes_may_come_one_by_one(raw: RawClient):
    for byte in frame(TEXT, PING):
        raw.send(bytes((byte,)))
    assert json.loads(raw.read()[1])["type"] == "pong"


def test_audio_goes_through_unchanged(raw: RawClient):
    for size in (2, 124, 126, 3200, 65_536):
        raw.send(frame(BINARY, b"\x07" * size))
        assert raw.read() == (BINARY, b"\x07" * size)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(TEXT, PING, masked=False), 1002),
        (frame(TEXT, PING, rsv=4), 1002),
        (frame(TEXT, PING, rsv=1), 1002),
        (frame(3, b""), 1002),
        (frame(11, b""), 1002),
        (frame(PING_OPCODE, b"x" * 126), 1002),
        (frame(PING_OPCODE, b"x", fin=False), 1002),
        (frame(0, b"x"), 1002),
        (frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"), 1002),
        (frame(CLOSE, b"x"), 1002),
        (frame(CLOSE, struct.pack("!H", 999)), 1002),
        (frame(CLOSE, struct.pack("!H", 1005)), 1002),
        (frame(CLOSE, struct.pack("!H", 1000) + b"\xff"), 1007),
        (frame(TEXT, b'{"type":"ping","id":"\xff"}'), 1007),
        (frame(TEXT, b"\xe2\x82", fin=False) + frame(0, b"\x20"), 1007),
        (frame(TEXT, b"x" * 65_537), 1009),
        (struct.pack("!BBQ", 0x81, 0x80 | 127, 1 << 62), 1009),
        (frame(TEXT, b"x" * 60_000, fin=False) + frame(0, b"x" * 6_000), 1009),
        (frame(PING_OPCODE, b"") * 101, 1008),
        (frame(TEXT, b'{"type":"nonsense"}') * 10, 4400),
        (frame(TEXT, PING) * 401, 4429),
        (frame(TEXT, b'{"type":"stt_fragment","text":"!break"}'), 1011),
        (frame(CLOSE, b""), 1005),
        (frame(CLOSE, struct.pack("!H", 1000) + b"bye"), 1000),
        (frame(CLOSE, struct.pack("!H", 3456)), 3456),
    ],
)
def test_close_codes(raw: RawClient, data, code):
    raw.send(data)
    assert raw.close_code() == code


@pytest.mark.parametrize(
    "message",
    [
        b"{",
        b"[]",
        b"null",
        b'{"type":"stt_fragment"}',
        b'{"type":"stt_fragment","text":3}',
        b'{"type":"vad_end","confidence":1.5}',
        b'{"type":"ping","session_id":"somebody else"}',
    ],
)
def test_a_bad_message_is_an_error_and_the_session_goes_on(raw: RawClient, message):
    raw.send(frame(TEXT, message))
    error = json.loads(raw.read()[1])
    assert (error["type"], error["code"], error["fatal"]) == ("error", "bad_message", False)
    raw.send(frame(TEXT, PING))
    assert json.loads(raw.read()[1])["type"] == "pong"


def test_audio_without_a_relay_is_1003(start_fake_pool: Callable[..., RunningPool], open_client: OpenClient):
    client, _ = open_client(start_fake_pool({"STT_SERVICE_URL": ""}), "no-relay")
    client.send(b"\x00\x00")
    with pytest.raises(ConnectionClosed, match="1003"):
        client.recv(timeout=5)


def test_the_newer_connection_takes_the_session(fake_pool: RunningPool, open_client: OpenClient):
    older, _ = open_client(fake_pool, "twice")
    newer, first = open_client(fake_pool, "twice")
    assert first["resumed"] is True
    with pytest.raises(ConnectionClosed, match="4409"):
        older.recv(timeout=5)
    newer.send(PING.decode())
    assert json.loads(newer.recv(timeout=5))["type"] == "pong"


def test_messages_sent_while_the_session_is_opened_are_not_lost(fake_pool: RunningPool):
    with socket.create_connection(("127.0.0.1", fake_pool.port), timeout=5) as client:
        client.sendall(head("/orchestrate?session_id=slow-1") + frame(TEXT, PING))
        client.sendall(frame(TEXT, PING) * 3)
        received = b""
        while received.count(b'"pong"') < 4:
            received += client.recv(65536)
    assert received.index(b'"connected"') < received.index(b'"pong"')


def test_a_client_that_leaves_while_its_session_is_opened(fake_pool: RunningPool):
    for number in range(5):
        client = socket.create_connection(("127.0.0.1", fake_pool.port), timeout=5)
        client.sendall(head(f"/orchestrate?session_id=slow-gone-{number}"))
        client.close()
    until(lambda: json.loads(fake_pool.ask("/health")[2])["active_sessions"] == 0, 5, "a place is not given back")


def test_a_session_that_cannot_be_opened_is_1011(fake_pool: RunningPool):
    with connect(f"{fake_pool.url}?session_id=broken-1") as client, pytest.raises(ConnectionClosed, match="1011"):
        client.recv(timeout=5)


def test_a_slow_reader_gets_everything_and_its_session_is_told(fake_pool: RunningPool):
    client = RawClient(fake_pool, "slow-reader")
    described = {"writable": True, "resumed_writing": 0}
    orders = 0
    while described["writable"]:
        client.send(frame(TEXT, b'{"type":"stt_fragment","text":"!audio 250"}'))
        orders += 1
        described = json.loads(fake_pool.ask("/sessions/slow-reader")[2])
        assert orders < 40
    seen = 0
    while seen < orders * 250:
        opcode, payload = client.read()
        seen += opcode == BINARY and payload == AUDIO_FRAME
    described = json.loads(fake_pool.ask("/sessions/slow-reader")[2])
    assert (described["writable"], described["resumed_writing"]) == (True, 1)
    client.socket.close()


def test_an_interrupted_answer_sends_no_audio(raw: RawClient):
    raw.send(frame(TEXT, b'{"type":"stt_fragment","text":"!interrupt"}'))
    assert [json.loads(raw.read()[1])["type"] for _ in range(2)] == ["state_update", "interrupted"]
    raw.send(frame(TEXT, PING))
    assert raw.read()[0] == TEXT
