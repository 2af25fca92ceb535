"""The retrieval service: one answer, a streamed one, and early retrieval while the user still speaks."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import orjson

from orchestrator.downstream.http_pool import MAX_LINE_BYTES, HttpPool
from orchestrator.downstream.sse import LineSplitter, LineTooLong
from orchestrator.downstream.streams import HttpStream
from orchestrator.downstream.types import Call, Retrieval
from orchestrator.errors import DownstreamError, Failure

_MAX_REPLY_BYTES = 2_097_152
_MAX_PASSAGES = 32
_PASSAGE_FIELDS = ("text", "content", "passage", "snippet")


class _Answer(msgspec.Struct):
    answer: str
    sources: list[object] = []
    confidence: float = 0.0


class _Line(msgspec.Struct):
    text: str
    is_final: bool = False


class _Early(msgspec.Struct):
    status: str
    docs_retrieved: int = 0


_answer_decoder = msgspec.json.Decoder(_Answer)
_line_decoder = msgspec.json.Decoder(_Line)
_early_decoder = msgspec.json.Decoder(_Early)


@dataclass(frozen=True, slots=True)
class EarlyRetrieval:
    """What the service has prepared for a text that is not final: its own `status` word and a count of documents."""

    status: str
    docs_retrieved: int


class RagClient:
    """`/api/v1/query`, `/api/v1/stream_query` and `/api/v1/query/incremental`."""

    def __init__(self, pool: HttpPool) -> None:
        self._pool = pool
        self._query_url = pool.target("/api/v1/query")
        self._stream_url = pool.target("/api/v1/stream_query")
        self._incremental_url = pool.target("/api/v1/query/incremental")

    async def query(self, text: str, call: Call) -> Retrieval:
        """Passages and an answer for `text`. Raises DownstreamError."""
        data = await self._pool.post(self._query_url, orjson.dumps({"query": text}), call)
        answer = self._pool.decode(_answer_decoder, data)
        confidence = min(1.0, max(0.0, answer.confidence))
        return Retrieval(answer.answer, _passages(answer.sources), confidence)

    def stream_query(self, text: str, call: Call) -> RagStream:
        """The answer to `text` as it is written; pieces that arrive together come as one."""
        return RagStream(self._pool, self._stream_url, orjson.dumps({"query": text}), call, _MAX_REPLY_BYTES)

    async def query_incremental(self, text: str, call: Call) -> EarlyRetrieval:
        """Let the service retrieve for a text that is not final yet. Raises DownstreamError."""
        body = _incremental_body(text, call, is_final=False)
        early = self._pool.decode(_early_decoder, await self._pool.post(self._incremental_url, body, call))
        return EarlyRetrieval(early.status, early.docs_retrieved)

    def stream_incremental(self, text: str, call: Call) -> RagStream:
        """Like `stream_query`, for the final text of a session whose earlier texts went to `query_incremental`."""
        body = _incremental_body(text, call, is_final=True)
        return RagStream(self._pool, self._incremental_url, body, call, _MAX_REPLY_BYTES)


class RagStream(HttpStream[str]):
    """The pieces of one streamed answer: a JSON object `{"text", "is_final"}` a line."""

    _lines: LineSplitter
    _final = False

    async def _open(self) -> None:
        self._lines = LineSplitter(MAX_LINE_BYTES)
        await super()._open()

    def _take(self, data: bytes) -> str | None:
        try:
            lines = self._lines.feed(data)
        except LineTooLong as error:
            raise self._bad(str(error)) from None
        return self._text(lines)

    def _take_end(self) -> str | None:
        text = self._text([self._lines.finish()])
        if not self._final:
            raise DownstreamError(self._service, Failure.CLOSED, "the stream ended before a line with is_final")
        return text

    def _text(self, lines: list[bytes]) -> str | None:
        text = ""
        for raw in lines:
            if not raw or raw.isspace():
                continue
            line = self._pool.decode(_line_decoder, raw)
            text += line.text
            if line.is_final:
                self._final = self._wire_done = True
                break
        return text or None


def _incremental_body(text: str, call: Call, *, is_final: bool) -> bytes:
    return orjson.dumps({"session_id": call.session_id, "text": text, "is_final": is_final})


def _passages(sources: list[object]) -> tuple[str, ...]:
    """The texts among `sources`, which are strings or objects that hold theirs in one of the usual fields."""
    passages: list[str] = []
    for source in sources[:_MAX_PASSAGES]:
        if isinstance(source, dict):
            source = next((source[name] for name in _PASSAGE_FIELDS if isinstance(source.get(name), str)), "")
        if isinstance(source, str) and source.strip():
            passages.append(source)
    return tuple(passages)
