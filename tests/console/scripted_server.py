"""A server that speaks the client protocol from a script: static files, WebSocket, a record of all that came in.

It runs on a thread with a loop of its own, so that a test in Playwright's synchronous style can drive it. What it does
with a conversation is a `Script`; without one it only records, and the test says everything by hand.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

CONSOLE = Path(__file__).parents[2] / "orchestrator" / "server" / "console"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
STRICT_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
SAMPLE_RATE = 24_000
AUDIO_FORMAT = {"encoding": "pcm_s16le", "sample_rate": SAMPLE_RATE, "channels": 1}
PATIENCE_SECONDS = 15.0


@dataclass
class Link:
    """One WebSocket connection: its query, what came in, and the means to answer."""

    socket: ServerConnection
    query: dict[str, str]
    seq: int = 0
    messages: list[dict[str, Any]] = field(default_factory=list)
    audio: list[bytes] = field(default_factory=list)
    closed: bool = False

    async def say(self, kind: str, **fields: Any) -> None:
        self.seq += 1
        head = {"type": kind, "session_id": self.query["session_id"], "seq": self.seq, "timestamp": time.time()}
        await self.socket.send(json.dumps({**head, **fields}))

    async def play(self, pcm: bytes) -> None:
        await self.socket.send(pcm)

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]


class Script(Protocol):
    """What happens with a connection. Each call may say things on the link."""

    async def opened(self, link: Link) -> None: ...

    async def heard(self, link: Link, message: dict[str, Any] | bytes) -> None: ...

    async def gone(self, link: Link) -> None: ...


class ByHand:
    """Greets, and leaves the rest to the test."""

    def __init__(self, **greeting: Any) -> None:
        self.greeting = greeting

    async def opened(self, link: Link) -> None:
        await link.say("connected", **greeting(**{"resumed": "last_seq" in link.query, **self.greeting}))

    async def heard(self, link: Link, message: dict[str, Any] | bytes) -> None:
        if isinstance(message, dict) and message["type"] == "ping":
            await link.say("pong", id=message.get("id"))

    async def gone(self, link: Link) -> None:
        pass


def greeting(**fields: Any) -> dict[str, Any]:
    usual = {
        "state": "IDLE",
        "turn_number": 0,
        "resumed": False,
        "node": "node-a",
        "slot": 1,
        "protocol": 1,
        "budget_ms": 445.0,
        "audio_format": AUDIO_FORMAT,
        "max_message_bytes": 65_536,
    }
    return {**usual, **fields}


class ScriptedServer:
    """Start with `with`. `refuse_with` answers handshakes with that status instead of a connection."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.links: list[Link] = []
        self.refuse_with: HTTPStatus | None = None
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted-server")
        self._server: Server | None = None

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}/"

    @property
    def link(self) -> Link:
        return self.links[-1]

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        self.run(self.listen())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Awaitable[Any]) -> Any:
        """Runs `work` on the server's loop and waits for it."""

        async def awaited() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result(PATIENCE_SECONDS)

    async def listen(self) -> None:
        """(Re)opens the port; the same one after `shut`."""
        self._server = await serve(
            self._serve_link,
            "localhost",
            self.port,
            process_request=self._answer_http,
            compression=None,
            ping_interval=None,
            close_timeout=0.5,
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def shut(self) -> None:
        """Closes the port and every connection."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    def say(self, kind: str, **fields: Any) -> None:
        self.run(self.link.say(kind, **fields))

    def play(self, pcm: bytes) -> None:
        self.run(self.link.play(pcm))

    def close(self, code: int, reason: str = "") -> None:
        self.run(self.link.socket.close(code, reason))

    def abort(self) -> None:
        """Cuts the connection without a close frame; the browser sees 1006."""
        self._loop.call_soon_threadsafe(self.link.socket.transport.abort)

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """The first true value of `condition`. Fails the test after some seconds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.01)
        raise AssertionError(f"the page did not send {what} within {PATIENCE_SECONDS:g} s")

    def wait_for(self, kind: str, count: int = 1) -> dict[str, Any]:
        """The `count`th message of this type on the newest connection."""
        found = self.wait(lambda: len(self.link.of_type(kind)) >= count and self.link.of_type(kind), kind)
        message: dict[str, Any] = found[count - 1]
        return message

    async def _serve_link(self, socket: ServerConnection) -> None:
        assert socket.request is not None
        query = {name: values[0] for name, values in parse_qs(urlsplit(socket.request.path).query).items()}
        link = Link(socket, query, seq=int(query.get("last_seq", 0)))
        self.links.append(link)
        try:
            await self.script.opened(link)
            async for frame in socket:
                if isinstance(frame, bytes):
                    link.audio.append(frame)
                    await self.script.heard(link, frame)
                else:
                    link.messages.append(json.loads(frame))
                    await self.script.heard(link, link.messages[-1])
        except ConnectionClosed:
            pass
        finally:
            link.closed = True
            await self.script.gone(link)

    def _answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        path = urlsplit(request.path).path
        if self.refuse_with is not None and path.startswith(("/orchestrate", "/sessions/")):
            return connection.respond(self.refuse_with, "refused by the script\n")
        if path == "/orchestrate":
            return None
        if path.startswith("/sessions/"):
            return connection.respond(HTTPStatus.OK, "{}")
        name = "index.html" if path == "/" else path.removeprefix("/")
        file = CONSOLE / name
        if "/" in name or not file.is_file():
            return connection.respond(HTTPStatus.NOT_FOUND, "not found\n")
        body = file.read_bytes()
        headers = Headers(
            {
                "Content-Type": CONTENT_TYPES[file.suffix],
                "Content-Length": str(len(body)),
                "Content-Security-Policy": STRICT_CSP,
                "X-Content-Type-Options": "nosniff",
                "Connection": "close",
            }
        )
        return Response(HTTPStatus.OK.value, HTTPStatus.OK.phrase, headers, body)
