"""The first protocol of every connection: reads the request head once and decides who answers.

Either another worker (the descriptor is handed over), the HTTP pages, or a Connection that takes over the transport.
Refusals end with a lingering close, so that the client reads the answer before it learns of the end.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Final, cast

from orchestrator.conversation.registry import ConnectQuery
from orchestrator.server.connection import Connection
from orchestrator.server.handoff import MAX_REST_BYTES, Handed
from orchestrator.server.head import HEAD_END, MAX_HEAD_BYTES, ParsedHead, Refusal, parse_head
from orchestrator.server.http import Response, answer, refusal_response, serialize
from orchestrator.server.wheel import NOT_SCHEDULED

if TYPE_CHECKING:
    from orchestrator.server.hub import Hub

HEAD_TIMEOUT_S: Final = 2.0
LINGER_S: Final = 1.0
MAX_LINGER_BYTES: Final = 262_144

# RFC 6455 section 1.3.
_ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_REASONS: Final = {
    400: "bad_request", 404: "not_found", 405: "method", 426: "upgrade_required", 431: "head_too_large", 505: "version",
}  # fmt: skip


class Entry(asyncio.Protocol):
    """`handed` is a connection that another worker accepted; without it the head is still to be read."""

    __slots__ = (
        "_answered", "_at_eof", "_discarded", "_handed", "_head", "_hub", "_pending", "_transport", "wheel_tick",
    )  # fmt: skip

    def __init__(self, hub: Hub, handed: Handed | None = None) -> None:
        self.wheel_tick = NOT_SCHEDULED
        self._hub = hub
        self._handed = handed
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._pending = False
        self._answered = False
        self._at_eof = False
        self._discarded = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        handed, self._handed = self._handed, None
        if handed is not None:
            self._pending = True
            self._route(handed.head, handed.rest, handed.hops)
            return
        self._hub.heads.change(1)
        self._hub.wheel.schedule(self, self._hub.loop.time() + HEAD_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        if self._pending or self._answered:
            self._discard(len(data))
            return
        head = self._head + data if self._head else data
        end = head.find(HEAD_END, max(0, len(self._head) - len(HEAD_END) + 1))
        size = end + len(HEAD_END) if end >= 0 else len(head)
        if size > MAX_HEAD_BYTES:
            self._head_done()
            self._refuse(Refusal(431, f"the request head has more than {MAX_HEAD_BYTES} bytes"))
        elif end < 0:
            self._head = head
        else:
            self._head_done()
            self._route(head[:size], head[size:], hops=0)

    def eof_received(self) -> bool:
        self._at_eof = True
        # An answer that is being made may still be sent to a client that closed only its own side.
        return self._pending and not self._answered

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._pending and not self._answered:
            self._hub.heads.change(-1)
        self._transport = None
        self._answered = True
        self._hub.wheel.cancel(self)

    def on_timer(self, now: float) -> None:
        """The head did not come in time, or the client does not close."""
        if self._transport is None:
            return
        if not self._answered and not self._pending:
            self._hub.observer.session_rejected("slow_head")
        self._transport.abort()

    def _head_done(self) -> None:
        self._pending = True
        self._head = b""
        self._hub.heads.change(-1)
        self._hub.wheel.cancel(self)

    def _route(self, head: bytes, rest: bytes, hops: int) -> None:
        hub = self._hub
        parsed = parse_head(head, hub.assets)
        if isinstance(parsed, Refusal):
            self._refuse(parsed)
        elif parsed.session_id:
            if len(rest) > MAX_REST_BYTES:
                self._refuse(Refusal(400, "data before the handshake was answered"))
                return
            slot = hub.place(parsed.session_id, hops)
            if slot != hub.slot:
                self._hand_over(slot, head, rest, hops)
                return
            if not hops:
                hub.observer.handed_off("local")
            self._serve_session(parsed, rest)
        else:
            self._respond(answer(hub, parsed), parsed.head_only)

    def _hand_over(self, slot: int, head: bytes, rest: bytes, hops: int) -> None:
        transport = self._transport
        assert transport is not None
        if self._hub.hand_over(slot, transport.get_extra_info("socket"), head, rest, hops):
            # abort() closes this process's descriptor only: no shutdown, so the client's connection lives on.
            self._answered = True
            transport.abort()
        else:
            self._send(refusal_response(self._hub.refuse_for_now("busy", "the server is busy")), head_only=False)

    def _serve_session(self, parsed: ParsedHead, rest: bytes) -> None:
        if parsed.route == "session":
            self._respond(answer(self._hub, parsed), parsed.head_only)
            return
        verdict = self._hub.admit(parsed)
        if isinstance(verdict, Refusal):
            self._send(refusal_response(verdict), head_only=False)
            return
        query = ConnectQuery(parsed.events, parsed.last_seq, verdict.expires_at)
        connection = Connection(self._hub, parsed.session_id, query, self._hub.next_connection_id())
        transport, self._transport = self._transport, None
        assert transport is not None
        transport.set_protocol(connection)
        connection.begin(transport, _handshake(parsed), rest)

    def _refuse(self, refusal: Refusal) -> None:
        self._hub.observer.session_rejected(_REASONS.get(refusal.status, "bad_request"))
        self._send(refusal_response(refusal), head_only=False)

    def _respond(self, response: Response | Awaitable[Response], head_only: bool) -> None:
        if isinstance(response, Response):
            self._send(response, head_only)
        else:
            self._hub.spawn(self._send_later(response, head_only))

    async def _send_later(self, response: Awaitable[Response], head_only: bool) -> None:
        self._send(await response, head_only)

    def _send(self, response: Response, head_only: bool) -> None:
        transport = self._transport
        if transport is None:
            return
        self._answered = True
        transport.write(serialize(response, head_only))
        if self._at_eof:
            transport.close()
            return
        transport.write_eof()
        self._hub.wheel.schedule(self, self._hub.loop.time() + LINGER_S)

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > MAX_LINGER_BYTES and self._transport is not None:
            self._transport.abort()


def _handshake(head: ParsedHead) -> bytes:
    accept = base64.b64encode(hashlib.sha1(head.key + _ACCEPT_GUID, usedforsecurity=False).digest()).decode()
    lines = (
        "HTTP/1.1 101 Switching Protocols\r\n"
        "Upgrade: websocket\r\n"
        "Connection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n"
    )
    if head.subprotocol is not None:
        lines += f"Sec-WebSocket-Protocol: {head.subprotocol}\r\n"
    return (lines + "\r\n").encode("ascii")
