"""The real pool before scripted services on real sockets: order, aborts over the wire, failures, the store, leaks."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.fakes import FakeProcess
from orchestrator.store.embedded import EmbeddedValkey
from tests.e2e.client import Client
from tests.e2e.conftest import PATIENT
from tests.server.pools import RunningPool, until

pytestmark = pytest.mark.server


def test_a_turn_over_real_sockets(pool: RunningPool) -> None:
    async def run() -> None:
        async with Client(pool.url, "wire-1") as client:
            await client.ask()
            done = (await client.until("turn_complete")).message
            assert client.kinds[:3] == ["connected", "response_ready", "audio"]
            assert done["degraded"] == []
            assert done["state"] == "IDLE"
            breakdown = done["latency_breakdown"]
            # The final fragment asked already: what passed until `vad_end` is saved, the rest is waited for.
            saved = breakdown.get("saved_ms", 0.0)
            assert breakdown["intent_ms"] + saved >= 49
            assert breakdown["rag_ms"] + saved >= 79
            assert breakdown["intent_rag_ms"] < breakdown["intent_ms"] + breakdown["rag_ms"]
            assert len(client.audio) % 2 == 0
            assert [frame.message["seq"] for frame in client.frames if not frame.audio] == list(
                range(1, 1 + sum(1 for frame in client.frames if not frame.audio))
            )

    asyncio.run(run())


# The services that hang, the one whose request shows that the phase is reached, the ones whose call must be aborted.
PHASES = {
    "understanding": (["intent", "rag"], "rag", ["intent", "rag"]),
    "first-token": (["llm"], "llm", ["llm"]),
    "first-chunk": (["tts"], "tts", ["tts"]),
}


@pytest.mark.parametrize("phase", PHASES)
def test_barge_in_aborts_what_is_under_way(phase: str, waiting_pool: RunningPool, fakes: FakeProcess) -> None:
    hanging, reached, aborted = PHASES[phase]

    def stopped(service: str) -> int:
        counters = fakes.stats()[service]
        return counters.aborted + counters.cancels

    async def run() -> None:
        async with Client(waiting_pool.url, f"barge-{phase}-{time.monotonic_ns()}") as client:
            before = {service: stopped(service) for service in aborted}
            for service in hanging:
                fakes.script(service, hang=True)
            asked = fakes.stats()[reached]
            seen = asked.requests + asked.messages
            await client.ask()

            def reached_it() -> bool:
                now = fakes.stats()[reached]
                return now.requests + now.messages > seen

            await asyncio.to_thread(until, reached_it, 10, f"{reached} was not asked")
            await client.send("user_speaking", confidence=1.0)
            await client.until("interrupted")
            count = len(client.frames)
            for service in aborted:
                await asyncio.to_thread(
                    until, lambda s=service: stopped(s) > before[s], 5, f"{service} was not aborted"
                )
            assert [frame.kind for frame in client.frames[count:]] == []

    fakes.reset()
    try:
        asyncio.run(run())
    finally:
        fakes.reset()


def test_no_audio_follows_a_barge_in(waiting_pool: RunningPool) -> None:
    async def run() -> None:
        async with Client(waiting_pool.url, f"quiet-{time.monotonic_ns()}") as client:
            await client.ask()
            await client.until("audio", 3)
            await client.send("user_speaking", confidence=1.0)
            message = (await client.until("interrupted")).message
            assert message["played_ms"] > 0
            count = len(client.frames)
            await asyncio.sleep(0.5)
            assert [frame.kind for frame in client.frames[count:]] == []

    asyncio.run(run())


@pytest.mark.parametrize(
    ("service", "script", "degraded"),
    [
        ("intent", {"status": 503}, "intent"),
        ("intent", {"garbage": True}, "intent"),
        ("intent", {"hang": True}, "intent"),
        ("intent", {"oversize_bytes": 3_000_000}, "intent"),
        ("rag", {"wrong_type": True}, "rag"),
        ("rag", {"status": 500}, "rag"),
        ("rag", {"drop_after": 0}, "rag"),
        ("llm", {"status": 429}, "llm"),
        ("llm", {"hang": True}, "llm"),
        ("tts", {"status": 500}, "tts"),
    ],
)
def test_the_conversation_goes_on(
    service: str, script: dict[str, object], degraded: str, shaken_pool: RunningPool, fakes: FakeProcess
) -> None:
    fakes.reset()
    fakes.script(service, **script)

    async def run() -> None:
        async with Client(shaken_pool.url, f"fail-{service}-{next(iter(script))}") as client:
            await client.ask()
            done = (await client.until("turn_complete")).message
            assert degraded in done["degraded"]
            assert done["text"]

    try:
        asyncio.run(run())
    finally:
        fakes.reset()


def test_a_session_survives_its_worker(pool: RunningPool) -> None:
    async def run() -> None:
        async with Client(pool.url, "survivor") as client:
            await client.ask("What are admission requirements?")
            await client.until("turn_complete")
            await asyncio.sleep(0.2)
            [worker] = pool.workers()
            os.kill(worker, signal.SIGKILL)
            await client.until_closed()
        async with Client(pool.url, "survivor") as client:
            assert client.greeting["resumed"] is True
            assert client.greeting["turn_number"] == 1
            await client.ask("And what else?")
            assert (await client.until("response_ready")).message["turn_number"] == 2

    asyncio.run(run())


def test_redis_going_and_coming_back_is_not_noticed_by_the_caller(
    start_pool: Callable[..., RunningPool], fakes: FakeProcess, tmp_path: Path
) -> None:
    fakes.reset()
    server = EmbeddedValkey(tmp_path / "store")
    server.start()
    pool = start_pool({**fakes.env, **PATIENT, "REDIS_URL": server.url}, 1)

    def health() -> tuple[str, bool]:
        import json

        answer = json.loads(pool.ask("/health")[2])
        return answer["status"], answer["redis_connected"]

    async def run() -> None:
        async with Client(pool.url, "unshaken") as client:
            await client.ask()
            await client.until("turn_complete")
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.to_thread(until, lambda: health() == ("degraded", False), 10, "health does not notice")
            await client.ask()
            await client.until("turn_complete", 2)
            server.start()
            await asyncio.to_thread(until, lambda: health() == ("healthy", True), 10, "health does not recover")

    try:
        asyncio.run(run())
        [worker] = pool.workers()
        os.kill(worker, signal.SIGKILL)

        async def resume() -> None:
            async with Client(pool.url, "unshaken") as client:
                assert client.greeting["turn_number"] == 2

        asyncio.run(resume())
    finally:
        server.stop()


def test_five_hundred_short_sessions_leave_no_descriptor_behind(pool: RunningPool) -> None:
    [worker] = pool.workers()

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{worker}/fd"))

    async def visit(number: int) -> None:
        async with Client(pool.url, f"short-{number}") as client:
            if number % 3 == 0:
                await client.ask()
                if number % 2:
                    await client.until("response_ready")

    async def run(numbers: range) -> None:
        for start in range(numbers.start, numbers.stop, 50):
            await asyncio.gather(*(visit(number) for number in range(start, min(start + 50, numbers.stop))))

    asyncio.run(run(range(1000, 1050)))
    time.sleep(1.0)
    before = descriptors()
    asyncio.run(run(range(500)))
    # Pooled keep-alive connections to the services may come and go; 500 sessions may not.
    until(lambda: descriptors() <= before + 20, 15, lambda: f"{descriptors()} descriptors, {before} before")
    assert b'"active_sessions":0' in pool.ask("/health")[2]


def test_the_description_of_a_session(pool: RunningPool) -> None:
    import json

    async def run() -> None:
        async with Client(pool.url, "described") as client:
            await client.ask()
            await client.until("turn_complete")

    asyncio.run(run())
    status, _, body = pool.ask("/sessions/described")
    answer = json.loads(body)
    assert status == 200
    assert answer["turn_number"] == 1
    assert answer["latency_breakdowns"]
    assert pool.ask("/sessions/nobody")[0] == 404


def test_metrics_count_turns_and_stages(pool: RunningPool) -> None:
    async def run() -> None:
        async with Client(pool.url, "measured") as client:
            await client.ask()
            await client.until("turn_complete")

    asyncio.run(run())
    text = pool.ask("/metrics")[2].decode()

    def value(series: str) -> float:
        return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(series + " "))

    turns = value('orchestrator_turns_total{outcome="completed"}')
    assert turns >= 1
    for stage in ("intent", "rag", "intent_rag", "llm_first_token", "first_clause", "tts_first_chunk"):
        assert value(f'orchestrator_stage_seconds_count{{stage="{stage}"}}') >= turns
    assert value("orchestrator_turn_overhead_seconds_count") >= turns
