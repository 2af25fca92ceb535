"""What the clients and the store cost: `python -m tests.downstream.figures` prints CPU per call and connections opened.

The services run in a process of their own, on another core where there is one. CPU is this process's user and system
time, the loop's waiting included; the lowest of several rounds is printed beside the median, because the machine is
shared.
"""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from bench.delays import Delay
from bench.fake_config import FakeConfig
from bench.fakes import FakeProcess
from orchestrator.downstream.factory import Downstream
from orchestrator.downstream.http_pool import HttpPool
from orchestrator.downstream.intent import IntentClient
from orchestrator.downstream.types import Call
from orchestrator.settings import load_settings
from orchestrator.store.embedded import EmbeddedValkey
from orchestrator.store.record import HistoryEntry, SessionRecord
from orchestrator.store.redis_store import SessionStore
from orchestrator.telemetry.observer import Observer

TEXT = "Admission needs a school leaving certificate and grades, plus forms."
ROUNDS = 7


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def call(session: str, stage: str) -> Call:
    return Call(session, 1, stage, 5000.0, 5000.0)


async def rounds(name: str, unit: str, count: int, side_by_side: int, once: Callable[[str], Awaitable[Any]]) -> None:
    """Prints CPU per `once`, in µs, with `side_by_side` of them under way all the time."""

    async def worker(index: int) -> None:
        for _ in range(count // side_by_side):
            await once(f"s{index}")

    await asyncio.gather(*(once(f"s{index}") for index in range(side_by_side)))
    results = []
    for _ in range(ROUNDS):
        began = cpu()
        await asyncio.gather(*(worker(index) for index in range(side_by_side)))
        results.append((cpu() - began) / (count // side_by_side * side_by_side) * 1e6)
    print(f"{name:46} {min(results):8.1f} {statistics.median(results):8.1f} {max(results):8.1f}  µs {unit}")


async def drain(stream: Any) -> int:
    size = 0
    async for piece in stream:
        size += len(piece)
    return size


async def calls(env: dict[str, str], protocol: str) -> None:
    services = Downstream(load_settings({**env, "TTS_PROTOCOL": protocol}), Observer())
    await services.start()
    await asyncio.sleep(0.2)
    intent, rag, llm, tts = services.intent, services.rag, services.llm, services.tts
    assert intent is not None
    assert rag is not None
    assert llm is not None
    assert tts is not None
    if protocol == "openai":
        pool = HttpPool("intent", env["INTENT_SERVICE_URL"])
        pool.open()
        bare = IntentClient(pool)
        for width in (1, 16):
            await rounds(
                f"intent POST, {width} at a time", "a call", 2000, width,
                lambda session: bare.classify(TEXT, call(session, "intent")),
            )  # fmt: skip
            await rounds(
                f"the same behind its guard, {width} at a time", "a call", 2000, width,
                lambda session: intent.classify(TEXT, call(session, "intent")),
            )  # fmt: skip
        await pool.close()
        for width in (1, 20):
            await rounds(
                f"LLM stream of 40 tokens, {width} at a time", "a stream", 200, width,
                lambda session: drain(llm.stream([{"role": "user", "content": TEXT}], call(session, "llm"))),
            )  # fmt: skip
        await rounds(
            "RAG stream of 40 pieces, 20 at a time", "a stream", 200, 20,
            lambda session: drain(rag.stream_query(TEXT, call(session, "rag"))),
        )  # fmt: skip
    for width in (1, 20):
        await rounds(
            f"TTS {protocol}, 10 chunks of 100 ms, {width} at a time", "a clause", 200, width,
            lambda session: drain(tts.synthesize(TEXT, call(session, "tts"))),
        )  # fmt: skip
    await services.close()


async def cancelled(process: FakeProcess, protocol: str, when: str) -> None:
    """Connections opened a cancelled clause, one clause at a time, the next one 100 ms later."""
    services = Downstream(load_settings({**process.env, "TTS_PROTOCOL": protocol}), Observer())
    await services.start()
    await asyncio.sleep(0.2)
    assert services.tts is not None
    tts = services.tts
    await drain(tts.synthesize(TEXT, call("a", "tts")))
    before = process.stats()["tts"].connections
    times = 50
    for _ in range(times):
        stream = tts.synthesize(TEXT, call("a", "tts"))
        if when == "before the first chunk":
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.wait((task,))
        else:
            await anext(stream)
            await stream.aclose()
        await asyncio.sleep(0.1)
    opened = process.stats()["tts"].connections - before
    print(f"connections opened a cancelled clause, {protocol}, {when}: {opened / times:.2f}")
    await services.close()


def copy(record: SessionRecord) -> SessionRecord:
    return record


async def store(url: str) -> None:
    sessions = SessionStore(url, Observer(), 3600)
    await sessions.start()
    history = [HistoryEntry("user" if turn % 2 else "assistant", TEXT, turn) for turn in range(20)]
    records = [SessionRecord(session_id=f"s{i}", epoch=1, history=history) for i in range(100)]

    async def write_all() -> None:
        for record in records:
            sessions.mark_dirty(record.session_id, partial(copy, record))
        while sessions.dirty:
            await asyncio.sleep(0.005)

    async def load_all() -> None:
        await asyncio.gather(*(sessions.load(record.session_id) for record in records))

    for name, work in (("fenced write of 2 KB, 100 at a time", write_all), ("load, 100 at a time", load_all)):
        await work()
        results = []
        for _ in range(30):
            began = cpu()
            await work()
            results.append((cpu() - began) / len(records) * 1e6)
        print(f"{name:46} {min(results):8.1f} {statistics.median(results):8.1f} {max(results):8.1f}  µs a session")
    await sessions.close()


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    print(f"{'':46} {'lowest':>8} {'median':>8} {'highest':>8}")
    config = FakeConfig(
        intent=Delay(0.0), rag=Delay(1.0), llm_first=Delay(2.0), llm_gap_ms=1.0, tts_first=Delay(2.0),
        tts_spacing_ms=2.0, keep_requests=0,
    )  # fmt: skip
    with FakeProcess(config, cpu=cores[-1]) as process:
        os.sched_setaffinity(0, {cores[0]})
        uvloop.run(calls(process.env, "openai"))
        uvloop.run(calls(process.env, "stream"))
        for protocol in ("openai", "stream"):
            for when in ("before the first chunk", "after the first chunk"):
                uvloop.run(cancelled(process, protocol, when))
    with tempfile.TemporaryDirectory() as directory, EmbeddedValkey(Path(directory)) as server:
        uvloop.run(store(server.url))


if __name__ == "__main__":
    main()
