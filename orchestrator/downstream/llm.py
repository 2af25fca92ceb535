"""Any language model behind the OpenAI chat completions API, streamed as server-sent events."""

from __future__ import annotations

from collections.abc import Sequence

import aiohttp
import msgspec
import orjson

from orchestrator.downstream.http_pool import MAX_LINE_BYTES, HttpPool
from orchestrator.downstream.sse import LineTooLong, SseParser
from orchestrator.downstream.streams import HttpStream
from orchestrator.downstream.types import Call, Message
from orchestrator.errors import DownstreamError, Failure

_MAX_REPLY_BYTES = 8_388_608
"""Of the whole stream; a token costs about 200 bytes of framing, so this is some 40,000 tokens."""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    error: msgspec.Raw | None = None


_decoder = msgspec.json.Decoder(_Chunk)


class LlmClient:
    """`POST {base}/chat/completions` with `stream: true`. `max_tokens` bounds one reply."""

    def __init__(self, pool: HttpPool, model: str, max_tokens: int) -> None:
        self._pool = pool
        self._url = pool.target("/chat/completions")
        self._model = model
        self._max_tokens = max_tokens

    def stream(self, messages: Sequence[Message], call: Call) -> LlmStream:
        """Text deltas of the reply; deltas that arrive together come as one."""
        body = orjson.dumps(
            {"model": self._model, "messages": messages, "stream": True, "max_tokens": self._max_tokens}
        )
        return LlmStream(self._pool, self._url, body, call, _MAX_REPLY_BYTES)


class LlmStream(HttpStream[str]):
    """The deltas of one reply."""

    _parser: SseParser
    _finished = False

    async def _open(self) -> None:
        self._parser = SseParser(MAX_LINE_BYTES)
        await super()._open()

    def _accept(self, response: aiohttp.ClientResponse) -> None:
        if response.content_type == "application/json":
            raise self._bad("one JSON body where a stream of events was asked for")

    def _take(self, data: bytes) -> str | None:
        try:
            events = self._parser.feed(data)
        except LineTooLong as error:
            raise self._bad(str(error)) from None
        return self._text(events)

    def _take_end(self) -> str | None:
        text = self._text(self._parser.finish())
        if not self._finished:
            raise DownstreamError(self._service, Failure.CLOSED, "the stream ended before [DONE] or a finish_reason")
        return text

    def _text(self, events: list[bytes]) -> str | None:
        text = ""
        for event in events:
            if event == b"[DONE]":
                self._finished = self._wire_done = True
                break
            chunk = self._pool.decode(_decoder, event)
            if chunk.error is not None:
                raise self._bad(f"error in the stream: {bytes(chunk.error)[:200]!r}")
            if not chunk.choices:
                continue
            choice = chunk.choices[0]
            if choice.finish_reason is not None:
                self._finished = True
            if choice.delta is not None and choice.delta.content:
                text += choice.delta.content
        return text or None
