"""Speech over the OpenAI speech endpoint: one POST a clause, raw PCM16 in chunks."""

from __future__ import annotations

import aiohttp
import orjson

from orchestrator.downstream.http_pool import HttpPool
from orchestrator.downstream.streams import HttpStream
from orchestrator.downstream.types import Call

MAX_AUDIO_BYTES = 16_777_216
"""Of one clause: almost six minutes at 24 kHz."""


class TtsOpenAi:
    """`POST /v1/audio/speech` with `response_format: pcm`."""

    def __init__(self, pool: HttpPool, model: str, voice: str) -> None:
        self._pool = pool
        self._url = pool.target("/v1/audio/speech")
        self._model = model
        self._voice = voice

    def synthesize(self, text: str, call: Call) -> SpeechResponse:
        """PCM16 mono chunks of `text`, whole samples each."""
        body = orjson.dumps({"model": self._model, "voice": self._voice, "input": text, "response_format": "pcm"})
        return SpeechResponse(self._pool, self._url, body, call, MAX_AUDIO_BYTES)


class SpeechResponse(HttpStream[bytes]):
    """The audio of one clause."""

    _odd = b""

    def _accept(self, response: aiohttp.ClientResponse) -> None:
        kind = response.content_type
        if kind == "application/json" or kind.startswith("text/"):
            raise self._bad(f"{kind} where audio was asked for")

    def _take(self, data: bytes) -> bytes | None:
        if self._odd:
            data = self._odd + data
            self._odd = b""
        if len(data) & 1:
            self._odd = data[-1:]
            data = data[:-1]
        if not data:
            return None
        response = self._response
        self._wire_done = response is not None and response.content.at_eof()
        return data

    def _take_end(self) -> bytes | None:
        if not self._started:
            raise self._bad("no audio")
        return None
