"""`orchestrator doctor`: every setting with its source, and whether each service really answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import click

from orchestrator.downstream.factory import Downstream
from orchestrator.downstream.types import Call
from orchestrator.errors import DownstreamError, StoreUnavailable
from orchestrator.settings import Settings, describe_settings, load_settings
from orchestrator.store.redis_store import SessionStore
from orchestrator.telemetry.observer import Observer

PATIENCE_MS = 5000.0
_QUESTION = "What are admission requirements?"


async def examine(environ: Mapping[str, str]) -> int:
    """Print the report; 0 if everything that is configured answers, else 1. Raises SettingsError."""
    settings = load_settings(environ)
    click.echo("settings")
    for row in describe_settings(environ):
        click.echo(f"  {row.variable:<28} {row.source:<12} {row.value}")
    click.echo("\nservices (each asked one real question)")
    downstream = Downstream(settings, Observer())
    await downstream.start()
    try:
        healthy = [await _report(name, check) for name, check in _checks(settings, downstream)]
    finally:
        await downstream.close()
    click.echo(f"\n{sum(healthy)} of {len(healthy)} answer")
    return 0 if all(healthy) else 1


def _checks(settings: Settings, downstream: Downstream) -> list[tuple[str, Callable[[], Awaitable[str]] | None]]:
    call = Call("doctor", 0, "doctor", PATIENCE_MS, PATIENCE_MS)

    async def store() -> str:
        client = SessionStore(settings.redis_url, Observer(), settings.session_ttl_seconds)
        await client.start()
        try:
            await client.load("doctor")
        finally:
            await client.close()
        return "reads"

    async def intent() -> str:
        assert downstream.intent is not None
        found = await downstream.intent.classify(_QUESTION, call)
        return f"{found.name} ({found.confidence:.2f})"

    async def rag() -> str:
        assert downstream.rag is not None
        found = await downstream.rag.query(_QUESTION, call)
        return f"{len(found.passages)} passages"

    async def llm() -> str:
        assert downstream.llm is not None
        async for token in downstream.llm.stream([{"role": "user", "content": _QUESTION}], call):
            return f"first token {token!r}"
        return "an empty answer"

    async def tts() -> str:
        assert downstream.tts is not None
        async for pcm in downstream.tts.synthesize("Hello.", call):
            return f"{len(pcm)} bytes at {downstream.tts.sample_rate} Hz"
        return "no audio"

    async def stt() -> str:
        return await _stt_hears(downstream)

    return [
        (f"store  {settings.redis_url.rpartition('@')[2]}", store),
        (f"intent {settings.intent_service_url}", intent if downstream.intent is not None else None),
        (f"rag    {settings.rag_service_url}", rag if downstream.rag is not None else None),
        (f"llm    {settings.llm_base_url}", llm if downstream.llm is not None else None),
        (f"tts    {settings.tts_service_url}", tts if downstream.tts is not None else None),
        (f"stt    {settings.stt_service_url}", stt if downstream.stt_relay is not None else None),
    ]


async def _stt_hears(downstream: Downstream) -> str:
    """Half a second of silence is taken without a failure."""
    assert downstream.stt_relay is not None
    failures: list[DownstreamError] = []
    relay = downstream.stt_relay("doctor", lambda event: None, failures.append)
    try:
        for _ in range(5):
            relay.feed(bytes(3200))
            await asyncio.sleep(0.1)
            if failures:
                raise failures[0]
    finally:
        await relay.close()
    return "takes audio"


async def _report(name: str, check: Callable[[], Awaitable[str]] | None) -> bool:
    if check is None:
        click.echo(f"  –      {name}switched off")
        return True
    began = time.monotonic()
    try:
        answer = await check()
    except (DownstreamError, StoreUnavailable) as error:
        click.echo(f"  FAILED {name}: {error}")
        return False
    click.echo(f"  ok     {name}: {answer} ({(time.monotonic() - began) * 1000:.0f} ms)")
    return True
