"""HTTP/1.1 for the fake services: keep-alive, precomputed answers, delays measured from receipt."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from bench.delays import Delay
from bench.fake_config import Counters, FakeConfig, Script, Seen
from bench.timers import Handle, Timers

_MAX_HEAD = 65_536
_JSON = b"application/json"
_REASONS = {200: b"OK", 400: b"Bad Request", 404: b"Not Found", 411: b"Length Required"}


def response(status: int, body: bytes, content_type: bytes = _JSON) -> bytes:
    """A whole response with a Content-Length."""
    return b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        _REASONS.get(status, b"Scripted"),
        content_type,
        len(body),
        body,
    )


def stream_head(content_type: bytes) -> bytes:
    """The head of a chunked 200."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % content_type


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


class Request:
    """One parsed request."""

    __slots__ = ("_lower", "body", "head", "method", "path", "query", "received")

    def __init__(self, head: bytes, lower: bytes, body: bytes, received: float) -> None:
        self.head = head
        self._lower = lower
        self.body = body
        self.received = received
        method, _, rest = head[: head.index(b"\r\n")].partition(b" ")
        target = rest.partition(b" ")[0].decode("latin-1")
        self.method = method.decode("latin-1")
        self.path, _, self.query = target.partition("?")

    def header(self, lower_name: bytes) -> str:
        """The first value of a header (its name in lower case), or an empty string."""
        start = self._lower.find(b"\r\n" + lower_name + b":")
        if start < 0:
            return ""
        start += len(lower_name) + 3
        return self.head[start : self.head.index(b"\r\n", start)].strip().decode("latin-1")

    def headers(self) -> dict[str, str]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        pairs = (line.partition(":") for line in lines if line)
        return {name.lower(): value.strip() for name, _, value in pairs}


class Exchange:
    """One answer on its way out. Ends by completing, by the client going away, or never (a scripted hang)."""

    __slots__ = (
        "conn", "first_sent", "gap_s", "handle", "pieces", "position",
        "received", "seen", "start", "stop", "tag",
    )  # fmt: skip

    def __init__(self, conn: HttpConnection, received: float) -> None:
        self.conn = conn
        self.received = received
        self.handle: Handle | None = None
        self.pieces: Sequence[bytes] = ()
        self.position = 0
        self.gap_s = 0.0
        self.start = 0.0
        self.stop: tuple[int, bool] | None = None
        self.first_sent = 0.0
        self.seen: Seen | None = None
        self.tag = ""

    def send_pieces(self, after_s: float, pieces: Sequence[bytes], gap_s: float) -> None:
        """Writes `pieces` `gap_s` apart, the first one `after_s` after the request was received."""
        self.pieces = pieces if gap_s > 0 or self.stop is not None else (b"".join(pieces),)
        self.gap_s = gap_s
        self.start = self.received + after_s
        if self.stop is not None and self.stop[0] == 0:
            self.handle = self.conn.service.timers.at(self.start, self._cut)
            return
        self.handle = self.conn.service.timers.at(self.start, self._step)

    def _step(self) -> None:
        position = self.position
        conn = self.conn
        if position == 0:
            self.first_sent = conn.service.clock()
        conn.write(self.pieces[position])
        self.position = position = position + 1
        if position == len(self.pieces):
            self._finish()
        elif self.stop is not None and position >= self.stop[0]:
            self._cut()
        else:
            self.handle = conn.service.timers.at(self.start + position * self.gap_s, self._step)

    def _cut(self) -> None:
        """The scripted end of a stream: stall, or close."""
        self.handle = None
        if self.stop is not None and self.stop[1]:
            self.conn.close()

    def _finish(self) -> None:
        self.handle = None
        self.conn.service.finished(self)
        self.conn.exchange = None
        self.conn.resume()

    def cancel(self) -> None:
        if self.handle is not None:
            self.handle.cancel()
            self.handle = None


class HttpConnection(asyncio.Protocol):
    """One client connection of one fake service."""

    def __init__(self, service: FakeService) -> None:
        self.service = service
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.pending = b""
        self.counted = True
        self.used = False
        self.upgraded: Callable[[bytes], None] | None = None
        self.on_lost: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports do not derive from asyncio.Transport.
        self.transport = cast(asyncio.Transport, transport)
        self.service.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            exchange.cancel()
            self.service.abandoned(exchange)
        if self.on_lost is not None:
            self.on_lost()
        self.service.closed(self)

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self.upgraded is not None:
            self.upgraded(data)
            return
        if self.pending:
            data = self.pending + data
        if self.exchange is not None:
            self.pending = data
            return
        self._take(data)

    def resume(self) -> None:
        """Looks at what a pipelining client sent while its last request was being answered."""
        if self.pending:
            data, self.pending = self.pending, b""
            self._take(data)

    def _take(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self.pending = data
            if len(data) > _MAX_HEAD:
                self._refuse(400)
            return
        head = data[: end + 2]
        lower = head.lower()
        body_at = end + 4
        length = _content_length(lower)
        if length is None:
            self._refuse(411)
            return
        if len(data) < body_at + length:
            self.pending = data
            return
        self.pending = data[body_at + length :]
        request = Request(head, lower, data[body_at : body_at + length], self.service.clock())
        self.service.take(self, request)

    def _refuse(self, status: int) -> None:
        self.service.counters.bad_requests += 1
        self.write(response(status, b'{"error":"bad request"}'))
        self.close()


def _content_length(lower: bytes) -> int | None:
    at = lower.find(b"\r\ncontent-length:")
    if at >= 0:
        value = lower[at + 17 : lower.index(b"\r\n", at + 2)].strip()
        return int(value) if value.isdigit() else None
    return None if b"\r\ntransfer-encoding:" in lower else 0


class FakeService(ABC):
    """State common to the connections of one fake service; subclasses answer requests in `answer`."""

    name = ""

    def __init__(
        self,
        config: FakeConfig,
        timers: Timers,
        clock: Callable[[], float],
        control: Callable[[Request], bytes | None],
    ) -> None:
        self.config = config
        self.timers = timers
        self.clock = clock
        self.control = control
        self.counters = Counters()
        self.scripts: list[tuple[Script, list[int]]] = []
        self.connections: set[HttpConnection] = set()
        self.seen: deque[Seen] = deque(maxlen=config.keep_requests)
        self.timings: list[tuple[str, str, float, float, float]] = []
        self.rng = random.Random(f"{config.seed}:{self.name}")

    @abstractmethod
    def answer(self, exchange: Exchange, request: Request, script: Script | None) -> None:
        """Starts the answer to one request; `exchange` is already the connection's current one."""

    def upgrade(self, conn: HttpConnection, request: Request) -> bool:
        """Takes over the connection for a WebSocket; False where this service has none on that path."""
        return False

    def draw_s(self, delay: Delay, script: Script | None) -> float:
        if script is not None and script.delay_ms is not None:
            return script.delay_ms / 1000
        return delay.draw_s(self.rng)

    def opened(self, conn: HttpConnection) -> None:
        self.connections.add(conn)
        self.counters.connections += 1
        self.counters.open += 1

    def closed(self, conn: HttpConnection) -> None:
        self.connections.discard(conn)
        self.counters.open -= conn.counted

    def take(self, conn: HttpConnection, request: Request) -> None:
        if conn.counted and not conn.used and request.path.startswith("/__"):
            # A connection of the test's or benchmark's own is no client's.
            conn.counted = False
            self.counters.connections -= 1
            self.counters.open -= 1
        conn.used = True
        controlled = self.control(request)
        if controlled is not None:
            conn.write(controlled)
            conn.resume()
            return
        if request.method == "GET" and request.header(b"upgrade").lower() == "websocket":
            if not self.upgrade(conn, request):
                conn.write(response(404, b'{"error":"no websocket here"}'))
                conn.close()
            return
        self.counters.requests += 1
        exchange = Exchange(conn, request.received)
        conn.exchange = exchange
        if self.config.keep_requests:
            exchange.seen = Seen(self.name, request.path, request.headers(), request.body, request.received)
            self.seen.append(exchange.seen)
        if self.config.log_timings:
            exchange.tag = request.header(b"x-session-id") + "/" + request.header(b"x-turn-number")
        self._misbehave(exchange, request, self.script_for(request.path))

    def _misbehave(self, exchange: Exchange, request: Request, script: Script | None) -> None:
        if script is None:
            self.answer(exchange, request, None)
            return
        if script.hang:
            return
        if script.drop_after == 0:
            exchange.stop = (0, True)
        elif script.drop_after is not None:
            exchange.stop = (script.drop_after, True)
        elif script.stall_after is not None:
            exchange.stop = (script.stall_after, False)
        body = scripted_body(script)
        if body is not None:
            exchange.send_pieces((script.delay_ms or 0.0) / 1000, (response(script.status, body),), 0.0)
        else:
            self.answer(exchange, request, script)

    def script_for(self, path: str) -> Script | None:
        for index, (script, left) in enumerate(self.scripts):
            if script.path in path:
                if script.times:
                    left[0] -= 1
                    if left[0] == 0:
                        del self.scripts[index]
                return script
        return None

    def finished(self, exchange: Exchange) -> None:
        self.counters.completed += 1
        self._note(exchange, False)

    def abandoned(self, exchange: Exchange) -> None:
        self.counters.aborted += 1
        self._note(exchange, True)

    def _note(self, exchange: Exchange, aborted: bool) -> None:
        now = self.clock()
        seen = exchange.seen
        if seen is not None:
            seen.first_sent, seen.finished, seen.aborted = exchange.first_sent, now, aborted
        if self.config.log_timings:
            self.timings.append((self.name, exchange.tag, exchange.received, exchange.first_sent, now))

    def reset(self) -> None:
        """Zeroes the counters (open connections stay counted) and forgets scripts and requests."""
        self.counters = Counters(open=sum(conn.counted for conn in self.connections))
        self.scripts.clear()
        self.seen.clear()
        self.timings.clear()


def scripted_body(script: Script) -> bytes | None:
    """The body that replaces the service's own answer, or None where the script leaves the answer alone."""
    if script.status != 200:
        return b'{"error":{"message":"scripted failure","type":"scripted"}}'
    if script.garbage:
        return b"\x00\xff<html>not what the contract says"
    if script.wrong_type:
        return msgspec.json.encode([1, 2, {"intent": 7, "answer": None, "choices": "none"}])
    return None
