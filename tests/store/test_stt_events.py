"""Fragments published over a real Valkey, before, while and after it was gone."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from redis.asyncio import Redis

from orchestrator.store import stt_events
from orchestrator.store.stt_events import SttEvents
from tests.loops import live, until
from tests.store.conftest import Valkey

CHANNEL = "leibniz:events:stt"


class Fragment(NamedTuple):
    text: str
    is_final: bool
    timestamp: float | None


Delivered = list[tuple[str, Fragment]]


@asynccontextmanager
async def subscribed(url: str, *, wait: bool = True) -> AsyncIterator[tuple[SttEvents[Fragment], Delivered]]:
    delivered: Delivered = []
    events = SttEvents(url, CHANNEL, Fragment, lambda session_id, event: delivered.append((session_id, event)))
    await events.start()
    try:
        if wait:
            await until(lambda: events.subscribed)
        yield events, delivered
    finally:
        await events.close()


def has(delivered: Delivered, count: int) -> bool:
    return len(delivered) == count


async def publish(url: str, *messages: bytes) -> None:
    client = Redis.from_url(url)
    for message in messages:
        await client.publish(CHANNEL, message)
    await client.aclose()


def fragment(session_id: str, text: str, **fields: object) -> bytes:
    return json.dumps({"session_id": session_id, "text": text, **fields}).encode()


@live
async def test_fragments_are_delivered_in_order_to_their_sessions(valkey: Valkey) -> None:
    async with subscribed(valkey.url) as (_, delivered):
        await publish(
            valkey.url,
            fragment("a", "what", is_final=False, timestamp=1.5),
            fragment("b", "hello", is_final=True, source="x"),
            fragment("a", "what are", is_final=True, timestamp=2),
        )
        await until(lambda: len(delivered) == 3)
        assert delivered == [
            ("a", Fragment("what", False, 1.5)),
            ("b", Fragment("hello", True, None)),
            ("a", Fragment("what are", True, 2.0)),
        ]


@live
async def test_bad_messages_are_counted_and_dropped(valkey: Valkey) -> None:
    bad = [
        b"", b"x", b"[]", b"{}", b'{"session_id":"a"}', b'{"session_id":7,"text":"x"}', b"\xff", b"[" * 100_000,
        fragment("a", "x", is_final="yes"), fragment("a", "x", timestamp="now"), fragment("a", "ä" * 3000),
    ]  # fmt: skip
    async with subscribed(valkey.url) as (events, delivered):
        await publish(valkey.url, *bad, fragment("a", "good"))
        await until(lambda: len(delivered) == 1)
        assert events.dropped == len(bad)


@live
async def test_the_subscription_outlives_the_server(valkey: Valkey) -> None:
    async with subscribed(valkey.url) as (events, delivered):
        for round_ in range(2):
            valkey.kill()
            await until(lambda: not events.subscribed)
            valkey.restart()
            await until(lambda: events.subscribed)
            await publish(valkey.url, fragment("a", f"round {round_}"))
            await until(partial(has, delivered, round_ + 1))


@live
async def test_a_server_that_comes_late(tmp_path: Path) -> None:
    path = tmp_path / "late"
    async with subscribed(f"unix://{path}/valkey.sock", wait=False) as (events, delivered):
        await asyncio.sleep(0.05)
        assert not events.subscribed
        server = Valkey(path)
        try:
            await until(lambda: events.subscribed)
            await publish(server.url, fragment("a", "x"))
            await until(lambda: len(delivered) == 1)
        finally:
            server.server.stop()


@live
async def test_silence_does_not_end_the_subscription(valkey: Valkey) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stt_events, "_HEALTH_SECONDS", 0.02)
        async with subscribed(valkey.url) as (events, delivered):
            await asyncio.sleep(0.2)
            assert events.subscribed
            await publish(valkey.url, fragment("a", "x"))
            await until(lambda: len(delivered) == 1)


@live
async def test_a_server_that_froze_is_noticed(valkey: Valkey) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stt_events, "_HEALTH_SECONDS", 0.05)
        async with subscribed(valkey.url) as (events, delivered):
            valkey.signal(signal.SIGSTOP)
            await until(lambda: not events.subscribed)
            valkey.signal(signal.SIGCONT)
            await until(lambda: events.subscribed)
            await publish(valkey.url, fragment("a", "x"))
            await until(lambda: len(delivered) == 1)
