"""A client WebSocket on the sans-I/O engine: messages are pushed to a listener, writing never blocks."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Mapping
from typing import Protocol, cast
from urllib.parse import quote

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.uri import WebSocketURI, parse_uri

from orchestrator.downstream.deadline import Deadline
from orchestrator.downstream.http_pool import StatusError
from orchestrator.errors import DownstreamError, Failure

MAX_WS_MESSAGE_BYTES = 1_048_576
_WRITE_HIGH_BYTES = 32_768
_WRITE_LOW_BYTES = 8192
_KERNEL_BUFFER_BYTES = 32_768
_UNACKNOWLEDGED_MS = 10_000
_CLOSE_SECONDS = 1.0

_quiet = logging.getLogger(__name__)


class WsListener(Protocol):
    """What a link reports. All calls come from the loop; after `ws_closed` none follows."""

    def ws_message(self, data: bytes, *, is_text: bool) -> None:
        """A whole message."""
        ...

    def ws_writable(self) -> None:
        """The peer takes data again."""
        ...

    def ws_closed(self, detail: str) -> None:
        """The open connection is gone, by whichever side."""
        ...


class WsEndpoint:
    """A WebSocket path of a service whose base URL is `http(s)://`; one connection a session.

    `api_key` is sent as a bearer token. `connect` opens a link within `timeout` seconds.
    """

    def __init__(self, service: str, base_url: str, path: str, *, api_key: str = "") -> None:
        self.service = service
        self._url = "ws" + base_url.removeprefix("http") + path
        self._ssl = ssl.create_default_context() if base_url.startswith("https:") else None
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def connect(self, session_id: str, listener: WsListener, timeout: float) -> WsLink:
        """An open link. Raises DownstreamError; a refusal by status is a StatusError."""
        loop = asyncio.get_running_loop()
        uri = parse_uri(f"{self._url}?session_id={quote(session_id, safe=':')}")
        link = WsLink(loop, self.service, uri, self._headers, listener)
        deadline = Deadline(loop, self.service, timeout)
        try:
            with deadline:
                await loop.create_connection(
                    lambda: link, uri.host, uri.port,
                    ssl=self._ssl, server_hostname=uri.host if self._ssl is not None else None,
                )  # fmt: skip
                await link.opened
        except OSError as error:
            link.abort()
            raise DownstreamError(self.service, Failure.UNREACHABLE, str(error)[:200]) from error
        except BaseException:
            link.abort()
            raise
        finally:
            deadline.close()
        return link


class WsLink(asyncio.Protocol):
    """One connection. `writable` is False while the peer does not take what was written."""

    __slots__ = ("_close_timer", "_failed", "_headers", "_listener", "_loop", "_parts", "_protocol", "_service",
                 "_text", "_transport", "opened", "writable")  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        service: str,
        uri: WebSocketURI,
        headers: Mapping[str, str],
        listener: WsListener,
    ) -> None:
        self._loop = loop
        self._service = service
        self._protocol = ClientProtocol(uri, max_size=MAX_WS_MESSAGE_BYTES, logger=_quiet)
        self._headers = headers
        self._listener: WsListener | None = listener
        self._transport: asyncio.Transport | None = None
        self._close_timer: asyncio.TimerHandle | None = None
        self._parts: list[bytes] = []
        self._text = False
        self.opened: asyncio.Future[None] = loop.create_future()
        self.writable = True

    @property
    def is_open(self) -> bool:
        """Messages can be sent."""
        transport = self._transport
        return transport is not None and self._protocol.state is OPEN and not transport.is_closing()

    def send_text(self, data: bytes) -> None:
        """Send a text message; dropped unless the link is open."""
        if self.is_open:
            self._protocol.send_text(data)
            self._flush()

    def send_binary(self, data: bytes) -> None:
        """Send a binary message; dropped unless the link is open."""
        if self.is_open:
            self._protocol.send_binary(data)
            self._flush()

    def hold_back(self, hold: bool) -> None:
        """Stop or go on reading, so that a sender faster than its consumer is slowed down by TCP."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if hold:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def close(self) -> None:
        """Start the closing handshake; nothing is reported any more."""
        self._listener = None
        if not self.is_open:
            self.abort()
            return
        self._protocol.send_close(1000)
        self._flush()

    def abort(self) -> None:
        """Drop the connection at once; nothing is reported any more."""
        self._listener = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._listener is None:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES, low=_WRITE_LOW_BYTES)
        self._bound_kernel_buffer(transport.get_extra_info("socket"))
        request = self._protocol.connect()
        for name, value in self._headers.items():
            request.headers[name] = value
        self._protocol.send_request(request)
        self._flush()

    def data_received(self, data: bytes) -> None:
        protocol = self._protocol
        protocol.receive_data(data)
        for event in protocol.events_received():
            if type(event) is Frame:
                self._frame(event)
        if not self.opened.done():
            self._settle_handshake()
        self._flush()

    def eof_received(self) -> bool:
        self._protocol.receive_eof()
        self._flush()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None
        if not self.opened.done():
            self._refuse(DownstreamError(self._service, Failure.UNREACHABLE, "closed during the handshake"))
        listener, self._listener = self._listener, None
        if listener is not None:
            code = self._protocol.close_code
            listener.ws_closed(str(error)[:200] if error is not None else f"close code {code}")

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self._listener is not None:
            self._listener.ws_writable()

    def _bound_kernel_buffer(self, sock: socket.socket | None) -> None:
        """Audio that the kernel holds for a stuck peer comes too late; and a peer that is gone is known sooner."""
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _KERNEL_BUFFER_BYTES)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)

    def _settle_handshake(self) -> None:
        if self._protocol.state is OPEN:
            self.opened.set_result(None)
            return
        refused = self._protocol.handshake_exc
        if isinstance(refused, InvalidStatus):
            self._refuse(StatusError(self._service, refused.response.status_code))
        elif refused is not None:
            kind = type(refused).__name__ if isinstance(refused, InvalidHandshake) else "no HTTP response"
            self._refuse(DownstreamError(self._service, Failure.BAD_ANSWER, f"WebSocket handshake: {kind}"))

    def _refuse(self, error: DownstreamError) -> None:
        self._listener = None
        self.opened.set_exception(error)
        self.opened.exception()

    def _frame(self, frame: Frame) -> None:
        opcode = frame.opcode
        if opcode is Opcode.TEXT or opcode is Opcode.BINARY:
            self._text = opcode is Opcode.TEXT
            if frame.fin:
                self._deliver(frame.data)
            else:
                self._parts = [bytes(frame.data)]
        elif opcode is Opcode.CONT:
            if frame.data:
                self._parts.append(bytes(frame.data))
            if frame.fin:
                parts, self._parts = self._parts, []
                self._deliver(b"".join(parts))

    def _deliver(self, data: bytes | bytearray | memoryview) -> None:
        if self._listener is not None:
            self._listener.ws_message(data if type(data) is bytes else bytes(data), is_text=self._text)

    def _flush(self) -> None:
        transport = self._transport
        for data in self._protocol.data_to_send():
            if transport is None or transport.is_closing():
                continue
            if data:
                transport.write(data)
            else:
                transport.close()
        if transport is not None and self._close_timer is None and self._protocol.close_expected():
            self._close_timer = self._loop.call_later(_CLOSE_SECONDS, transport.abort)
