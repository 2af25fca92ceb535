"""Text to speech, over whichever of its two protocols the service speaks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Literal

from orchestrator.downstream.deadline import Deadline
from orchestrator.downstream.http_pool import StatusError
from orchestrator.downstream.streams import PieceStream
from orchestrator.downstream.tts_line import CONNECT_SECONDS
from orchestrator.downstream.tts_openai import TtsOpenAi
from orchestrator.downstream.tts_stream import TtsStream
from orchestrator.downstream.types import Call
from orchestrator.errors import DownstreamError, Failure

_NO_SUCH_ENDPOINT = frozenset((400, 404, 405, 406, 410, 426, 501))
"""What a service without the streaming protocol answers to a WebSocket handshake; other refusals may pass."""

TtsProtocol = Literal["auto", "openai", "stream"]


class TtsClient:
    """The facade. With `protocol="auto"` the streaming protocol is tried first: by `probe()`, and at first use.

    Until a probe was answered, each use probes again, so a service that starts late is found.
    """

    def __init__(self, protocol: TtsProtocol, openai: TtsOpenAi, stream: TtsStream, sample_rate: int) -> None:
        self._openai = openai
        self._stream = stream
        self._sample_rate = sample_rate
        self._fixed = protocol != "auto"
        self._known: Literal["openai", "stream"] | None = None if protocol == "auto" else protocol
        self._error: DownstreamError | None = None
        self._probing: asyncio.Task[None] | None = None
        stream.on_refused = self._refused

    @property
    def protocol(self) -> TtsProtocol:
        """The protocol in use; `auto` while it is not known."""
        return self._known or "auto"

    @property
    def sample_rate(self) -> int:
        """Hz of the audio, as far as it is known now."""
        return self._stream.sample_rate if self._known == "stream" else self._sample_rate

    def prepare(self, session_id: str) -> None:
        """Open in the background what `synthesize` will need."""
        if self._known == "stream":
            self._stream.prepare(session_id)
        elif self._known is None:
            self.probe()

    def synthesize(self, text: str, call: Call) -> PieceStream[bytes]:
        """PCM16 mono chunks of `text`, whole samples each."""
        if self._known == "openai":
            return self._openai.synthesize(text, call)
        if self._known == "stream":
            return self._stream.synthesize(text, call)
        return _Chosen(self, text, call)

    def release(self, session_id: str) -> None:
        """Give back what `prepare` opened."""
        self._stream.release(session_id)

    async def close(self) -> None:
        """Close every connection."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        await self._stream.close()

    def probe(self) -> asyncio.Task[None]:
        """Find out the protocol, in the background; never fails."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.get_running_loop().create_task(self._probe())
        return self._probing

    async def speech(self, text: str, call: Call, deadline: Deadline) -> PieceStream[bytes]:
        """`synthesize`, once the protocol is known. Raises DownstreamError. The caller waits within `deadline`."""
        if self._known is None:
            await asyncio.wait((self.probe(),))
        left = replace(call, timeout_ms=deadline.remaining * 1000)
        if self._known == "stream":
            return self._stream.synthesize(text, left)
        if self._known == "openai":
            return self._openai.synthesize(text, left)
        raise self._error or DownstreamError("tts", Failure.CLOSED, "shutting down")

    def _refused(self, error: StatusError) -> None:
        """The service has no streaming protocol, or no longer: from now on the other one is used."""
        if not self._fixed and error.status in _NO_SUCH_ENDPOINT:
            self._known = "openai"

    async def _probe(self) -> None:
        try:
            link = await self._stream.endpoint.connect("protocol-probe", _Nobody(), CONNECT_SECONDS)
        except DownstreamError as error:
            self._error = error
            if isinstance(error, StatusError):
                self._refused(error)
        else:
            self._known = "stream"
            link.close()


class _Nobody:
    """The listener of a probe."""

    def ws_message(self, data: bytes, *, is_text: bool) -> None: ...

    def ws_writable(self) -> None: ...

    def ws_closed(self, detail: str) -> None: ...


class _Chosen(PieceStream[bytes]):
    """Speech over the streaming protocol if that is there, else over the other one."""

    def __init__(self, tts: TtsClient, text: str, call: Call) -> None:
        super().__init__(asyncio.get_running_loop(), "tts", call)
        self._tts = tts
        self._text = text
        self._inner: PieceStream[bytes] | None = None

    async def _open(self) -> None:
        with self._start_deadline() as deadline:
            self._inner = await self._tts.speech(self._text, self._call, deadline)

    async def _next(self) -> bytes | None:
        return await anext(self._inner, None) if self._inner is not None else None

    def _release(self, outcome: str) -> None:
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.abandon()
