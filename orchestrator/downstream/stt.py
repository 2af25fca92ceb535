"""The microphone's way to speech-to-text: one WebSocket a session, and what the service hears as typed events."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Annotated

import msgspec

from orchestrator.downstream.ws_link import WsEndpoint, WsLink
from orchestrator.errors import DownstreamError, Failure

QUEUE_BYTES = 64_000
"""Audio kept while STT does not take it: 2 s of PCM16 at 16 kHz. Beyond that the oldest is dropped."""

MAX_TEXT_BYTES = 4096
CONNECT_SECONDS = 2.0
FIRST_BACKOFF_SECONDS = 0.1
LAST_BACKOFF_SECONDS = 5.0
_STUCK_SECONDS = 5.0
_PROVEN_SECONDS = 5.0
_START = b'{"type":"start_capture"}'
_STOP = b'{"type":"stop_capture"}'

Confidence = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
log = logging.getLogger(__name__)


class SttFragmentEvent(msgspec.Struct, frozen=True):
    """A piece of transcript. `timestamp` is Unix seconds of the end of the speech it covers."""

    text: str
    is_final: bool = False
    timestamp: float | None = None


class SttVadEnd(msgspec.Struct, frozen=True):
    """The user's turn is over."""

    confidence: float = 1.0
    timestamp: float | None = None


class SttUserSpeaking(msgspec.Struct, frozen=True):
    """Voice activity."""

    confidence: float = 1.0
    timestamp: float | None = None


class SttTimeout(msgspec.Struct, frozen=True):
    """The service heard nothing for its own idea of long; capturing starts again with the next audio."""


SttEvent = SttFragmentEvent | SttVadEnd | SttUserSpeaking | SttTimeout


class _FromService(msgspec.Struct):
    type: str
    text: str = ""
    is_final: bool = False
    timestamp: float | None = None
    confidence: Confidence = 1.0
    message: str = ""


_decoder = msgspec.json.Decoder(_FromService)


class SttRelay:
    """Relays one session's microphone audio (PCM16 mono 16 kHz) and reports what is heard.

    Connects with the first audio. When the connection fails, `on_failure` is told once, and it is opened again, with
    growing pauses, as long as audio comes. Nothing here waits for the service or grows without bound, so a slow or dead
    one harms this session alone.
    """

    def __init__(
        self,
        session_id: str,
        endpoint: WsEndpoint,
        on_event: Callable[[SttEvent], None],
        on_failure: Callable[[DownstreamError], None],
    ) -> None:
        self._session_id = session_id
        self._endpoint = endpoint
        self._on_event = on_event
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._odd = b""
        self._link: WsLink | None = None
        self._capturing = False
        self._stuck_since: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] | None = None
        self._failed = False
        self._closed = False
        self.dropped_bytes = 0
        """Audio that STT never got."""

    def feed(self, pcm: bytes) -> None:
        """Send audio on, or keep it until that is possible; never blocks."""
        if self._closed or not pcm:
            return
        if self._odd or len(pcm) & 1:
            pcm = self._odd + pcm
            self._odd = pcm[-1:] if len(pcm) & 1 else b""
            pcm = pcm[: len(pcm) & ~1]
        link = self._link
        if link is not None and link.writable and not self._queue:
            self._send(link, pcm)
            return
        self._keep(pcm)
        if link is not None:
            self._watch_stuck(link)
        elif self._task is None:
            self._task = self._loop.create_task(self._run())

    async def close(self) -> None:
        """Stop capturing and close the connection."""
        self._closed = True
        self._queue.clear()
        self._queued = 0
        link, self._link = self._link, None
        if link is not None:
            link.send_text(_STOP)
            link.close()
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))

    def ws_message(self, data: bytes, *, is_text: bool) -> None:
        try:
            message = _decoder.decode(data)
        except (ValueError, RecursionError):
            log.warning("stt: a message of %d bytes that is none was dropped", len(data))
            return
        kind = message.type
        if kind == "fragment":
            if len(message.text) * 4 <= MAX_TEXT_BYTES or len(message.text.encode()) <= MAX_TEXT_BYTES:
                self._on_event(SttFragmentEvent(message.text, message.is_final, message.timestamp))
            else:
                log.warning("stt: a fragment of more than %d bytes was dropped", MAX_TEXT_BYTES)
        elif kind == "vad_end":
            self._on_event(SttVadEnd(message.confidence, message.timestamp))
        elif kind == "user_speaking":
            self._on_event(SttUserSpeaking(message.confidence, message.timestamp))
        elif kind == "timeout":
            self._capturing = False
            self._on_event(SttTimeout())
        elif kind == "error":
            self._on_failure(self._error(Failure.BAD_ANSWER, repr(message.message[:200])))

    def ws_writable(self) -> None:
        self._stuck_since = None
        self._drain()

    def ws_closed(self, detail: str) -> None:
        self._link = None
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(detail)

    async def _run(self) -> None:
        """Keeps the connection open while there is audio for it."""
        backoff = FIRST_BACKOFF_SECONDS
        while self._queue:
            try:
                link = await self._endpoint.connect(self._session_id, self, CONNECT_SECONDS)
            except DownstreamError as error:
                self._report(error)
            else:
                opened = self._loop.time()
                detail = await self._serve(link)
                self._report(self._error(Failure.CLOSED, detail))
                if self._loop.time() - opened > _PROVEN_SECONDS:
                    backoff = FIRST_BACKOFF_SECONDS
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, LAST_BACKOFF_SECONDS)
        self._task = None

    async def _serve(self, link: WsLink) -> str:
        """Use `link` until it is lost; why it was."""
        self._lost = self._loop.create_future()
        if not link.is_open:
            return "closed at once"
        self._link = link
        self._failed = self._capturing = False
        self._stuck_since = None
        try:
            self._drain()
            return await self._lost
        finally:
            self._lost = None

    def _drain(self) -> None:
        while self._queue and self._link is not None and self._link.writable:
            pcm = self._queue.popleft()
            self._queued -= len(pcm)
            self._send(self._link, pcm)

    def _send(self, link: WsLink, pcm: bytes) -> None:
        if not self._capturing:
            self._capturing = True
            link.send_text(_START)
        link.send_binary(pcm)

    def _keep(self, pcm: bytes) -> None:
        self._queue.append(pcm)
        self._queued += len(pcm)
        while self._queued > QUEUE_BYTES:
            oldest = self._queue.popleft()
            self._queued -= len(oldest)
            self.dropped_bytes += len(oldest)

    def _watch_stuck(self, link: WsLink) -> None:
        """A peer that takes nothing for _STUCK_SECONDS is as good as gone."""
        now = self._loop.time()
        if self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since > _STUCK_SECONDS:
            self._stuck_since = None
            link.abort()
            self.ws_closed(f"no audio was taken for {_STUCK_SECONDS:g} s")

    def _report(self, error: DownstreamError) -> None:
        if not self._failed and not self._closed:
            self._failed = True
            self._on_failure(error)

    def _error(self, failure: Failure, detail: str) -> DownstreamError:
        return DownstreamError(self._endpoint.service, failure, detail)
