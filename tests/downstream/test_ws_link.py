"""What only a transport under control can show about a WebSocket link."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from orchestrator.downstream.ws_link import WsLink
from tests.loops import virtual


class Listener:
    def __init__(self) -> None:
        self.messages: list[tuple[bytes, bool]] = []
        self.closed: list[str] = []
        self.writable = 0

    def ws_message(self, data: bytes, *, is_text: bool) -> None:
        self.messages.append((data, is_text))

    def ws_writable(self) -> None:
        self.writable += 1

    def ws_closed(self, detail: str) -> None:
        self.closed.append(detail)


class Transport:
    """A transport that behaves like uvloop's: a write on a closed one raises."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.closing = False
        self.aborted = False

    def set_write_buffer_limits(self, high: int, low: int) -> None: ...

    def get_extra_info(self, name: str) -> None: ...

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        if self.closing:
            raise RuntimeError("the handler is closed")
        self.written += data

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True


def opened() -> tuple[WsLink, Transport, Listener, ServerProtocol]:
    """An open link, and the engine of its peer."""
    transport, listener = Transport(), Listener()
    link = WsLink(asyncio.get_running_loop(), "tts", parse_uri("ws://h/x"), {}, listener)
    wire: Any = transport
    link.connection_made(wire)
    server = ServerProtocol()
    server.receive_data(bytes(transport.written))
    (request,) = server.events_received()
    server.send_response(server.accept(request))  # type: ignore[arg-type]
    transport.written.clear()
    link.data_received(b"".join(server.data_to_send()))
    assert link.is_open
    return link, transport, listener, server


@virtual
async def test_sending_after_the_peers_reset_is_dropped() -> None:
    link, transport, listener, _server = opened()
    transport.closing = True
    link.send_text(b"{}")
    link.send_binary(b"\0")
    link.close()
    assert not link.is_open
    link.connection_lost(ConnectionResetError("reset"))
    assert listener.closed == []


@virtual
async def test_a_ping_is_answered_and_tells_nobody() -> None:
    link, transport, listener, server = opened()
    server.send_ping(b"?")
    link.data_received(b"".join(server.data_to_send()))
    server.receive_data(bytes(transport.written))
    (pong,) = server.events_received()
    assert isinstance(pong, Frame)
    assert (pong.opcode, pong.data) == (Opcode.PONG, b"?")
    assert listener.messages == []


@virtual
async def test_a_closing_handshake_that_is_not_answered_ends_after_a_second() -> None:
    link, transport, listener, _server = opened()
    link.close()
    await asyncio.sleep(0.9)
    assert not transport.aborted
    await asyncio.sleep(0.2)
    assert transport.aborted
    link.connection_lost(None)
    assert listener.closed == []


@virtual
async def test_control_frames_between_fragments_and_empty_fragments() -> None:
    link, _transport, listener, server = opened()
    server.send_text(b"a", fin=False)
    server.send_ping(b"")
    for _ in range(1000):
        server.send_continuation(b"", fin=False)
    server.send_continuation(b"b", fin=True)
    server.send_binary(b"c")
    link.data_received(b"".join(server.data_to_send()))
    assert listener.messages == [(b"ab", True), (b"c", False)]


@pytest.mark.parametrize("error", [None, ConnectionResetError("reset")])
def test_a_lost_connection_is_reported_once(error: Exception | None) -> None:
    @virtual
    async def run() -> None:
        link, _transport, listener, _server = opened()
        link.pause_writing()
        assert not link.writable
        link.resume_writing()
        assert listener.writable == 1
        link.connection_lost(error)
        link.close()
        link.abort()
        assert len(listener.closed) == 1

    run()
