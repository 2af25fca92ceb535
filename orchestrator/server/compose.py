"""Puts a worker's conversation layer together: services, store and sessions, after the fork and inside the loop."""

from __future__ import annotations

import asyncio
import logging
import time

from orchestrator.conversation.pacing import PacingWheel
from orchestrator.conversation.registry import Sessions
from orchestrator.conversation.runtime import Runtime, Services
from orchestrator.core.fsm import Policy
from orchestrator.downstream.factory import Downstream
from orchestrator.downstream.stt import SttFragmentEvent
from orchestrator.settings import Settings
from orchestrator.store.redis_store import SessionStore
from orchestrator.store.stt_events import SttEvents
from orchestrator.telemetry.observer import Observer

log = logging.getLogger(__name__)


class Conversations(Sessions):
    """The sessions of a worker, with the clients they stand on: closing them closes those too."""

    def __init__(self, runtime: Runtime, downstream: Downstream, store: SessionStore) -> None:
        super().__init__(runtime)
        self._downstream = downstream
        self._session_store = store
        self._stt_events: SttEvents[SttFragmentEvent] | None = None

    async def start(self) -> None:
        """Begin what runs in the background. Nothing external needs to answer."""
        settings = self._runtime.settings
        await self._session_store.start()
        if settings.stt_events_channel:
            self._stt_events = SttEvents(
                settings.redis_url, settings.stt_events_channel, SttFragmentEvent, self.deliver_stt
            )
            await self._stt_events.start()

    def shed(self, overloaded: bool) -> None:
        """Leave out speculation and second requests, or take them up again."""
        super().shed(overloaded)
        self._downstream.allow_hedging(not overloaded)

    async def close(self) -> None:
        """Stop the turns, write what is dirty, close the clients; each within a bound."""
        if self._stt_events is not None:
            await self._stt_events.close()
        await super().close()
        self._runtime.wheel.close()
        await self._session_store.close()
        await self._downstream.close()


async def build_sessions(
    settings: Settings, slot: int, observer: Observer, loop: asyncio.AbstractEventLoop
) -> Conversations:
    """A worker's sessions, ready to be opened."""
    downstream = Downstream(settings, observer)
    await downstream.start()
    store = SessionStore(settings.redis_url, observer, settings.session_ttl_seconds)
    runtime = Runtime(
        settings=settings,
        services=Services(
            intent=downstream.intent,
            rag=downstream.rag,
            llm=downstream.llm,
            fallback_llm=downstream.fallback_llm,
            tts=downstream.tts,
            stt_relay=downstream.stt_relay,
            breaker_states=downstream.breaker_states,
        ),
        store=store,
        observer=observer,
        loop=loop,
        wheel=PacingWheel(loop),
        policy=Policy(settings.barge_in_confidence, settings.barge_in_min_words),
        clock=time.monotonic,
        wall=time.time,
        node=settings.node_name,
        slot=slot,
    )
    sessions = Conversations(runtime, downstream, store)
    await sessions.start()
    return sessions
