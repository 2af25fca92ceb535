"""What a session is given by the worker: settings, clocks, services, store and observer, built once a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from orchestrator.conversation.pacing import PacingWheel
from orchestrator.core.fsm import Policy
from orchestrator.downstream.stt import SttEvent
from orchestrator.downstream.types import IntentService, LlmService, RagService, TtsService
from orchestrator.errors import DownstreamError
from orchestrator.settings import Settings
from orchestrator.store.record import SessionRecord
from orchestrator.telemetry.observer import Observer


class MicrophoneRelay(Protocol):
    """A session's microphone line to STT."""

    def feed(self, pcm: bytes) -> None:
        """Send PCM16 16 kHz audio on; never blocks."""
        ...

    async def close(self) -> None: ...


SttRelayFactory = Callable[[str, Callable[[SttEvent], None], Callable[[DownstreamError], None]], MicrophoneRelay]


@dataclass(frozen=True, slots=True)
class Services:
    """The downstream services; None where a stage is switched off."""

    intent: IntentService | None = None
    rag: RagService | None = None
    llm: LlmService | None = None
    fallback_llm: LlmService | None = None
    tts: TtsService | None = None
    stt_relay: SttRelayFactory | None = None
    breaker_states: Callable[[], dict[str, str]] = dict


class Store(Protocol):
    """Where sessions survive the worker; never awaited on a turn's path."""

    @property
    def connected(self) -> bool: ...

    async def load(self, session_id: str) -> SessionRecord | None:
        """The stored session. Raises StoreUnavailable."""
        ...

    def mark_dirty(self, session_id: str, snapshot: Callable[[], SessionRecord]) -> None:
        """Write what `snapshot()` gives, soon; the latest call for a session wins."""
        ...

    def is_dirty(self, session_id: str) -> bool:
        """Whether the session still waits to be written."""
        ...


@dataclass(slots=True)
class Runtime:
    """One a worker.

    `clock` gives seconds on the loop's time scale at full resolution (uvloop's own `time()` counts whole milliseconds
    and stands still within a tick), `wall` Unix seconds; `overloaded` says whether optional work is to be left out.
    """

    settings: Settings
    services: Services
    store: Store
    observer: Observer
    loop: asyncio.AbstractEventLoop
    wheel: PacingWheel
    policy: Policy
    clock: Callable[[], float]
    wall: Callable[[], float]
    node: str
    slot: int
    overloaded: bool = False
