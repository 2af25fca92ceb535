"""What the conversation asks of the services, as values and protocols; the clients in this folder implement them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict, TypeVar

T_co = TypeVar("T_co", covariant=True)


@dataclass(slots=True)
class Pace:
    """How soon the consumer of a stream wants its next piece; it may change its mind while the stream runs.

    With `gather_seconds` > 0 pieces are left to gather for so long and handed over together, which costs one wake-up
    of the loop instead of one each.
    """

    gather_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """Who asks, and how long the answer is worth waiting for.

    `timeout_ms` is what is left of the stage's deadline (whole answer for intent and RAG, first token or chunk for
    streams); `stall_ms` is the longest silence accepted between two pieces of a stream.
    """

    session_id: str
    turn_number: int
    stage: str
    timeout_ms: float
    stall_ms: float = 1000.0
    pace: Pace | None = None


@dataclass(frozen=True, slots=True)
class Intent:
    """What the user wants, as the intent service sees it. `confidence` is 0…1."""

    name: str = "unknown"
    confidence: float = 0.0
    user_goal: str = ""
    key_entities: str = ""
    extracted_meaning: str = ""


UNKNOWN_INTENT = Intent()


@dataclass(frozen=True, slots=True)
class Retrieval:
    """RAG's answer: a speakable `answer` and the `passages` it stands on (texts, best first)."""

    answer: str = ""
    passages: tuple[str, ...] = ()
    confidence: float = 0.0


class Message(TypedDict):
    """One chat message of the OpenAI wire format."""

    role: str
    content: str


class Stream(Protocol[T_co]):
    """Pieces of an answer, and a way to abandon the rest; any async generator is one."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...

    def __anext__(self) -> Awaitable[T_co]: ...

    def aclose(self) -> Awaitable[object]: ...


class IntentService(Protocol):
    async def classify(self, text: str, call: Call) -> Intent:
        """The intent of `text`. Raises DownstreamError, also when `call.timeout_ms` has passed."""
        ...


class RagService(Protocol):
    async def query(self, text: str, call: Call) -> Retrieval:
        """Passages and an answer for `text`. Raises DownstreamError."""
        ...

    def stream_query(self, text: str, call: Call) -> Stream[str]:
        """The answer to `text` as it is written, piece by piece. Raises DownstreamError from the iteration."""
        ...

    async def query_incremental(self, text: str, call: Call) -> object:
        """Have the service retrieve for a partial `text` already; it keeps what it found. Raises DownstreamError."""
        ...

    def stream_incremental(self, text: str, call: Call) -> Stream[str]:
        """Like `stream_query`, from what the service retrieved early for the session."""
        ...


class LlmService(Protocol):
    def stream(self, messages: Sequence[Message], call: Call) -> Stream[str]:
        """Text deltas of the reply. Raises DownstreamError from the iteration.

        The consumer may abandon it at any point by `aclose()` or cancellation: the request is then aborted on the wire.
        """
        ...


class TtsService(Protocol):
    @property
    def sample_rate(self) -> int:
        """Hz of the PCM16 mono audio that `synthesize` yields, as far as it is known now."""
        ...

    def prepare(self, session_id: str) -> None:
        """The session will speak soon: open what `synthesize` will need. Never blocks, never raises."""
        ...

    def synthesize(self, text: str, call: Call) -> Stream[bytes]:
        """PCM16 mono chunks (whole samples) of `text`. Raises DownstreamError from the iteration.

        Abandoning it by `aclose()` or cancellation stops the synthesis on the wire (abort, or the protocol's cancel).
        """
        ...

    def release(self, session_id: str) -> None:
        """The session ended: give back what `prepare` opened. Never blocks, never raises."""
        ...
