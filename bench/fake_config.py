"""What the fake services say, how long they take, and how they can be told to misbehave."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bench.delays import Delay

SERVICES = ("intent", "rag", "llm", "tts", "stt")

# Forty words in four sentences. The first clause ends at the eighth word, which is also where a cutter that
# counts words would cut, so that different ways of cutting start speaking at the same token.
SENTENCES = (
    "Admission needs a school leaving certificate and grades, plus forms.",
    "You send the signed forms before the middle of July.",
    "International students also show a language certificate at level two.",
    "The office answers every question by telephone until five today.",
)

INTENT_ANSWER: Mapping[str, Any] = {
    "intent": "admission_requirements",
    "confidence": 0.93,
    "context": {
        "user_goal": "learn what admission takes",
        "key_entities": {"topic": "admission"},
        "extracted_meaning": "wants the admission requirements",
    },
    "reasoning": "names admission and requirements",
    "layer_type": "L1",
}

RAG_ANSWER: Mapping[str, Any] = {
    "answer": " ".join(SENTENCES),
    "sources": [{"title": "Admission", "text": " ".join(SENTENCES), "score": 0.87}],
    "confidence": 0.87,
    "timing_breakdown": {"retrieval_ms": 12.0, "generation_ms": 60.0},
    "cached": False,
    "metadata": {},
}


_INTENT = Delay(50.0)
_RAG = Delay(80.0)
_RAG_EARLY = Delay(20.0)
_LLM_FIRST = Delay(100.0)
_TTS_FIRST = Delay(75.0)


@dataclass(frozen=True, slots=True)
class FakeConfig:
    """Delays, answers and ports of the fake services.

    The default delays are the stage targets: Intent 50 ms, RAG 80 ms, first LLM token 100 ms and then a token
    every 5 ms, first TTS chunk 75 ms. Audio is PCM16 mono, `tts_ms_per_word` of it for every word, so that an
    answer is equally long however it was cut. `tts_spacing_ms` is the time between two 100 ms chunks (0: the
    whole clause at once). `rag_first` is when streaming RAG sends its first text (None: rag plus llm_first).
    """

    intent: Delay = _INTENT
    rag: Delay = _RAG
    rag_first: Delay | None = None
    rag_early: Delay = _RAG_EARLY
    llm_first: Delay = _LLM_FIRST
    llm_gap_ms: float = 5.0
    sentences: tuple[str, ...] = SENTENCES
    tts_first: Delay = _TTS_FIRST
    tts_ms_per_word: float = 100.0
    tts_frame_ms: float = 100.0
    tts_spacing_ms: float = 0.0
    tts_stream: bool = True
    tts_acknowledges_cancel: bool = True
    sample_rate: int = 24_000
    intent_answer: Mapping[str, Any] = field(default_factory=lambda: INTENT_ANSWER)
    rag_answer: Mapping[str, Any] = field(default_factory=lambda: RAG_ANSWER)
    stt_text: str = "what are the admission requirements"
    stt_word_ms: float = 200.0
    stt_ends_turn: bool = True
    seed: int = 1
    keep_requests: int = 1000
    log_timings: bool = False
    ports: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> list[str]:
        """The answer as the LLM streams it: a word a token, each but the first with its leading space."""
        return re.findall(r"\s*\S+", " ".join(self.sentences))


class Script(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Misbehaviour of one service for its next `times` requests (0: until the next reset).

    `path` limits it to request paths that contain this text. Streams are cut by `stall_after` (sends so many
    tokens or audio chunks, then nothing, connection open) and `drop_after` (then closes the connection; 0
    drops before any answer). `delay_ms` replaces the first delay. `oversize_bytes` answers with a well-formed
    body (or token, or chunk) of that size; `endless` never ends a stream, sending one piece after the other.
    """

    service: str
    times: int = 0
    path: str = ""
    status: int = 200
    delay_ms: float | None = None
    hang: bool = False
    stall_after: int | None = None
    drop_after: int | None = None
    garbage: bool = False
    oversize_bytes: int = 0
    endless: bool = False
    wrong_type: bool = False


class Counters(msgspec.Struct):
    """What one fake service has seen since the last reset. `open` is the number of open connections now."""

    requests: int = 0
    completed: int = 0
    aborted: int = 0
    cancels: int = 0
    connections: int = 0
    open: int = 0
    websockets: int = 0
    messages: int = 0
    audio_bytes: int = 0
    bad_requests: int = 0


class Seen(msgspec.Struct):
    """One request as a fake service saw it; times in seconds of the loop's clock, 0 where not reached."""

    service: str
    path: str
    headers: dict[str, str]
    body: bytes
    received: float
    first_sent: float = 0.0
    finished: float = 0.0
    aborted: bool = False

    def json(self) -> Any:
        """The body, decoded."""
        return msgspec.json.decode(self.body)
