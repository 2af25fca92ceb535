"""What all streamed answers share: a deadline between pieces, one verdict at the end, and abandonment at any point."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator
from enum import Enum, auto
from typing import Protocol, Self, TypeVar

import aiohttp
from yarl import URL

from orchestrator.downstream.deadline import Deadline
from orchestrator.downstream.http_pool import WIRE_ERRORS, HttpPool
from orchestrator.downstream.types import Call
from orchestrator.errors import DownstreamError, Failure

T = TypeVar("T")


class StreamWatch(Protocol):
    """Told how one streamed call fares."""

    def begin(self) -> None:
        """Before anything is sent. Raises DownstreamError where the call must not be made."""
        ...

    def first(self) -> None:
        """The first piece is there."""
        ...

    def end(self, outcome: str, error: DownstreamError | None) -> None:
        """Once, at the end: `ok`, `cancelled`, or the failure's value."""
        ...


class _State(Enum):
    NEW = auto()
    OPEN = auto()
    ENDED = auto()


class PieceStream(AsyncIterator[T]):
    """The pieces of one answer. The call is made with the first `__anext__`.

    Raises DownstreamError from the iteration. `aclose()`, cancellation of the consumer's `__anext__`, and dropping the
    last reference all stop the work on the wire at once; none of them waits.
    """

    _state = _State.NEW

    def __init__(self, loop: asyncio.AbstractEventLoop, service: str, call: Call) -> None:
        self._loop = loop
        self._service = service
        self._call = call
        self._started = False
        self._wire_done = False
        self._deadline: Deadline | None = None
        self.watch: StreamWatch | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self._state is _State.ENDED:
            raise StopAsyncIteration
        try:
            if self._state is _State.NEW:
                if self.watch is not None:
                    self.watch.begin()
                self._state = _State.OPEN
                await self._open()
            piece = await self._next()
        except DownstreamError as error:
            self._end(error.failure.value, error)
            raise
        except BaseException:
            self._end("cancelled")
            raise
        if piece is None:
            self._end("ok")
            raise StopAsyncIteration
        if not self._started:
            self._started = True
            if self.watch is not None:
                self.watch.first()
        if self._wire_done:
            self._end("ok")
        elif self._deadline is not None:
            self._deadline.progress()
        return piece

    async def aclose(self) -> None:
        """Abandon the answer."""
        self._end("cancelled")

    def abandon(self) -> None:
        """`aclose`, for those who cannot await."""
        self._end("cancelled")

    def __del__(self) -> None:
        if self._state is _State.OPEN and not self._loop.is_closed():
            self._end("cancelled")

    def _start_deadline(self) -> Deadline:
        call = self._call
        self._deadline = Deadline(self._loop, self._service, call.timeout_ms / 1000, call.stall_ms / 1000)
        return self._deadline

    def _end(self, outcome: str, error: DownstreamError | None = None) -> None:
        state, self._state = self._state, _State.ENDED
        if state is _State.ENDED:
            return
        if self._deadline is not None:
            self._deadline.close()
        if state is _State.OPEN:
            self._release(outcome)
            if self.watch is not None:
                self.watch.end(outcome, error)

    @abstractmethod
    async def _open(self) -> None:
        """Make the call; sets `_deadline`."""

    @abstractmethod
    async def _next(self) -> T | None:
        """The next piece, or None at the end. Sets `_wire_done` where nothing can follow the piece it returns."""

    @abstractmethod
    def _release(self, outcome: str) -> None:
        """Give back what `_open` took; stop the work on the wire unless `outcome` is `ok`."""


class HttpStream(PieceStream[T]):
    """A streamed answer to one POST; `max_bytes` bounds its body."""

    def __init__(self, pool: HttpPool, url: URL, body: bytes, call: Call, max_bytes: int) -> None:
        super().__init__(pool.loop, pool.service, call)
        self._pool = pool
        self._url = url
        self._body = body
        self._max_bytes = max_bytes
        self._size = 0
        self._response: aiohttp.ClientResponse | None = None

    @abstractmethod
    def _take(self, data: bytes) -> T | None:
        """The piece that `data` completes, if any. Sets `_wire_done` at the answer's own end mark."""

    @abstractmethod
    def _take_end(self) -> T | None:
        """The body is over: the piece still held back, if any. Raises DownstreamError where something is missing."""

    def _accept(self, response: aiohttp.ClientResponse) -> None:
        """Looks at the head of the answer. Raises DownstreamError where it is of no use."""

    async def _open(self) -> None:
        deadline = self._start_deadline()
        try:
            with deadline:
                self._response = await self._pool.request(self._url, self._body, self._call, deadline.remaining * 1000)
        except BaseException as error:
            self._pool.note_failure(error)
            raise
        self._accept(self._response)

    async def _next(self) -> T | None:
        response, deadline = self._response, self._deadline
        assert response is not None
        assert deadline is not None
        content = response.content
        pace = self._call.pace
        while True:
            if pace is not None and pace.gather_seconds and not content.is_eof():
                await self._gather(response, pace.gather_seconds)
            try:
                with deadline:
                    data = await content.readany()
            except WIRE_ERRORS as error:
                raise self._pool.broken_off(error) from error
            if data:
                self._size += len(data)
                if self._size > self._max_bytes:
                    raise self._bad(f"more than {self._max_bytes} bytes")
                piece = self._take(data)
                if piece is not None or self._wire_done:
                    return piece
            elif content.at_eof():
                self._wire_done = True
                return self._take_end()

    async def _gather(self, response: aiohttp.ClientResponse, seconds: float) -> None:
        """Leave what arrives to the kernel for a while. Nothing is lost: the socket is only not read."""
        connection = response.connection
        transport = connection.transport if connection is not None else None
        # No isinstance check: uvloop's transports are none of asyncio's classes.
        if transport is None or transport.is_closing() or not transport.is_reading():
            await asyncio.sleep(seconds)
            return
        transport.pause_reading()
        try:
            await asyncio.sleep(seconds)
        finally:
            if not transport.is_closing():
                transport.resume_reading()

    def _release(self, outcome: str) -> None:
        response, self._response = self._response, None
        if response is None:
            return
        if outcome == "ok":
            self._pool.finish(response)
        else:
            self._pool.abort(response)

    def _bad(self, detail: str) -> DownstreamError:
        return DownstreamError(self._service, Failure.BAD_ANSWER, detail)
