"""The connection of one session to the streaming speech service, and what on it belongs to whom.

Messages of the service do not name the request they answer, so a connection speaks one clause at a time and what
belongs to an abandoned one has to be told apart:

- A service answers messages in order. Once it has acknowledged a cancel with `complete`, the next clause is sent right
  behind a cancel, and everything up to the acknowledgement is dropped.
- As long as no acknowledgement was ever seen, the next clause waits until the connection has been silent for
  `_QUIET_SECONDS`, and its audio counts from its own `sentence_start`.
- After a timeout or a wrong answer nothing is known about what may still come: the connection is closed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

import msgspec

from orchestrator.downstream.deadline import Deadline
from orchestrator.downstream.http_pool import StatusError
from orchestrator.downstream.ws_link import WsEndpoint, WsLink
from orchestrator.errors import DownstreamError, Failure

CONNECT_SECONDS = 2.0
_QUIET_SECONDS = 0.2
_DOUBLE_ACK_SECONDS = 1.0
_QUEUE_SECONDS = 30.0
_CANCEL = b'{"type":"cancel"}'


class _FromService(msgspec.Struct):
    type: str
    data: bytes = b""
    index: int | None = None
    sample_rate: int | None = None
    text: str | None = None
    message: str | None = None
    cancelled: bool = False


_decoder = msgspec.json.Decoder(_FromService)


class LineHost(Protocol):
    """What a line needs of the client it belongs to."""

    @property
    def endpoint(self) -> WsEndpoint: ...

    def own(self, task: asyncio.Task[None]) -> None:
        """Keep a connecting task until it is over."""
        ...

    def heard_rate(self, hz: int) -> None:
        """The sample rate of the audio that just came."""
        ...

    def refused(self, error: StatusError) -> None:
        """The service answered the handshake with a status."""
        ...


class Clause(Protocol):
    """What a line knows of the clause it speaks. `sent`: the request is out; `begun`: its answer has begun."""

    text: str
    sent: bool
    begun: bool

    def push(self, data: bytes) -> None:
        """Audio has arrived."""
        ...

    def complete(self) -> None:
        """All audio has arrived."""
        ...

    def fail(self, error: DownstreamError) -> None:
        """Nothing more will come."""
        ...


class Line:
    """The connection of one session, and whose turn it is to use it."""

    __slots__ = (
        "_acks_cancel",
        "_cancelled_at",
        "_closed",
        "_error",
        "_host",
        "_last_message",
        "_last_used",
        "_link",
        "_loop",
        "_quiet",
        "_session_id",
        "_stale",
        "_task",
        "_waiting",
        "active",
    )  # fmt: skip

    def __init__(self, host: LineHost, loop: asyncio.AbstractEventLoop, session_id: str) -> None:
        self._host = host
        self._loop = loop
        self._session_id = session_id
        self._link: WsLink | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: DownstreamError | None = None
        self._waiting: deque[tuple[Clause, asyncio.Future[None]]] = deque()
        self._quiet: asyncio.Future[None] | None = None
        self._stale = 0
        self._acks_cancel = False
        self._cancelled_at = -_DOUBLE_ACK_SECONDS
        self._last_message = 0.0
        self._last_used = loop.time()
        self._closed = False
        self.active: Clause | None = None

    def idle_since(self, when: float) -> bool:
        """Nobody has used the line since `when`."""
        return self.active is None and not self._waiting and self._last_used < when

    def connect(self) -> None:
        """Start connecting unless that is done or under way."""
        self._last_used = self._loop.time()
        if self._closed or self._task is not None or (self._link is not None and self._link.is_open):
            return
        self._task = self._loop.create_task(self._connect())
        self._host.own(self._task)

    async def take(self, speech: Clause) -> None:
        """Wait for the clauses before this one. Raises DownstreamError if they take too long."""
        if self.active is None:
            self.active = speech
            return
        turn = self._loop.create_future()
        entry = (speech, turn)
        self._waiting.append(entry)
        deadline = Deadline(self._loop, self._host.endpoint.service, _QUEUE_SECONDS)
        try:
            with deadline:
                await turn
        finally:
            deadline.close()
            if entry in self._waiting:
                self._waiting.remove(entry)

    async def link(self) -> WsLink:
        """An open link, free of what belongs to clauses before. Raises DownstreamError. The caller bounds the time."""
        if self._link is None or not self._link.is_open:
            self.connect()
            if self._task is not None:
                await asyncio.wait((self._task,))
            if self._link is None:
                failed = DownstreamError(self._host.endpoint.service, Failure.CLOSED, "the session ended")
                raise self._error or failed
        elif self._stale and not self._acks_cancel:
            await self._silence()
            if self._link is None:
                return await self.link()
        return self._link

    def give_back(self, speech: Clause, *, sent: bool, complete: bool, broken: bool) -> None:
        """The active clause is over: complete, abandoned (cancel it), or broken (drop the connection)."""
        if self.active is not speech:
            return
        self.active = None
        self._last_used = self._loop.time()
        link = self._link
        if link is not None:
            link.hold_back(False)
            if broken:
                self._link = None
                link.close()
            elif sent and not complete:
                self._stale += 1
                self._cancelled_at = self._last_used
                link.send_text(_CANCEL)
        self._next_turn()

    def close(self) -> None:
        """End the connection and fail what uses it."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        link, self._link = self._link, None
        if link is not None:
            link.close()
        self._wake()
        if self.active is not None:
            self.active.fail(DownstreamError(self._host.endpoint.service, Failure.CLOSED, "the session ended"))

    def ws_message(self, data: bytes, *, is_text: bool) -> None:
        self._last_message = self._loop.time()
        speech = self.active
        try:
            message = _decoder.decode(data)
        except (ValueError, RecursionError) as error:
            if speech is not None and not self._stale:
                speech.fail(self._bad(f"{type(error).__name__} in a message of {len(data)} bytes"))
            return
        kind = message.type
        if self._stale and not self._leaves_stale(message, speech):
            return
        if speech is None or kind == "connected":
            return
        if kind == "audio":
            self._audio(speech, message)
        elif kind == "sentence_start":
            speech.begun = True
        elif kind == "complete":
            if speech.begun or not (message.cancelled or self._just_cancelled()):
                speech.complete()
        elif kind == "error":
            speech.fail(self._bad(repr((message.message or "")[:200])))

    def ws_writable(self) -> None:
        """Requests are small: what a full buffer would hold back is the deadline's business."""

    def ws_closed(self, detail: str) -> None:
        self._link = None
        self._stale = 0
        self._wake()
        if self.active is not None:
            self.active.fail(DownstreamError(self._host.endpoint.service, Failure.CLOSED, detail))

    def hold_back(self, hold: bool) -> None:
        if self._link is not None:
            self._link.hold_back(hold)

    def _leaves_stale(self, message: _FromService, speech: Clause | None) -> bool:
        """Whether `message` is the first that belongs to the clause after a cancelled one."""
        if message.type in ("complete", "cancelled"):
            self._acks_cancel = True
            self._stale -= 1
            self._wake()
            return False
        if message.type != "sentence_start" or self._acks_cancel or speech is None or not speech.sent:
            return False
        if message.text is not None and message.text.strip() not in speech.text:
            return False
        self._stale = 0
        return True

    def _just_cancelled(self) -> bool:
        """A cancel that crossed its clause's `complete` may be acknowledged by a second one."""
        return self._loop.time() - self._cancelled_at < _DOUBLE_ACK_SECONDS

    def _audio(self, speech: Clause, message: _FromService) -> None:
        rate = message.sample_rate
        if rate is not None:
            if not 8000 <= rate <= 192_000:
                speech.fail(self._bad(f"sample_rate {rate}"))
                return
            self._host.heard_rate(rate)
        speech.push(message.data)

    async def _connect(self) -> None:
        endpoint = self._host.endpoint
        try:
            link = await endpoint.connect(self._session_id, self, CONNECT_SECONDS)
        except DownstreamError as error:
            self._error = error
            if isinstance(error, StatusError):
                self._host.refused(error)
        else:
            self._error = None
            self._stale = 0
            if self._closed:
                link.close()
            else:
                self._link = link
        finally:
            self._task = None

    async def _silence(self) -> None:
        """Until the cancel is acknowledged, or nothing came for _QUIET_SECONDS."""
        while self._stale and self._link is not None:
            left = max(self._last_message, self._cancelled_at) + _QUIET_SECONDS - self._loop.time()
            if left <= 0:
                return
            self._quiet = self._loop.create_future()
            timer = self._loop.call_later(left, self._wake)
            try:
                await self._quiet
            finally:
                timer.cancel()
                self._quiet = None

    def _wake(self) -> None:
        if self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)

    def _next_turn(self) -> None:
        while self._waiting and self.active is None:
            speech, turn = self._waiting.popleft()
            if not turn.done():
                self.active = speech
                turn.set_result(None)

    def _bad(self, detail: str) -> DownstreamError:
        return DownstreamError(self._host.endpoint.service, Failure.BAD_ANSWER, detail)
