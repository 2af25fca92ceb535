"""WebSocket services whose every connection is served by a test's own coroutine."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response


class Peer:
    """The service's end of one connection."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket
        assert socket.request is not None
        parts = urlsplit(socket.request.path)
        self.path = parts.path
        self.session_id = parse_qs(parts.query).get("session_id", [""])[0]
        self.headers = socket.request.headers

    async def send(self, kind: str, **fields: Any) -> None:
        await self.socket.send(orjson.dumps({"type": kind, **fields}).decode())

    async def audio(self, pcm: bytes, rate: int = 22_050, index: int = 0) -> None:
        data = base64.b64encode(pcm).decode()
        await self.send("audio", data=data, index=index, sample_rate=rate)

    async def receive(self) -> Any:
        """The next message: an object, or bytes."""
        message = await self.socket.recv()
        return message if isinstance(message, bytes) else orjson.loads(message)

    async def speak(self, *parts: bytes, text: str | None = None) -> None:
        """A whole answer to a `synthesize`."""
        await self.send("sentence_start", index=0, **({} if text is None else {"text": text}))
        for part in parts:
            await self.audio(part)
        await self.send("sentence_playing", index=0)
        await self.send("sentence_complete", index=0, duration_ms=10.0)
        await self.send("complete")


class WsServer:
    """What a test sees of its service. `refuse` is a status that every handshake gets instead."""

    def __init__(self, handler: Callable[[Peer], Awaitable[None]]) -> None:
        self.handler = handler
        self.connections = 0
        self.open = 0
        self.peers: list[Peer] = []
        self.refuse: int | None = None
        self.port = 0
        self._server: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        self._server = await serve(
            self._serve, "127.0.0.1", port, process_request=self._admit, compression=None, max_size=None,
            ping_interval=None,
        )  # fmt: skip
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    def _admit(self, socket: ServerConnection, request: Request) -> Response | None:
        if self.refuse is None:
            return None
        return socket.respond(HTTPStatus(self.refuse), "no\n")

    async def _serve(self, socket: ServerConnection) -> None:
        self.connections += 1
        self.open += 1
        peer = Peer(socket)
        self.peers.append(peer)
        try:
            await self.handler(peer)
        except (ConnectionClosed, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1


@asynccontextmanager
async def ws_serving(handler: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[WsServer]:
    server = WsServer(handler)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
