"""Services that misbehave exactly, and what the tests here call them with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from orchestrator.downstream.types import Call
from orchestrator.errors import DownstreamError

T = TypeVar("T")

CALL = Call("test_001", 3, "stage", timeout_ms=5000.0, stall_ms=5000.0)
SHORT = Call("test_001", 3, "stage", timeout_ms=150.0, stall_ms=150.0)


async def failure_of(awaitable: Awaitable[Any]) -> DownstreamError:
    """The DownstreamError that `awaitable` raises; anything else fails the test."""
    try:
        result = await awaitable
    except DownstreamError as error:
        return error
    raise AssertionError(f"no error, but {result!r}")


async def collect(stream: AsyncIterator[T]) -> list[T]:
    return [piece async for piece in stream]


Handler = Callable[["Connection"], Awaitable[None]]


class Connection:
    """A client's connection at a RawServer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.requests: list[bytes] = []

    async def request(self) -> tuple[dict[str, str], bytes]:
        """The next request's headers (names in lower case, the target as `:target`) and its body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {":target": lines[0].split(" ")[1], ":method": lines[0].split(" ")[0]}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if colon:
                headers[name.lower()] = value.strip()
        body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append(body)
        return headers, body

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def gone(self) -> None:
        """Returns when the client has closed the connection."""
        while await self.reader.read(65_536):
            pass


class RawServer:
    """A TCP server whose every connection is served by `handler`; a handler that returns closes it."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections = 0
        self.open = 0
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            await self.handler(Connection(reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except RuntimeError as error:
            # What uvloop says to a write on a transport that the client has reset.
            assert "closed" in str(error)
        finally:
            self.open -= 1
            writer.transport.abort() if writer.is_closing() else writer.close()


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[RawServer]:
    server = RawServer(handler)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def http_server(answer: Callable[[dict[str, str], bytes, Connection], Awaitable[bool]]) -> Any:
    """A keep-alive HTTP server; `answer(headers, body, connection)` says whether the connection stays open."""

    @asynccontextmanager
    async def running() -> AsyncIterator[RawServer]:
        async def handler(connection: Connection) -> None:
            while True:
                headers, body = await connection.request()
                server.requests.append((headers, body))
                if not await answer(headers, body, connection):
                    return

        server = RawServer(handler)
        await server.start()
        try:
            yield server
        finally:
            await server.stop()

    return running()


def ok(body: bytes, kind: str = "application/json") -> bytes:
    """A whole 200 response."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (kind.encode(), len(body), body)


def stream_head(kind: str) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % kind.encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST = b"0\r\n\r\n"
