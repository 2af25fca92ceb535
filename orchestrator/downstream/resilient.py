"""The services as the conversation gets them: each behind its guard, one observed outcome a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from orchestrator.downstream.guard import ServiceGuard, StreamGuard
from orchestrator.downstream.hedging import Hedger
from orchestrator.downstream.rag import EarlyRetrieval
from orchestrator.downstream.streams import PieceStream
from orchestrator.downstream.types import Call, Intent, IntentService, Message, Retrieval
from orchestrator.errors import DownstreamError

T = TypeVar("T")


class ResilientIntent:
    """IntentService behind its guard."""

    def __init__(self, inner: IntentService, hedger: Hedger) -> None:
        self._inner = inner
        self._hedger = hedger

    async def classify(self, text: str, call: Call) -> Intent:
        """The intent of `text`. Raises DownstreamError."""
        return await self._hedger.call(lambda attempt: self._inner.classify(text, attempt), call)


class RagStreams(Protocol):
    """What ResilientRag wraps; `rag.RagClient` is one."""

    async def query(self, text: str, call: Call) -> Retrieval: ...

    def stream_query(self, text: str, call: Call) -> PieceStream[str]: ...

    async def query_incremental(self, text: str, call: Call) -> EarlyRetrieval: ...

    def stream_incremental(self, text: str, call: Call) -> PieceStream[str]: ...


class ResilientRag:
    """RagService behind its guard; all four calls share one breaker."""

    def __init__(self, inner: RagStreams, hedger: Hedger) -> None:
        self._inner = inner
        self._hedger = hedger

    async def query(self, text: str, call: Call) -> Retrieval:
        """Passages and an answer for `text`. Raises DownstreamError."""
        return await self._hedger.call(lambda attempt: self._inner.query(text, attempt), call)

    def stream_query(self, text: str, call: Call) -> PieceStream[str]:
        """The answer to `text` as it is written."""
        return watched(self._inner.stream_query(text, call), self._hedger.guard)

    async def query_incremental(self, text: str, call: Call) -> EarlyRetrieval:
        """Let the service retrieve for a text that is not final. Never sent twice. Raises DownstreamError."""
        guard = self._hedger.guard
        watch = StreamGuard(guard)
        watch.begin()
        try:
            early = await self._inner.query_incremental(text, call)
        except DownstreamError as error:
            watch.end(error.failure.value, error)
            raise
        except BaseException:
            watch.end("cancelled", None)
            raise
        watch.end("ok", None)
        return early

    def stream_incremental(self, text: str, call: Call) -> PieceStream[str]:
        """The streamed answer to a final text that `query_incremental` prepared."""
        return watched(self._inner.stream_incremental(text, call), self._hedger.guard)


class LlmStreams(Protocol):
    """What ResilientLlm wraps; `llm.LlmClient` is one."""

    def stream(self, messages: Sequence[Message], call: Call) -> PieceStream[str]: ...


class ResilientLlm:
    """LlmService behind its guard."""

    def __init__(self, inner: LlmStreams, guard: ServiceGuard) -> None:
        self._inner = inner
        self._guard = guard

    def stream(self, messages: Sequence[Message], call: Call) -> PieceStream[str]:
        """Text deltas of the reply."""
        return watched(self._inner.stream(messages, call), self._guard)


class SpeechStreams(Protocol):
    """What ResilientTts wraps; `tts.TtsClient` is one."""

    @property
    def sample_rate(self) -> int: ...

    def prepare(self, session_id: str) -> None: ...

    def synthesize(self, text: str, call: Call) -> PieceStream[bytes]: ...

    def release(self, session_id: str) -> None: ...


class ResilientTts:
    """TtsService behind its guard."""

    def __init__(self, inner: SpeechStreams, guard: ServiceGuard) -> None:
        self._inner = inner
        self._guard = guard

    @property
    def sample_rate(self) -> int:
        """Hz of the audio, as far as it is known now."""
        return self._inner.sample_rate

    def prepare(self, session_id: str) -> None:
        """The session will speak soon."""
        self._inner.prepare(session_id)

    def synthesize(self, text: str, call: Call) -> PieceStream[bytes]:
        """PCM16 mono chunks of `text`."""
        return watched(self._inner.synthesize(text, call), self._guard)

    def release(self, session_id: str) -> None:
        """The session ended."""
        self._inner.release(session_id)


def watched(stream: PieceStream[T], guard: ServiceGuard) -> PieceStream[T]:
    """`stream`, reporting to `guard`: nothing is added to the way of a piece."""
    stream.watch = StreamGuard(guard)
    return stream
