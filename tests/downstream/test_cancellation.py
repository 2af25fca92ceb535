"""Every operation, cancelled after each number of steps of the loop: nothing stays behind, nothing is swallowed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from orchestrator.core.resilience import BreakerPolicy
from orchestrator.downstream.factory import Downstream
from orchestrator.downstream.guard import ServiceGuard
from orchestrator.downstream.hedging import Hedger
from orchestrator.downstream.http_pool import HttpPool
from orchestrator.downstream.intent import IntentClient
from orchestrator.downstream.resilient import ResilientIntent
from orchestrator.downstream.tts_stream import TtsStream
from orchestrator.downstream.ws_link import WsEndpoint
from orchestrator.errors import DownstreamError, Failure
from orchestrator.settings import load_settings
from orchestrator.telemetry.observer import Observer
from tests.downstream.running import CALL, Connection, RawServer, chunk, collect, failure_of
from tests.downstream.test_guards import Seen
from tests.downstream.test_http_clients import whole
from tests.downstream.test_tts import A, B, echo, say
from tests.downstream.ws_peers import Peer, ws_serving
from tests.loops import live, until

Operation = Callable[[], Awaitable[Any]]
MOST_STEPS = 400


async def cancelled_after(operation: Operation, steps: int) -> bool:
    """Runs `operation`, cancels it after `steps` steps of the loop; whether it was over before. A cancel must stick."""
    task = asyncio.ensure_future(operation())
    for _ in range(steps):
        if task.done():
            break
        await asyncio.sleep(0)
    was_done = task.done()
    task.cancel()
    await asyncio.wait((task,))
    if was_done:
        task.result()
        return True
    assert task.cancelled() or task.exception() is None, task.exception()
    return False


def client_tasks() -> set[asyncio.Task[Any]]:
    """The tasks of the clients and of what they use; the services of these tests run in the same loop."""
    tasks = set()
    for task in asyncio.all_tasks():
        code = getattr(task.get_coro(), "cr_code", None)
        if code is None or "/orchestrator/" in code.co_filename or "/aiohttp/" in code.co_filename:
            tasks.add(task)
    return tasks


async def cancelled_everywhere(operation: Operation, check: Callable[[], Awaitable[None]]) -> None:
    """Cancels `operation` at every step until it is over by itself, with `check` in between."""
    for steps in range(MOST_STEPS):
        over = await cancelled_after(operation, steps)
        await until(lambda: not client_tasks())
        await check()
        if over:
            assert steps > 1
            return
    raise AssertionError(f"not over after {MOST_STEPS} steps")


class Slow:
    """A service that answers each part of its answer a few steps later; counts requests under way."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.active = 0
        self.server = RawServer(self.serve)

    async def serve(self, connection: Connection) -> None:
        while True:
            headers, _ = await connection.request()
            if headers[":method"] == "GET":
                await connection.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            self.active += 1
            gone = asyncio.ensure_future(connection.reader.read(1))
            try:
                answer = whole(self.service)
                size = max(1, len(answer) // 4)
                for start in range(0, len(answer), size):
                    for _ in range(3):
                        await asyncio.sleep(0)
                        if gone.done():
                            return
                    await connection.send(answer[start : start + size])
            finally:
                self.active -= 1
                gone.cancel()
                await asyncio.wait((gone,))


@pytest.mark.parametrize("service", ["intent", "rag", "rag stream", "llm", "tts"])
def test_http_calls(service: str) -> None:
    @live
    async def run() -> None:
        slow = Slow(service)
        await slow.server.start()
        url = slow.server.url
        seen = Seen()
        environ = {
            "INTENT_SERVICE_URL": url, "RAG_SERVICE_URL": url, "LLM_BASE_URL": f"{url}/v1", "TTS_SERVICE_URL": url,
            "STT_SERVICE_URL": "", "TTS_PROTOCOL": "openai",
        }  # fmt: skip
        services = Downstream(load_settings(environ), seen)
        await services.start()
        await asyncio.sleep(0.05)
        assert services.intent is not None
        assert services.rag is not None
        assert services.llm is not None
        assert services.tts is not None
        intent, rag, llm, tts = services.intent, services.rag, services.llm, services.tts
        operation: Operation = {
            "intent": lambda: intent.classify("hi", CALL),
            "rag": lambda: rag.query("hi", CALL),
            "rag stream": lambda: collect(rag.stream_query("hi", CALL)),
            "llm": lambda: collect(llm.stream([], CALL)),
            "tts": lambda: collect(tts.synthesize("hi", CALL)),
        }[service]

        async def check() -> None:
            await until(lambda: slow.active == 0)
            assert set(services.breaker_states().values()) == {"closed"}

        await cancelled_everywhere(operation, check)
        assert set(seen.outcomes) == {"cancelled", "ok"}
        await operation()
        await services.close()
        await until(lambda: slow.server.open == 0)
        await slow.server.stop()

    run()


@live
async def test_a_half_open_probe() -> None:
    slow = Slow("intent")
    await slow.server.start()
    pool = HttpPool("intent", slow.server.url)
    pool.open()
    loop = asyncio.get_running_loop()
    policy = BreakerPolicy(consecutive=1, pause=0.0, longest_pause=0.0)
    guard = ServiceGuard("intent", Observer(), loop, 0.1, policy)
    intent = ResilientIntent(IntentClient(pool), Hedger(guard))

    async def trip() -> None:
        guard.failed(guard.admit(), DownstreamError("intent", Failure.UNREACHABLE), 1.0)
        assert guard.state == "open"

    async def check() -> None:
        await until(lambda: slow.active == 0)
        # The place of the probe is free again, whatever became of the last one.
        if guard.state == "half_open":
            guard.failed(guard.admit(), DownstreamError("intent", Failure.UNREACHABLE), 1.0)
        elif guard.state == "closed":
            await trip()

    await trip()
    await cancelled_everywhere(lambda: intent.classify("hi", CALL), check)
    await pool.close()
    await slow.server.stop()


@live
async def test_speech_over_the_streaming_protocol() -> None:
    async def handler(peer: Peer) -> None:
        while True:
            message = await peer.receive()
            if message["type"] != "synthesize":
                await peer.send("complete", cancelled=True)
            elif message["text"] == "check":
                await peer.speak(B)
            else:
                for _ in range(3):
                    await asyncio.sleep(0)
                await peer.speak(A)

    async with ws_serving(handler) as server:
        tts = TtsStream(WsEndpoint("tts", server.url, "/api/v1/stream"), 24_000, "calm")

        async def check() -> None:
            assert await say(tts, "check") == B

        await cancelled_everywhere(lambda: say(tts, "hi"), check)
        assert server.connections == 1
        await tts.close()
        await until(lambda: server.open == 0)


@live
async def test_connecting_for_speech() -> None:
    async with ws_serving(echo) as server:

        async def operation() -> bytes:
            tts = TtsStream(WsEndpoint("tts", server.url, "/api/v1/stream"), 24_000, "calm")
            try:
                return await say(tts, "hi")
            finally:
                await tts.close()

        async def check() -> None:
            await until(lambda: server.open == 0)

        await cancelled_everywhere(operation, check)


@live
async def test_an_answer_and_a_cancel_in_the_same_step_leave_the_pool_usable() -> None:
    async def handler(connection: Connection) -> None:
        while True:
            await connection.request()
            await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"x" * 100))
            await connection.send(b"0\r\n\r\n")

    server = RawServer(handler)
    await server.start()
    pool = HttpPool("intent", server.url, warm_connections=1)
    pool.open()
    client = IntentClient(pool)

    async def check() -> None:
        await failure_of(client.classify("hi", CALL))

    async def operation() -> None:
        await failure_of(client.classify("hi", CALL))

    await cancelled_everywhere(operation, check)
    assert server.open <= 2
    await pool.close()
    await server.stop()
