"""Speech over the streaming protocol: one WebSocket a session, reused over turns, with a `cancel` for barge-ins."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from orchestrator.downstream.http_pool import StatusError
from orchestrator.downstream.streams import PieceStream
from orchestrator.downstream.tts_line import Line
from orchestrator.downstream.types import Call
from orchestrator.downstream.ws_link import WsEndpoint
from orchestrator.errors import DownstreamError, Failure

IDLE_SECONDS = 60.0
_HOLD_BYTES = 1_048_576
_MAX_AUDIO_BYTES = 16_777_216

_encode = msgspec.json.Encoder().encode


class TtsStream:
    """`/api/v1/stream`. `sample_rate` (Hz) is what the last audio said, until then what it was given."""

    def __init__(self, endpoint: WsEndpoint, sample_rate: int, emotion: str) -> None:
        self.endpoint = endpoint
        self.sample_rate = sample_rate
        self._emotion = emotion
        self._lines: dict[str, Line] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self.on_refused: Callable[[StatusError], None] | None = None

    def prepare(self, session_id: str) -> None:
        """Open the session's connection in the background."""
        self.line(session_id).connect()

    def synthesize(self, text: str, call: Call) -> Speech:
        """PCM16 mono chunks of `text`, whole samples each."""
        request = _encode({"type": "synthesize", "text": text, "emotion": self._emotion, "streaming": True})
        return Speech(self, text, request, call)

    def heard_rate(self, hz: int) -> None:
        """Audio of this sample rate came."""
        self.sample_rate = hz

    def refused(self, error: StatusError) -> None:
        """The service answered a handshake with a status."""
        if self.on_refused is not None:
            self.on_refused(error)

    def line(self, session_id: str) -> Line:
        """The session's line, a new one if it has none."""
        line = self._lines.get(session_id)
        if line is None:
            loop = asyncio.get_running_loop()
            line = self._lines[session_id] = Line(self, loop, session_id)
            if self._sweep is None:
                self._sweep = loop.call_later(IDLE_SECONDS / 4, self._sweep_idle, loop)
        return line

    def release(self, session_id: str) -> None:
        """Close the session's connection."""
        line = self._lines.pop(session_id, None)
        if line is not None:
            line.close()

    async def close(self) -> None:
        """Close every connection."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for session_id in list(self._lines):
            self.release(session_id)
        tasks = list(self._connecting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def own(self, task: asyncio.Task[None]) -> None:
        """Keep a connecting task until it is over; `close` ends those that are not."""
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def _sweep_idle(self, loop: asyncio.AbstractEventLoop) -> None:
        """Closes what was idle for IDLE_SECONDS; one timer for all connections."""
        oldest = loop.time() - IDLE_SECONDS
        for session_id, line in list(self._lines.items()):
            if line.idle_since(oldest):
                self.release(session_id)
        self._sweep = loop.call_later(IDLE_SECONDS / 4, self._sweep_idle, loop) if self._lines else None


class Speech(PieceStream[bytes]):
    """The audio of one clause."""

    def __init__(self, tts: TtsStream, text: str, request: bytes, call: Call) -> None:
        super().__init__(asyncio.get_running_loop(), tts.endpoint.service, call)
        self._tts = tts
        self._line: Line | None = None
        self._request = request
        self._chunks: deque[bytes] = deque()
        self._queued = 0
        self._total = 0
        self._held = False
        self._odd = b""
        self._complete = False
        self._error: DownstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.text = text
        self.sent = False
        self.begun = False

    def push(self, data: bytes) -> None:
        """Audio has arrived."""
        self.begun = True
        self._total += len(data)
        if self._total > _MAX_AUDIO_BYTES:
            self.fail(DownstreamError(self._service, Failure.BAD_ANSWER, f"more than {_MAX_AUDIO_BYTES} bytes"))
            return
        if self._odd:
            data = self._odd + data
            self._odd = b""
        if len(data) & 1:
            self._odd = data[-1:]
            data = data[:-1]
        if not data:
            return
        self._chunks.append(data)
        self._queued += len(data)
        if self._queued > _HOLD_BYTES and not self._held:
            self._hold(True)
        self._wake()

    def complete(self) -> None:
        """All audio has arrived."""
        self._complete = True
        self._give_back(complete=True)
        self._wake()

    def fail(self, error: DownstreamError) -> None:
        """Nothing more will come; what has arrived can still be taken."""
        if self._error is None and not self._complete:
            self._error = error
            self._give_back(broken=True)
            self._wake()

    async def _open(self) -> None:
        line = self._line = self._tts.line(self._call.session_id)
        await line.take(self)
        with self._start_deadline():
            link = await line.link()
        if self._error is not None:
            raise self._error
        self.sent = True
        link.send_text(self._request)

    async def _next(self) -> bytes | None:
        deadline = self._deadline
        assert deadline is not None
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._complete:
                if not self._started:
                    raise DownstreamError(self._service, Failure.BAD_ANSWER, "no audio")
                return None
            self._waiter = self._loop.create_future()
            try:
                with deadline:
                    await self._waiter
            finally:
                self._waiter = None
        chunk = self._chunks.popleft()
        self._queued -= len(chunk)
        if self._held and self._queued < _HOLD_BYTES // 2:
            self._hold(False)
        self._wire_done = self._complete and not self._chunks
        return chunk

    def _release(self, outcome: str) -> None:
        self._chunks.clear()
        self._give_back(complete=self._complete, broken=outcome not in ("ok", "cancelled"))

    def _give_back(self, *, complete: bool = False, broken: bool = False) -> None:
        if self._line is not None:
            self._line.give_back(self, sent=self.sent, complete=complete, broken=broken)

    def _hold(self, hold: bool) -> None:
        self._held = hold
        if self._line is not None:
            self._line.hold_back(hold)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
