"""Speech over the streaming protocol, and the choice between the two protocols."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.downstream import tts_stream
from orchestrator.downstream.http_pool import HttpPool
from orchestrator.downstream.tts import TtsClient
from orchestrator.downstream.tts_openai import TtsOpenAi
from orchestrator.downstream.tts_stream import TtsStream
from orchestrator.downstream.types import Call
from orchestrator.downstream.ws_link import WsEndpoint
from orchestrator.errors import DownstreamError, Failure
from tests.downstream.running import (
    CALL,
    SHORT,
    Connection,
    collect,
    failure_of,
    ok,
    serving,
)
from tests.downstream.ws_peers import Peer, WsServer, ws_serving
from tests.loops import live, until

A, B, C = b"\x0a\x00" * 100, b"\x0b\x00" * 100, b"\x0c\x00" * 100


@asynccontextmanager
async def speaking(server: WsServer, **options: Any) -> AsyncIterator[TtsStream]:
    tts = TtsStream(WsEndpoint("tts", server.url, "/api/v1/stream", **options), 24_000, "calm")
    try:
        yield tts
    finally:
        await tts.close()


async def say(tts: Any, text: str, call: Call = CALL) -> bytes:
    return b"".join(await collect(tts.synthesize(text, call)))


async def echo(peer: Peer) -> None:
    """Speaks every text as its letters; acknowledges a cancel with `complete`, as the contract's services do."""
    await peer.send("connected", sample_rate=22_050)
    while True:
        message = await peer.receive()
        if message["type"] == "synthesize":
            await peer.speak(message["text"].encode() * 2)
        else:
            await peer.send("complete", cancelled=True)


@live
async def test_the_contract() -> None:
    seen: list[dict[str, Any]] = []

    async def handler(peer: Peer) -> None:
        await peer.send("connected")
        while True:
            seen.append(await peer.receive())
            await peer.speak(A[:33], A[33:], text="Hello.")

    async with ws_serving(handler) as server, speaking(server, api_key="k") as tts:
        assert tts.sample_rate == 24_000
        tts.prepare("test_001")
        await until(lambda: server.connections == 1)
        for _ in range(3):
            pieces = await collect(tts.synthesize("Hello.", CALL))
            assert b"".join(pieces) == A
            assert all(len(piece) % 2 == 0 for piece in pieces)
        assert tts.sample_rate == 22_050
        assert seen[0] == {"type": "synthesize", "text": "Hello.", "emotion": "calm", "streaming": True}
        peer = server.peers[0]
        assert (peer.path, peer.session_id) == ("/api/v1/stream", "test_001")
        assert peer.headers["Authorization"] == "Bearer k"
        tts.release("test_001")
        await until(lambda: server.open == 0)
        assert server.connections == 1


@live
async def test_each_session_has_its_own_connection() -> None:
    async with ws_serving(echo) as server, speaking(server) as tts:
        texts = [f"text{index:02}" for index in range(20)]
        spoken = await asyncio.gather(*(say(tts, text, replace(CALL, session_id=text)) for text in texts))
        assert spoken == [text.encode() * 2 for text in texts]
        assert server.connections == 20
        assert sorted(peer.session_id for peer in server.peers) == texts


@live
async def test_a_cancel_with_stale_audio_behind_it_leaves_the_next_clause_clean() -> None:
    async def handler(peer: Peer) -> None:
        turn = 0
        while True:
            message = await peer.receive()
            if message["type"] == "synthesize":
                turn += 1
                if turn % 2 == 0:
                    await peer.speak(B, text="second")
                    continue
                await peer.send("sentence_start", index=0)
                await peer.audio(A)
            else:
                for _ in range(3):
                    await peer.audio(A)
                await peer.send("sentence_start", index=1)
                await peer.audio(A)
                await peer.send("complete", cancelled=True)

    async with ws_serving(handler) as server, speaking(server) as tts:
        for round_ in range(4):
            stream = tts.synthesize("first", CALL)
            assert await anext(stream) == A
            await stream.aclose()
            if round_ == 0:
                await asyncio.sleep(0.05)
            assert await say(tts, "second") == B
        assert server.connections == 1


@pytest.mark.parametrize("told", [True, False])
def test_a_service_that_does_not_acknowledge_is_waited_out(told: bool) -> None:
    """Stale messages arrive after the cancel; the next clause is sent when they stopped."""

    @live
    async def run() -> None:
        sent_at: list[float] = []
        loop = asyncio.get_running_loop()

        async def handler(peer: Peer) -> None:
            await peer.receive()
            await peer.send("sentence_start", index=0, **({"text": "first"} if told else {}))
            await peer.audio(A)
            assert (await peer.receive())["type"] == "cancel"
            for _ in range(5):
                await asyncio.sleep(0.01)
                await peer.audio(A)
            await peer.receive()
            sent_at.append(loop.time())
            # What was still under way when the second clause was sent.
            await peer.audio(A)
            if told:
                await peer.send("sentence_start", index=1, text="first")
                await peer.audio(A)
            await peer.speak(B, text="second" if told else None)
            await peer.receive()

        async with ws_serving(handler) as server, speaking(server) as tts:
            stream = tts.synthesize("first", CALL)
            await anext(stream)
            await stream.aclose()
            began = loop.time()
            assert await say(tts, "second") == B
            assert sent_at[0] - began >= 0.24
            assert server.connections == 1

    run()


@live
async def test_a_cancel_that_crosses_the_end_is_acknowledged_twice() -> None:
    async def handler(peer: Peer) -> None:
        await peer.receive()
        await peer.audio(A)
        await peer.receive()
        await peer.send("complete")
        await peer.receive()
        await peer.send("complete")
        await peer.send("complete", cancelled=True)
        await peer.speak(B)
        await peer.receive()

    async with ws_serving(handler) as server, speaking(server) as tts:
        stream = tts.synthesize("first", CALL)
        await anext(stream)
        await stream.aclose()
        assert await say(tts, "second") == B
        assert server.connections == 1


@live
async def test_two_cancels_need_two_acknowledgements() -> None:
    async with ws_serving(echo) as server, speaking(server) as tts:
        release = asyncio.Event()

        async def handler(peer: Peer) -> None:
            # Teach the client that cancels are acknowledged.
            await peer.receive()
            await peer.audio(A)
            await peer.receive()
            await peer.send("complete", cancelled=True)
            for _ in range(2):
                assert (await peer.receive())["type"] == "synthesize"
                assert (await peer.receive())["type"] == "cancel"
            assert (await peer.receive())["text"] == "third"
            await release.wait()
            for _ in range(2):
                await peer.send("sentence_start", index=0)
                await peer.audio(A)
                await peer.send("complete", cancelled=True)
            await peer.speak(C)
            await peer.receive()

        server.handler = handler
        stream = tts.synthesize("zeroth", CALL)
        await anext(stream)
        await stream.aclose()
        await asyncio.sleep(0.02)
        for _ in range(2):
            task = asyncio.ensure_future(collect(tts.synthesize("nothing", CALL)))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait((task,))
        third = asyncio.ensure_future(say(tts, "third"))
        await asyncio.sleep(0.01)
        release.set()
        assert await third == C
        assert server.connections == 1


@live
async def test_clauses_of_a_session_are_spoken_one_after_the_other() -> None:
    order: list[str] = []

    async def handler(peer: Peer) -> None:
        while True:
            message = await peer.receive()
            order.append(message.get("text", message["type"]))
            await asyncio.sleep(0.01)
            await peer.speak(message["text"].encode() * 2)

    async with ws_serving(handler) as server, speaking(server) as tts:
        texts = ["aa", "bb", "cc", "dd"]
        tasks = [asyncio.ensure_future(say(tts, text)) for text in texts]
        await asyncio.sleep(0.005)
        tasks[2].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert done[:2] == [b"aaaa", b"bbbb"]
        assert isinstance(done[2], asyncio.CancelledError)
        assert done[3] == b"dddd"
        assert order == ["aa", "bb", "dd"]
        assert server.connections == 1


@live
async def test_a_clause_handed_over_while_its_waiter_is_cancelled_goes_to_the_next() -> None:
    async with ws_serving(echo) as server, speaking(server) as tts:
        await say(tts, "warm")
        first = tts.synthesize("aa", CALL)
        await anext(first)
        waiting = [asyncio.ensure_future(say(tts, text)) for text in ("bb", "cc")]
        await asyncio.sleep(0.01)
        await first.aclose()
        waiting[0].cancel()
        assert await waiting[1] == b"cccc"
        assert server.connections == 1


BROKEN: dict[str, Callable[[Peer], Any]] = {
    "an error": lambda peer: peer.send("error", message="no voice\n"),
    "an error without a message": lambda peer: peer.socket.send('{"type":"error","message":null}'),
    "no JSON": lambda peer: peer.socket.send("hello"),
    "no object": lambda peer: peer.socket.send("[1,2]"),
    "no type": lambda peer: peer.socket.send('{"data":"AAAA"}'),
    "a wrong type of type": lambda peer: peer.socket.send('{"type":7}'),
    "data that is no base64": lambda peer: peer.send("audio", data="!!!", sample_rate=24_000),
    "data of a wrong type": lambda peer: peer.send("audio", data=[1], sample_rate=24_000),
    "a rate of nothing": lambda peer: peer.send("audio", data="AAAA", sample_rate=0),
    "a rate of a wrong type": lambda peer: peer.send("audio", data="AAAA", sample_rate="high"),
    "a binary frame": lambda peer: peer.socket.send(b"\x00\x01"),
    "deep nesting": lambda peer: peer.socket.send('{"type":' + "[" * 100_000),
    "a message of two megabytes": lambda peer: peer.audio(bytes(2_000_000)),
    "a close": lambda peer: peer.socket.close(1011),
    "a drop": lambda peer: peer.socket.transport.abort(),
    "bad framing": lambda peer: peer.socket.transport.write(b"\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_every_wrong_answer_is_one_typed_error_and_the_next_clause_works(broken: Callable[[Peer], Any]) -> None:
    @live
    async def run() -> None:
        async def handler(peer: Peer) -> None:
            await peer.receive()
            if peer is server.peers[0]:
                result = broken(peer)
                if result is not None:
                    await result
                await peer.receive()
            else:
                await peer.speak(B)
                await peer.receive()

        async with ws_serving(handler) as server, speaking(server) as tts:
            error = await failure_of(say(tts, "first"))
            assert error.failure in (Failure.BAD_ANSWER, Failure.CLOSED)
            assert str(error).isprintable()
            assert await say(tts, "second") == B
            assert server.connections == 2
            await until(lambda: server.open == 1)

    run()


@live
async def test_no_audio_is_an_error_that_spoils_nothing() -> None:
    async def handler(peer: Peer) -> None:
        await peer.receive()
        await peer.speak()
        await peer.receive()
        await peer.speak(B)
        await peer.receive()

    async with ws_serving(handler) as server, speaking(server) as tts:
        assert (await failure_of(say(tts, "first"))).failure is Failure.BAD_ANSWER
        assert await say(tts, "second") == B
        assert server.connections == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=60) | st.text(max_size=60), max_size=6), st.binary(max_size=40))
def test_whatever_is_sent_is_audio_or_the_one_error(messages: list[bytes | str], raw: bytes) -> None:
    @live
    async def run() -> None:
        async def handler(peer: Peer) -> None:
            await peer.receive()
            for message in messages:
                await peer.socket.send(message)
            peer.socket.transport.write(raw)
            await peer.socket.close()

        async with ws_serving(handler) as server, speaking(server) as tts:
            error = await failure_of(say(tts, "first", replace(CALL, timeout_ms=500.0)))
            assert str(error).isprintable()

    run()


@live
async def test_unknown_messages_are_passed_over() -> None:
    async def handler(peer: Peer) -> None:
        await peer.receive()
        await peer.send("viseme", shape=[1, 2], at={"ms": 3})
        await peer.speak(A)
        await peer.receive()

    async with ws_serving(handler) as server, speaking(server) as tts:
        assert await say(tts, "first") == A


@live
async def test_fragmented_messages_are_joined() -> None:
    async def handler(peer: Peer) -> None:
        await peer.receive()

        async def parts() -> AsyncIterator[str]:
            yield '{"type":"au'
            yield ""
            yield 'dio","data":"CgAK'
            yield 'AA==","sample_rate":24000}'

        await peer.socket.send(parts())
        await peer.send("complete")
        await peer.receive()

    async with ws_serving(handler) as server, speaking(server) as tts:
        assert await say(tts, "first") == b"\x0a\x00\x0a\x00"


@live
async def test_silence_is_a_timeout_then_a_stall_and_drops_the_connection() -> None:
    async def handler(peer: Peer) -> None:
        await peer.receive()
        if len(server.peers) == 2:
            await peer.audio(A)
        await peer.socket.wait_closed()

    async with ws_serving(handler) as server, speaking(server) as tts:
        assert (await failure_of(say(tts, "first", SHORT))).failure is Failure.TIMEOUT
        await until(lambda: server.open == 0)
        assert (await failure_of(say(tts, "second", SHORT))).failure is Failure.STALLED
        await until(lambda: server.open == 0)
        assert server.connections == 2


@live
async def test_a_server_that_never_completes_the_handshake_is_a_timeout() -> None:
    async with serving(lambda connection: connection.gone()) as server:
        tts = TtsStream(WsEndpoint("tts", server.url, "/api/v1/stream"), 24_000, "calm")
        assert (await failure_of(say(tts, "first", SHORT))).failure is Failure.TIMEOUT
        await tts.close()
        await until(lambda: server.open == 0)


RAW_HANDSHAKES = [
    b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 101 x\r\n\r\n", b"nonsense\r\n\r\n",
    b"\xff" * 5000, b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: no\r\n\r\n", b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nno",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("raw", RAW_HANDSHAKES)
def test_a_broken_handshake_is_one_typed_error(raw: bytes) -> None:
    @live
    async def run() -> None:
        async def handler(connection: Connection) -> None:
            await connection.request()
            await connection.send(raw)

        async with serving(handler) as server:
            tts = TtsStream(WsEndpoint("tts", server.url, "/api/v1/stream"), 24_000, "calm")
            error = await failure_of(say(tts, "first"))
            assert error.failure in (Failure.UNREACHABLE, Failure.BAD_ANSWER, Failure.STATUS)
            assert str(error).isprintable()
            await tts.close()
            await until(lambda: server.open == 0)

    run()


@live
async def test_a_slow_consumer_holds_the_service_back() -> None:
    sent = 0

    async def handler(peer: Peer) -> None:
        nonlocal sent
        await peer.receive()
        await peer.send("sentence_start", index=0)
        for _ in range(300):
            await peer.audio(bytes(30_000))
            sent += 30_000
        await peer.send("complete")
        await peer.receive()

    async with ws_serving(handler) as server, speaking(server) as tts:
        stream = tts.synthesize("first", CALL)
        size = len(await anext(stream))
        await asyncio.sleep(0.3)
        stopped_at = sent
        await asyncio.sleep(0.1)
        assert sent == stopped_at < 9_000_000
        async for piece in stream:
            size += len(piece)
        assert size == 9_000_000


@live
async def test_too_much_audio_for_one_clause() -> None:
    async def handler(peer: Peer) -> None:
        await peer.receive()
        while True:
            await peer.audio(bytes(500_000))

    async with ws_serving(handler) as server, speaking(server) as tts:
        assert (await failure_of(say(tts, "first"))).failure is Failure.BAD_ANSWER
        await until(lambda: server.open == 0)


@live
async def test_release_ends_what_is_being_spoken() -> None:
    async def handler(peer: Peer) -> None:
        await peer.receive()
        await peer.audio(A)
        await peer.receive()

    async with ws_serving(handler) as server, speaking(server) as tts:
        stream = tts.synthesize("first", CALL)
        await anext(stream)
        queued = asyncio.ensure_future(failure_of(say(tts, "second")))
        await asyncio.sleep(0.01)
        tts.release("test_001")
        assert (await failure_of(collect(stream))).failure is Failure.CLOSED
        assert (await queued).failure is Failure.CLOSED
        await until(lambda: server.open == 0)


@live
async def test_release_while_connecting() -> None:
    async with ws_serving(echo) as server, speaking(server) as tts:
        tts.prepare("test_001")
        tts.release("test_001")
        await asyncio.sleep(0.05)
        assert server.open == 0
        assert await say(tts, "again") == b"again" * 2


@live
async def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tts_stream, "IDLE_SECONDS", 0.2)
    async with ws_serving(echo) as server, speaking(server) as tts:
        await say(tts, "first")
        assert server.open == 1
        await until(lambda: server.open == 0)
        assert await say(tts, "second") == b"second" * 2


@live
async def test_a_service_that_was_restarted_is_used_again() -> None:
    async with ws_serving(echo) as server, speaking(server) as tts:
        assert await say(tts, "aa") == b"aaaa"
        await server.stop()
        error = await failure_of(say(tts, "bb"))
        assert error.failure in (Failure.UNREACHABLE, Failure.CLOSED)
        await server.start(server.port)
        assert await say(tts, "cc") == b"cccc"


async def both_protocols(connection: Connection) -> None:
    """A service without the streaming protocol."""
    while True:
        headers, _ = await connection.request()
        if headers[":method"] == "POST":
            await connection.send(ok(B, "audio/pcm"))
        else:
            await connection.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


@asynccontextmanager
async def choosing(url: str, protocol: Any = "auto") -> AsyncIterator[TtsClient]:
    pool = HttpPool("tts", url)
    pool.open()
    stream = TtsStream(WsEndpoint("tts", url, "/api/v1/stream"), 24_000, "calm")
    tts = TtsClient(protocol, TtsOpenAi(pool, "m", "v"), stream, 24_000)
    try:
        yield tts
    finally:
        await tts.close()
        await pool.close()


@pytest.mark.parametrize("probed", [True, False])
def test_auto_finds_the_streaming_protocol(probed: bool) -> None:
    @live
    async def run() -> None:
        async with ws_serving(echo) as server, choosing(server.url) as tts:
            if probed:
                await tts.probe()
                assert tts.protocol == "stream"
                tts.prepare("test_001")
            assert await say(tts, "aa") == b"aaaa"
            assert tts.protocol == "stream"
            assert tts.sample_rate == 22_050
            assert await say(tts, "bb") == b"bbbb"
            assert server.connections == 2

    run()


@pytest.mark.parametrize("probed", [True, False])
def test_auto_falls_back_to_the_other_protocol(probed: bool) -> None:
    @live
    async def run() -> None:
        async with serving(both_protocols) as server, choosing(server.url) as tts:
            if probed:
                await tts.probe()
                assert tts.protocol == "openai"
            tts.prepare("test_001")
            assert await say(tts, "aa") == B
            assert tts.protocol == "openai"
            assert tts.sample_rate == 24_000

    run()


@live
async def test_auto_goes_on_asking_while_nobody_answers() -> None:
    async with ws_serving(echo) as server:
        port = server.port
    async with choosing(f"http://127.0.0.1:{port}") as tts:
        await tts.probe()
        assert tts.protocol == "auto"
        assert (await failure_of(say(tts, "aa"))).failure is Failure.UNREACHABLE
        await server.start(port)
        server.refuse = 503
        assert (await failure_of(say(tts, "aa"))).failure is Failure.STATUS
        assert str(tts.protocol) == "auto"
        server.refuse = None
        assert await say(tts, "aa") == b"aaaa"
        assert str(tts.protocol) == "stream"
        await server.stop()


@live
async def test_auto_notices_that_the_streaming_protocol_is_gone() -> None:
    async with ws_serving(echo) as server, choosing(server.url) as tts:
        assert await say(tts, "aa") == b"aaaa"
        tts.release("test_001")
        server.refuse = 404
        assert (await failure_of(say(tts, "bb"))).failure is Failure.STATUS
        assert tts.protocol == "openai"


@pytest.mark.parametrize("protocol", ["openai", "stream"])
def test_a_protocol_that_was_set_stays(protocol: str) -> None:
    @live
    async def run() -> None:
        async with serving(both_protocols) as server, choosing(server.url, protocol) as tts:
            tts.prepare("test_001")
            if protocol == "openai":
                assert await say(tts, "aa") == B
            else:
                assert (await failure_of(say(tts, "aa"))).failure is Failure.STATUS
            assert tts.protocol == protocol

    run()


@live
async def test_an_abandoned_choice_stops_what_it_chose() -> None:
    cancelled = asyncio.Event()

    async def handler(peer: Peer) -> None:
        while True:
            message = await peer.receive()
            if message["type"] == "cancel":
                cancelled.set()
            else:
                await peer.audio(A)

    async with ws_serving(handler) as server, choosing(server.url) as tts:
        stream = tts.synthesize("aa", CALL)
        await anext(stream)
        await stream.aclose()
        await asyncio.wait_for(cancelled.wait(), 2)


@live
async def test_the_time_spent_on_choosing_counts() -> None:
    async with serving(lambda connection: connection.gone()) as server, choosing(server.url) as tts:
        loop = asyncio.get_running_loop()
        began = loop.time()
        error = await failure_of(say(tts, "aa", SHORT))
        assert isinstance(error, DownstreamError)
        assert error.failure is Failure.TIMEOUT
        assert loop.time() - began < 1.0
