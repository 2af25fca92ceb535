"""All services of a worker, built from settings and talking to one small service that plays every part."""

from __future__ import annotations

import asyncio
from typing import Any

from orchestrator.downstream.factory import Downstream
from orchestrator.downstream.stt import SttEvent, SttVadEnd
from orchestrator.downstream.types import IntentService, LlmService, RagService, TtsService
from orchestrator.errors import DownstreamError, Failure
from orchestrator.settings import load_settings
from orchestrator.telemetry.observer import Observer
from tests.downstream.running import (
    CALL,
    Connection,
    RawServer,
    collect,
    failure_of,
    http_server,
    serving,
)
from tests.downstream.test_guards import Seen
from tests.downstream.test_http_clients import ANSWERS, whole
from tests.downstream.ws_peers import Peer, ws_serving
from tests.loops import live, until

PATHS = {
    "/api/v1/classify": "intent",
    "/api/v1/query": "rag",
    "/api/v1/stream_query": "rag stream",
    "/v1/chat/completions": "llm",
    "/v1/audio/speech": "tts",
}


async def every_part(headers: dict[str, str], body: bytes, connection: Connection) -> bool:
    service = PATHS.get(headers[":target"])
    if service is None:
        await connection.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    else:
        await connection.send(whole(service))
    return True


def downstream(url: str, observer: Any = None, **changes: str) -> Downstream:
    environ = {
        "INTENT_SERVICE_URL": url,
        "RAG_SERVICE_URL": url,
        "TTS_SERVICE_URL": url,
        "STT_SERVICE_URL": url,
        "LLM_BASE_URL": f"{url}/v1",
        **changes,
    }
    return Downstream(load_settings(environ), observer or Observer())


def as_protocols(services: Downstream) -> tuple[IntentService, RagService, LlmService, TtsService]:
    """The services as the conversation's types; mypy checks that they fit."""
    assert services.intent is not None
    assert services.rag is not None
    assert services.llm is not None
    assert services.tts is not None
    return services.intent, services.rag, services.llm, services.tts


@live
async def test_every_configured_service_answers() -> None:
    seen = Seen()
    async with http_server(every_part) as server:
        services = downstream(server.url, seen, LLM_FALLBACK_BASE_URL=f"{server.url}/v1")
        await services.start()
        intent, rag, llm, tts = as_protocols(services)
        assert await intent.classify("hi", CALL) == ANSWERS["intent"]
        assert await rag.query("hi", CALL) == ANSWERS["rag"]
        assert "".join(await collect(rag.stream_query("hi", CALL))) == ANSWERS["rag stream"]
        assert "".join(await collect(llm.stream([{"role": "user", "content": "hi"}], CALL))) == ANSWERS["llm"]
        assert services.fallback_llm is not None
        assert "".join(await collect(services.fallback_llm.stream([], CALL))) == ANSWERS["llm"]
        tts.prepare("test_001")
        assert b"".join(await collect(tts.synthesize("hi", CALL))) == ANSWERS["tts"]
        assert tts.sample_rate == 24_000
        tts.release("test_001")
        assert seen.outcomes == {"ok": 6}
        assert services.breaker_states() == dict.fromkeys(("intent", "rag", "llm", "fallback_llm", "tts"), "closed")
        await services.close()
        await until(lambda: server.open == 0)


@live
async def test_connections_are_warm_before_the_first_call() -> None:
    async with http_server(every_part) as server:
        services = downstream(server.url, TTS_PROTOCOL="openai")
        await services.start()
        await until(lambda: server.connections == 8)
        targets = sorted({headers[":target"] for headers, _ in server.requests})
        assert targets == ["/health", "/v1/models"]
        intent, rag, llm, tts = as_protocols(services)
        await asyncio.gather(
            intent.classify("hi", CALL),
            rag.query("hi", CALL),
            collect(llm.stream([], CALL)),
            collect(tts.synthesize("hi", CALL)),
        )
        assert server.connections == 8
        await services.close()


@live
async def test_a_stage_without_a_url_is_switched_off() -> None:
    services = downstream("", None, RAG_SERVICE_URL="http://127.0.0.1:1", LLM_BASE_URL="")
    await services.start()
    assert (services.intent, services.llm, services.fallback_llm, services.tts, services.stt_relay) == (None,) * 5
    assert services.rag is not None
    assert services.breaker_states() == {"rag": "closed"}
    await services.close()


@live
async def test_nothing_needs_to_be_there() -> None:
    async with serving(lambda connection: connection.gone()) as server:
        url = server.url
    seen = Seen()
    services = downstream(url, seen)
    await services.start()
    intent, rag, llm, tts = as_protocols(services)
    for _ in range(5):
        for attempt in (
            intent.classify("hi", CALL),
            rag.query("hi", CALL),
            collect(llm.stream([], CALL)),
            collect(tts.synthesize("hi", CALL)),
        ):
            assert (await failure_of(attempt)).failure is Failure.UNREACHABLE
    assert set(services.breaker_states().values()) == {"open"}
    assert (await failure_of(intent.classify("hi", CALL))).failure is Failure.CIRCUIT_OPEN
    assert (await failure_of(collect(tts.synthesize("hi", CALL)))).failure is Failure.CIRCUIT_OPEN
    assert seen.outcomes == {"unreachable": 20, "circuit_open": 2}
    await services.close()


@live
async def test_the_microphone_has_its_relay() -> None:
    async def handler(peer: Peer) -> None:
        await peer.receive()
        await peer.send("vad_end")
        await peer.receive()
        await peer.socket.close(1011)

    seen = Seen()
    async with ws_serving(handler) as server:
        services = downstream(server.url, seen)
        await services.start()
        events: list[SttEvent] = []
        failures: list[DownstreamError] = []
        assert services.stt_relay is not None
        relay = services.stt_relay("test_001", events.append, failures.append)
        relay.feed(b"\x00\x00")
        await until(lambda: events == [SttVadEnd(1.0)])
        await until(lambda: len(failures) == 1)
        assert seen.outcomes == {"closed": 1}
        await relay.close()
        await services.close()


@live
async def test_closing_ends_what_is_under_way() -> None:
    server = RawServer(lambda connection: connection.gone())
    await server.start()
    services = downstream(server.url)
    await services.start()
    intent, rag, llm, tts = as_protocols(services)
    tasks = [
        asyncio.ensure_future(failure_of(attempt))
        for attempt in (
            intent.classify("hi", CALL),
            rag.query("hi", CALL),
            collect(llm.stream([], CALL)),
            collect(tts.synthesize("hi", CALL)),
        )
    ]
    await asyncio.sleep(0.05)
    await services.close()
    errors = await asyncio.wait_for(asyncio.gather(*tasks), 2)
    assert {error.failure for error in errors} <= {Failure.UNREACHABLE, Failure.CLOSED}
    await until(lambda: server.open == 0)
    await server.stop()
