"""One warm aiohttp session to one service: the only place that turns what HTTP can do into DownstreamError."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TypeVar

import aiohttp
import msgspec
from aiohttp.http import HttpProcessingError
from multidict import istr
from yarl import URL

from orchestrator.downstream.deadline import Deadline
from orchestrator.downstream.types import Call
from orchestrator.errors import DownstreamError, Failure

MAX_JSON_BYTES = 1_048_576
MAX_LINE_BYTES = 65_536
_MAX_ERROR_BYTES = 4096
_KEEPALIVE_SECONDS = 75.0
_DNS_SECONDS = 30
_TEND_SECONDS = 30.0
_REFILL_SECONDS = 0.1
_WARM_LIMIT_SECONDS = 2.0
_LINGER_SECONDS = 0.25

WIRE_ERRORS = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError)
"""Everything that aiohttp raises for what a peer sent or did; asyncio.TimeoutError is an OSError here."""

_SESSION_ID = istr("X-Session-Id")
_TURN_NUMBER = istr("X-Turn-Number")
_TIMEOUT_MS = istr("X-Request-Timeout-Ms")
_IDEMPOTENCY_KEY = istr("Idempotency-Key")
_STATIC_HEADERS: Mapping[str, str] = {
    istr("Content-Type"): "application/json",
    istr("Accept-Encoding"): "identity",
    istr("User-Agent"): "statemanager-orchestrator",
}

T = TypeVar("T")
log = logging.getLogger(__name__)


class StatusError(DownstreamError):
    """An HTTP status other than the one that was asked for."""

    def __init__(self, service: str, status: int, detail: str = "") -> None:
        super().__init__(service, Failure.STATUS, f"{status} {detail}".rstrip())
        self.status = status


class HttpPool:
    """Keep-alive connections of one worker to one service.

    Construct it anywhere, `open()` it inside the running loop. `limit` bounds the connections in use; a call beyond it
    waits within its own deadline.
    """

    def __init__(
        self,
        service: str,
        base_url: str,
        *,
        limit: int = 512,
        api_key: str = "",
        warm_path: str = "/health",
        warm_connections: int = 2,
        read_buffer_bytes: int = 65_536,
    ) -> None:
        self.service = service
        self.base_url = base_url
        self.warm_connections = warm_connections
        self._limit = limit
        self._warm_url = URL(base_url + warm_path)
        self._read_buffer_bytes = read_buffer_bytes
        self._headers = dict(_STATIC_HEADERS)
        if api_key:
            self._headers[istr("Authorization")] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._warming: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that the pool was opened in."""
        if self._loop is None:
            raise RuntimeError("the pool is not open")
        return self._loop

    def target(self, path: str) -> URL:
        """The prepared URL of a path below the base URL."""
        return URL(self.base_url + path)

    def open(self) -> None:
        """Create the session in the running loop; connects to nothing."""
        self._loop = asyncio.get_running_loop()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._limit, keepalive_timeout=_KEEPALIVE_SECONDS, ttl_dns_cache=_DNS_SECONDS
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            read_bufsize=self._read_buffer_bytes,
        )

    async def close(self) -> None:
        """Close every connection; calls in flight fail."""
        session, self._session = self._session, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
        if session is not None:
            await session.close()

    async def warm(self, connections: int) -> None:
        """See to it that so many idle connections are open, with a cheap request on each; failing is no error."""
        await asyncio.gather(*(self._warm_one() for _ in range(connections)))

    def keep_warm(self) -> None:
        """Warm the pool now and from time to time, in the background."""
        self._schedule_warming(0.0)

    def note_failure(self, error: BaseException) -> None:
        """A request ended by `error`. Given up while it waited, it took its connection along: replace that later."""
        if not isinstance(error, DownstreamError) or error.failure in (Failure.TIMEOUT, Failure.STALLED):
            self._schedule_warming(_REFILL_SECONDS)

    async def post(self, url: URL, body: bytes, call: Call) -> bytes:
        """The body of the answer to a POST, at most MAX_JSON_BYTES. Raises DownstreamError."""
        deadline = Deadline(self.loop, self.service, call.timeout_ms / 1000)
        try:
            with deadline:
                response = await self.request(url, body, call, call.timeout_ms)
                try:
                    return await self._read_body(response)
                except BaseException:
                    response.close()
                    raise
        except BaseException as error:
            self.note_failure(error)
            raise
        finally:
            deadline.close()

    async def request(self, url: URL, body: bytes, call: Call, left_ms: float) -> aiohttp.ClientResponse:
        """A 200's response, its body not read yet. The caller bounds the time. Raises DownstreamError.

        A kept-alive connection may be closed by the service just as it is used again: such a request, of which not a
        byte was answered, is sent once more.
        """
        headers = self._headers.copy()
        headers[_SESSION_ID] = call.session_id
        headers[_TURN_NUMBER] = str(call.turn_number)
        headers[_TIMEOUT_MS] = str(int(left_ms))
        headers[_IDEMPOTENCY_KEY] = f"{call.session_id}:{call.turn_number}:{call.stage}"
        try:
            try:
                response = await self._live_session().post(url, data=body, headers=headers, allow_redirects=False)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                response = await self._live_session().post(url, data=body, headers=headers, allow_redirects=False)
        except aiohttp.ClientConnectionError as error:
            raise DownstreamError(self.service, Failure.UNREACHABLE, _brief(error)) from error
        except WIRE_ERRORS as error:
            raise DownstreamError(self.service, Failure.BAD_ANSWER, _brief(error)) from error
        if response.status != 200:
            raise await self._refused(response)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            response.close()
            raise DownstreamError(self.service, Failure.BAD_ANSWER, "an encoding that was not asked for")
        return response

    async def read_piece(self, response: aiohttp.ClientResponse) -> bytes:
        """What has arrived of a body, or waits for more; empty at its end. Raises DownstreamError."""
        try:
            return await response.content.readany()
        except WIRE_ERRORS as error:
            raise self.broken_off(error) from error

    def broken_off(self, error: Exception) -> DownstreamError:
        """What one of WIRE_ERRORS means in the middle of a body."""
        closed = isinstance(error, aiohttp.ClientError | OSError)
        return DownstreamError(self.service, Failure.CLOSED if closed else Failure.BAD_ANSWER, _brief(error))

    def finish(self, response: aiohttp.ClientResponse) -> None:
        """Everything wanted was read. The end of the body may still be on its way: let it come, but not for long."""
        if response.connection is not None:
            self.loop.call_later(_LINGER_SECONDS, response.close)

    def abort(self, response: aiohttp.ClientResponse) -> None:
        """Stop the service's work on this answer."""
        if response.connection is not None:
            self._schedule_warming(_REFILL_SECONDS)
        response.close()

    def decode(self, decoder: msgspec.json.Decoder[T], data: bytes) -> T:
        """`data` as the decoder's type. Raises DownstreamError."""
        try:
            return decoder.decode(data)
        except (ValueError, RecursionError) as error:
            raise DownstreamError(self.service, Failure.BAD_ANSWER, _brief(error)) from None

    def _live_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise DownstreamError(self.service, Failure.UNREACHABLE, "shutting down")
        return self._session

    async def _read_body(self, response: aiohttp.ClientResponse) -> bytes:
        data = await self.read_piece(response)
        if response.content.at_eof():
            return self._bounded(data)
        parts = [data]
        size = len(data)
        while not response.content.at_eof():
            piece = await self.read_piece(response)
            parts.append(piece)
            size += len(piece)
            if size > MAX_JSON_BYTES:
                break
        return self._bounded(b"".join(parts))

    def _bounded(self, data: bytes) -> bytes:
        if len(data) > MAX_JSON_BYTES:
            raise DownstreamError(self.service, Failure.BAD_ANSWER, f"more than {MAX_JSON_BYTES} bytes")
        return data

    async def _refused(self, response: aiohttp.ClientResponse) -> DownstreamError:
        """The error for a wrong status; a short body is read, so that the connection can be used again."""
        try:
            data = b""
            length = response.content_length
            if length is not None and length <= _MAX_ERROR_BYTES:
                while not response.content.at_eof():
                    data += await self.read_piece(response)
            else:
                response.close()
        except DownstreamError:
            response.close()
        except BaseException:
            response.close()
            raise
        return StatusError(self.service, response.status, repr(data[:200])[1:] if data else "")

    async def _warm_one(self) -> None:
        session = self._session
        if session is None:
            return
        try:
            async with asyncio.timeout(_WARM_LIMIT_SECONDS):
                async with session.get(self._warm_url, headers=self._headers, allow_redirects=False) as response:
                    length = response.content_length
                    if length is not None and length <= MAX_LINE_BYTES:
                        await response.read()
                    else:
                        response.close()
        except WIRE_ERRORS as error:
            log.debug("%s: not warmed: %s", self.service, error)

    def _schedule_warming(self, delay: float) -> None:
        loop = self.loop
        if self._session is None:
            return
        if self._timer is not None:
            if self._timer.when() <= loop.time() + delay:
                return
            self._timer.cancel()
        self._timer = loop.call_later(delay, self._start_warming)

    def _start_warming(self) -> None:
        self._timer = None
        if self._warming is None or self._warming.done():
            self._warming = self.loop.create_task(self.warm(self.warm_connections))
        self._schedule_warming(_TEND_SECONDS)


def _brief(error: BaseException) -> str:
    """One printable line about an error whose text may hold what the peer sent."""
    text = f"{type(error).__name__}: {error}"
    return text[:200] if text.isprintable() else ascii(text[:200])
