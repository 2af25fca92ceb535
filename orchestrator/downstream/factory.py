"""All downstream services of one worker, built from the settings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from orchestrator.downstream.guard import CallObserver, ServiceGuard
from orchestrator.downstream.hedging import Hedger
from orchestrator.downstream.http_pool import HttpPool
from orchestrator.downstream.intent import IntentClient
from orchestrator.downstream.llm import LlmClient
from orchestrator.downstream.rag import RagClient
from orchestrator.downstream.resilient import ResilientIntent, ResilientLlm, ResilientRag, ResilientTts
from orchestrator.downstream.stt import SttEvent, SttRelay
from orchestrator.downstream.tts import TtsClient
from orchestrator.downstream.tts_openai import TtsOpenAi
from orchestrator.downstream.tts_stream import TtsStream
from orchestrator.downstream.ws_link import WsEndpoint
from orchestrator.errors import DownstreamError
from orchestrator.settings import Settings

_LEAST_CONNECTIONS = 512
_SPEECH_BUFFER_BYTES = 262_144
"""A clause's audio is mostly below this, so its response ends, and frees its connection, before it is all played."""


class Downstream:
    """Clients of the configured services. A service without a URL is None; nothing needs to answer at start.

    Construct it anywhere; `start()` and `close()` belong into the loop that uses it.
    """

    def __init__(self, settings: Settings, observer: CallObserver) -> None:
        self._settings = settings
        self._observer = observer
        self._limit = max(_LEAST_CONNECTIONS, 2 * settings.max_concurrent_sessions // max(1, settings.web_concurrency))
        self._pools: list[HttpPool] = []
        self._guards: list[ServiceGuard] = []
        self._hedgers: list[Hedger] = []
        self._tts_client: TtsClient | None = None
        self._stt: WsEndpoint | None = None
        self.intent: ResilientIntent | None = None
        self.rag: ResilientRag | None = None
        self.llm: ResilientLlm | None = None
        self.fallback_llm: ResilientLlm | None = None
        self.tts: ResilientTts | None = None

    async def start(self) -> None:
        """Create the clients, and begin to warm their connections in the background."""
        settings = self._settings
        if settings.intent_service_url:
            pool = self._pool("intent", settings.intent_service_url)
            self.intent = ResilientIntent(IntentClient(pool), self._hedger("intent", settings.intent_timeout_ms))
        if settings.rag_service_url:
            pool = self._pool("rag", settings.rag_service_url)
            self.rag = ResilientRag(RagClient(pool), self._hedger("rag", settings.rag_timeout_ms))
        if settings.llm_base_url:
            self.llm = self._llm("llm", settings.llm_base_url, settings.llm_api_key, settings.llm_model)
        if settings.llm_fallback_base_url:
            self.fallback_llm = self._llm(
                "fallback_llm",
                settings.llm_fallback_base_url,
                settings.llm_fallback_api_key,
                settings.llm_fallback_model,
            )
        if settings.tts_service_url:
            self.tts = self._tts()
        if settings.stt_service_url:
            self._stt = WsEndpoint("stt", settings.stt_service_url, "/api/v1/transcribe/stream")
        for pool in self._pools:
            pool.keep_warm()
        if self._tts_client is not None and self._tts_client.protocol == "auto":
            self._tts_client.probe()

    async def close(self) -> None:
        """Close every connection; calls in flight fail."""
        if self._tts_client is not None:
            await self._tts_client.close()
        await asyncio.gather(*(hedger.close() for hedger in self._hedgers))
        await asyncio.gather(*(pool.close() for pool in self._pools))

    @property
    def stt_relay(
        self,
    ) -> Callable[[str, Callable[[SttEvent], None], Callable[[DownstreamError], None]], SttRelay] | None:
        """Makes a session's relay from `(session_id, on_event, on_failure)`; None without an STT service."""
        return None if self._stt is None else self._relay

    def breaker_states(self) -> dict[str, str]:
        """`closed`, `half_open` or `open` for each service that is called over a guard."""
        return {guard.service: guard.state for guard in self._guards}

    def allow_hedging(self, allow: bool) -> None:
        """Shed second requests under load, or take them up again."""
        for hedger in self._hedgers:
            hedger.hedging = allow

    def _pool(
        self, service: str, url: str, *, api_key: str = "", warm_path: str = "/health", buffer: int = 65_536
    ) -> HttpPool:
        pool = HttpPool(
            service,
            url,
            limit=self._limit,
            api_key=api_key,
            warm_path=warm_path,
            read_buffer_bytes=buffer,
        )
        pool.open()
        self._pools.append(pool)
        return pool

    def _guard(self, service: str, usual_timeout_ms: float) -> ServiceGuard:
        guard = ServiceGuard(service, self._observer, asyncio.get_running_loop(), usual_timeout_ms / 1000)
        self._guards.append(guard)
        return guard

    def _hedger(self, service: str, usual_timeout_ms: float) -> Hedger:
        hedger = Hedger(self._guard(service, usual_timeout_ms))
        self._hedgers.append(hedger)
        return hedger

    def _llm(self, service: str, url: str, api_key: str, model: str) -> ResilientLlm:
        settings = self._settings
        pool = self._pool(service, url, api_key=api_key, warm_path="/models")
        client = LlmClient(pool, model, settings.llm_max_tokens)
        return ResilientLlm(client, self._guard(service, settings.llm_timeout_ms))

    def _tts(self) -> ResilientTts:
        settings = self._settings
        pool = self._pool("tts", settings.tts_service_url, api_key=settings.tts_api_key, buffer=_SPEECH_BUFFER_BYTES)
        endpoint = WsEndpoint("tts", settings.tts_service_url, "/api/v1/stream", api_key=settings.tts_api_key)
        self._tts_client = TtsClient(
            settings.tts_protocol,
            TtsOpenAi(pool, settings.tts_model, settings.tts_voice),
            TtsStream(endpoint, settings.tts_sample_rate, settings.tts_emotion),
            settings.tts_sample_rate,
        )
        return ResilientTts(self._tts_client, self._guard("tts", settings.tts_timeout_ms))

    def _relay(
        self, session_id: str, on_event: Callable[[SttEvent], None], on_failure: Callable[[DownstreamError], None]
    ) -> SttRelay:
        assert self._stt is not None
        observer = self._observer

        def failed(error: DownstreamError) -> None:
            observer.downstream("stt", error.failure.value, 0.0)
            on_failure(error)

        return SttRelay(session_id, self._stt, on_event, failed)
