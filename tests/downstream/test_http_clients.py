"""Intent, RAG, LLM and the speech endpoint over real sockets: the contract, and everything a network can send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.downstream.http_pool import MAX_JSON_BYTES, HttpPool, StatusError
from orchestrator.downstream.intent import IntentClient
from orchestrator.downstream.llm import LlmClient
from orchestrator.downstream.rag import EarlyRetrieval, RagClient
from orchestrator.downstream.tts_openai import TtsOpenAi
from orchestrator.downstream.types import Intent, Pace, Retrieval
from orchestrator.errors import DownstreamError, Failure
from tests.downstream.running import (
    CALL,
    LAST,
    SHORT,
    Connection,
    RawServer,
    chunk,
    collect,
    failure_of,
    http_server,
    ok,
    serving,
    stream_head,
)
from tests.loops import live, until

SERVICES = ("intent", "rag", "early", "rag stream", "llm", "tts")
STREAMS = ("rag stream", "llm", "tts")
GOOD: dict[str, bytes] = {
    "intent": b'{"intent":"greet","confidence":0.9,"context":{"user_goal":"g","key_entities":{"a":"b"}}}',
    "rag": b'{"answer":"yes","sources":["p1",{"text":"p2"},{"content":"p3"},{"x":1},7],"confidence":0.5}',
    "early": b'{"status":"retrieving","docs_retrieved":3}',
    "rag stream": b'{"text":"a ","is_final":false}\n{"text":"b","is_final":true}\n',
    "llm": b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"a "}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"b"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
    "tts": b"\x01\x00" * 100,
}
KINDS = {"rag stream": "application/x-ndjson", "llm": "text/event-stream", "tts": "audio/pcm"}
ANSWERS: dict[str, Any] = {
    "intent": Intent("greet", 0.9, "g", '{"a":"b"}'),
    "rag": Retrieval("yes", ("p1", "p2", "p3"), 0.5),
    "early": EarlyRetrieval("retrieving", 3),
    "rag stream": "a b",
    "llm": "a b",
    "tts": b"\x01\x00" * 100,
}


def asker(service: str, pool: HttpPool) -> Callable[..., Awaitable[Any]]:
    """One whole call to `service`."""

    async def joined(stream: AsyncIterator[Any]) -> Any:
        pieces = await collect(stream)
        return (b"" if service == "tts" else "").join(pieces)

    rag = RagClient(pool)
    return {
        "intent": lambda call=CALL: IntentClient(pool).classify("hi", call),
        "rag": lambda call=CALL: rag.query("hi", call),
        "early": lambda call=CALL: rag.query_incremental("hi", call),
        "rag stream": lambda call=CALL: joined(rag.stream_query("hi", call)),
        "llm": lambda call=CALL: joined(LlmClient(pool, "m", 50).stream([{"role": "user", "content": "hi"}], call)),
        "tts": lambda call=CALL: joined(TtsOpenAi(pool, "m", "v").synthesize("hi", call)),
    }[service]


@asynccontextmanager
async def pooled(server: RawServer, service: str = "intent", **options: Any) -> AsyncIterator[HttpPool]:
    pool = HttpPool(service.partition(" ")[0], server.url, **options)
    pool.open()
    try:
        yield pool
    finally:
        await pool.close()


def answering(*responses: bytes, hold: bool = False) -> Callable[[dict[str, str], bytes, Connection], Awaitable[bool]]:
    """Writes `responses` in order; then keeps the connection (`hold`: silently) or closes it."""

    async def answer(headers: dict[str, str], body: bytes, connection: Connection) -> bool:
        for response in responses:
            await connection.send(response)
            await asyncio.sleep(0.001)
        if hold:
            await connection.gone()
        return not hold

    return answer


def whole(service: str, body: bytes | None = None) -> bytes:
    body = GOOD[service] if body is None else body
    if service in STREAMS:
        return stream_head(KINDS[service]) + (chunk(body) if body else b"") + LAST
    return ok(body)


@pytest.mark.parametrize("service", SERVICES)
def test_the_contract(service: str) -> None:
    @live
    async def run() -> None:
        async with http_server(answering(whole(service))) as server, pooled(server, service) as pool:
            assert await asker(service, pool)() == ANSWERS[service]
            headers, body = server.requests[0]
            assert headers["x-session-id"] == "test_001"
            assert headers["x-turn-number"] == "3"
            assert headers["idempotency-key"] == "test_001:3:stage"
            assert 4900 <= int(headers["x-request-timeout-ms"]) <= 5000
            assert headers["content-type"] == "application/json"
            assert headers[":method"] == "POST"
            target, fields = headers[":target"], json.loads(body)
        assert (target, fields) == {
            "intent": ("/api/v1/classify", {"text": "hi"}),
            "rag": ("/api/v1/query", {"query": "hi"}),
            "early": ("/api/v1/query/incremental", {"session_id": "test_001", "text": "hi", "is_final": False}),
            "rag stream": ("/api/v1/stream_query", {"query": "hi"}),
            "llm": (
                "/chat/completions",
                {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 50},
            ),
            "tts": ("/v1/audio/speech", {"model": "m", "voice": "v", "input": "hi", "response_format": "pcm"}),
        }[service]

    run()


@live
async def test_the_final_text_of_the_early_endpoint_is_streamed() -> None:
    async with http_server(answering(whole("rag stream"))) as server, pooled(server, "rag") as pool:
        assert await collect(RagClient(pool).stream_incremental("hi", CALL)) == ["a b"]
        headers, body = server.requests[0]
        assert headers[":target"] == "/api/v1/query/incremental"
        assert json.loads(body) == {"session_id": "test_001", "text": "hi", "is_final": True}


@live
async def test_the_key_is_sent_as_a_bearer_token() -> None:
    async with http_server(answering(whole("llm"))) as server, pooled(server, "llm", api_key="k") as pool:
        await asker("llm", pool)()
        headers, _ = server.requests[0]
        assert headers["authorization"] == "Bearer k"


@pytest.mark.parametrize("service", SERVICES)
def test_calls_share_one_connection(service: str) -> None:
    @live
    async def run() -> None:
        async with http_server(answering(whole(service))) as server, pooled(server, service) as pool:
            for _ in range(20):
                await asker(service, pool)()
            assert (server.connections, len(server.requests)) == (1, 20)

    run()


@pytest.mark.parametrize("service", STREAMS)
def test_a_body_that_ends_after_its_last_piece_keeps_the_connection(service: str) -> None:
    @live
    async def run() -> None:
        parts = (stream_head(KINDS[service]), chunk(GOOD[service]), LAST)
        async with http_server(answering(*parts)) as server, pooled(server, service) as pool:
            for _ in range(5):
                await asker(service, pool)()
                await asyncio.sleep(0.02)
            assert server.connections == 1

    run()


@live
async def test_a_body_that_never_ends_after_done_is_given_up() -> None:
    parts = (stream_head(KINDS["llm"]), chunk(GOOD["llm"]))
    async with http_server(answering(*parts, hold=True)) as server, pooled(server, "llm") as pool:
        assert await asker("llm", pool)() == "a b"
        assert server.open == 1
        await until(lambda: server.open == 0)


@live
async def test_a_connection_closed_in_the_moment_of_its_next_use_is_replaced() -> None:
    async def handler(connection: Connection) -> None:
        await connection.request()
        await connection.send(ok(GOOD["intent"]))
        await connection.reader.readexactly(1)

    async with serving(handler) as server, pooled(server) as pool:
        for _ in range(3):
            assert await asker("intent", pool)() == ANSWERS["intent"]
        assert server.connections == 3


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 400, 401, 404, 413, 429, 500, 503])
def test_any_other_status_is_one_typed_error(service: str, status: int) -> None:
    @live
    async def run() -> None:
        line = b"HTTP/1.1 %d Nope\r\nLocation: /elsewhere\r\nContent-Type: application/json\r\n" % status
        body = b"" if status == 204 else GOOD[service]
        length = b"" if status == 204 else b"Content-Length: %d\r\n" % len(body)
        async with http_server(answering(line + length + b"\r\n" + body)) as server, pooled(server, service) as pool:
            for _ in range(2):
                error = await failure_of(asker(service, pool)())
                assert isinstance(error, StatusError)
                assert (error.failure, error.status) == (Failure.STATUS, status)
                assert str(error).isprintable()
            assert (server.connections, len(server.requests)) == (1, 2)

    run()


@live
async def test_an_endless_error_body_is_not_read() -> None:
    head = b"HTTP/1.1 500 Nope\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with http_server(answering(head, chunk(b"x" * 100), hold=True)) as server, pooled(server) as pool:
        error = await failure_of(asker("intent", pool)())
        assert error.failure is Failure.STATUS
        await until(lambda: server.open == 0)


WRONG_BODIES: dict[str, list[bytes]] = {
    "intent": [
        b"", b"null", b"[]", b"7", b'"intent"', b"{}", b'{"confidence":1}', b'{"intent":7}', b'{"intent":null}',
        b'{"intent":"a","confidence":"high"}', b'{"intent":"a","confidence":1e999}', b'{"intent":"a","confidence":NaN}',
        b'{"intent":"a","context":[]}', b'{"intent":"a","context":{"user_goal":[]}}', b'{"intent":"a"', b"<html>",
        b'{"intent":"\xff"}', b'{"intent":"\\ud800"}', b'{"intent":"a"} x', b"[" * 100_000, b'{"a":' * 100_000,
        b'{"intent":"a","x":' + b"[" * 50_000 + b"]" * 50_000 + b"", b"\x00" * 10, b"\xef\xbb\xbf{}",
    ],
    "rag": [
        b"", b"{}", b'{"answer":null}', b'{"answer":1}', b'{"answer":"a","sources":{}}',
        b'{"answer":"a","sources":"s"}', b'{"answer":"a","confidence":"x"}', b"[" * 100_000,
        b'{"answer":"a","sources":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    ],
    "early": [b"", b"{}", b'{"status":1}', b'{"status":"a","docs_retrieved":"x"}', b"[]"],
    "rag stream": [
        b"", b"\n\n\n", b"x\n", b"{}\n", b'{"text":1}\n', b'{"text":"a"}\n', b'{"text":"a","is_final":1}\n',
        b'{"text":"a"}', b"[" * 60_000 + b"\n", b'{"text":"\xff","is_final":true}\n', b"x" * 70_000,
        b'{"text":"a"}\n' * 200_000,
    ],
    "llm": [
        b"", b"data: \n\n", b"data: x\n\n", b"data: []\n\n", b"data: 7\n\n", b'data: {"choices":7}\n\n',
        b'data: {"choices":[7]}\n\n', b'data: {"choices":[{"delta":{"content":7}}]}\n\n',
        b'data: {"choices":[{"delta":7}]}\n\n', b'data: {"error":{"message":"overloaded"}}\n\n',
        b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', b": comment\n\n" * 10, b"event: error\n\n",
        b"data: " + b"x" * 70_000, b"data: x\n" * 20_000, b"data: " + b"[" * 60_000 + b"\n\n",
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n', b'{"choices":[]}', b"data: {\n\n",
        b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n' * 200_000,
    ],
    "tts": [b"", b"x"],
}  # fmt: skip


@pytest.mark.parametrize("service", SERVICES)
def test_every_wrong_body_is_one_typed_error(service: str) -> None:
    @live
    async def run() -> None:
        body = b""

        async def answer(headers: dict[str, str], request: bytes, connection: Connection) -> bool:
            await connection.send(whole(service, body))
            return True

        async with http_server(answer) as server, pooled(server, service) as pool:
            for body in WRONG_BODIES[service]:
                error = await failure_of(asker(service, pool)())
                assert error.failure in (Failure.BAD_ANSWER, Failure.CLOSED), (body[:60], error)
                assert str(error).isprintable()

    run()


@pytest.mark.parametrize("service", STREAMS)
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_a_stream_of_a_wrong_type(service: str, kind: str) -> None:
    @live
    async def run() -> None:
        async with http_server(answering(ok(b'{"error":"no"}', kind))) as server, pooled(server, service) as pool:
            error = await failure_of(asker(service, pool)())
            assert error.failure in (Failure.BAD_ANSWER, Failure.CLOSED)

    run()


@pytest.mark.parametrize("declared", [True, False])
def test_an_oversized_body_is_not_swallowed_whole(declared: bool) -> None:
    @live
    async def run() -> None:
        sent = 0

        async def handler(connection: Connection) -> None:
            nonlocal sent
            await connection.request()
            if declared:
                await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            else:
                await connection.send(stream_head("application/json"))
            while True:
                piece = b" " * 65_536
                await connection.send(piece if declared else chunk(piece))
                sent += len(piece)

        async with serving(handler) as server, pooled(server) as pool:
            error = await failure_of(asker("intent", pool)())
            assert error.failure is Failure.BAD_ANSWER
            await until(lambda: server.open == 0)
            assert sent < 16 * MAX_JSON_BYTES

    run()


@pytest.mark.parametrize("service", STREAMS)
def test_a_stream_that_never_ends_is_cut(service: str) -> None:
    @live
    async def run() -> None:
        piece = {
            "rag stream": b'{"text":"more "}\n' * 500,
            "llm": b'data: {"choices":[{"delta":{"content":"more "}}]}\n\n' * 500,
            "tts": b"\x01\x00" * 20_000,
        }[service]

        async def handler(connection: Connection) -> None:
            await connection.request()
            await connection.send(stream_head(KINDS[service]))
            while True:
                await connection.send(chunk(piece))

        async with serving(handler) as server, pooled(server, service) as pool:
            error = await failure_of(asker(service, pool)())
            assert error.failure is Failure.BAD_ANSWER
            await until(lambda: server.open == 0)

    run()


RAW_ANSWERS = {
    "closed at once": b"",
    "closed within the status line": b"HTTP/1.1 20",
    "closed within the headers": b"HTTP/1.1 200 OK\r\nContent-Len",
    "closed within the body": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
    "closed within a chunk": stream_head("application/json") + b"ff\r\n{",
    "closed before the last chunk": stream_head("application/json") + chunk(b"{"),
    "a bad chunk size": stream_head("application/json") + b"zz\r\n{}\r\n",
    "a huge chunk size": stream_head("application/json") + b"f" * 40 + b"\r\n{}\r\n",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "binary": bytes(range(256)),
    "an old version": b"HTTP/0.9 200 OK\r\n\r\n{",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a header of a megabyte": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
    "a thousand headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    "a bad header": b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n{}",
    "a header with a zero byte": b"HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n{}",
    "another encoding": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00",
    "a bad content type": b"HTTP/1.1 200 OK\r\nContent-Type: \xff;;;=\r\nContent-Length: 1\r\n\r\n{",
    "a switch of protocols": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "an endless row of continues": b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
}


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("raw", RAW_ANSWERS.values(), ids=RAW_ANSWERS.keys())
def test_every_broken_answer_is_one_typed_error(service: str, raw: bytes) -> None:
    @live
    async def run() -> None:
        async def handler(connection: Connection) -> None:
            await connection.request()
            await connection.send(raw)

        async with serving(handler) as server, pooled(server, service) as pool:
            error = await failure_of(asker(service, pool)())
            if raw.startswith(b"HTTP/1.1 101"):
                assert error.failure is Failure.STATUS
            else:
                assert error.failure in (Failure.UNREACHABLE, Failure.BAD_ANSWER, Failure.CLOSED)
            assert str(error).isprintable()
            await until(lambda: server.open == 0)

    run()


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("until_then", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_silence_is_a_timeout_and_ends_the_connection(service: str, until_then: bytes) -> None:
    @live
    async def run() -> None:
        async def handler(connection: Connection) -> None:
            await connection.request()
            await connection.send(until_then)
            await connection.gone()

        async with serving(handler) as server, pooled(server, service) as pool:
            error = await failure_of(asker(service, pool)(SHORT))
            # Half a speech sample or half a line is no piece, so nothing has begun.
            assert error.failure is Failure.TIMEOUT
            await until(lambda: server.open == 0)

    run()


@pytest.mark.parametrize("service", STREAMS)
def test_silence_after_the_first_piece_is_a_stall(service: str) -> None:
    @live
    async def run() -> None:
        first = {
            "rag stream": b'{"text":"a "}\n',
            "llm": b'data: {"choices":[{"delta":{"content":"a "}}]}\n\n',
            "tts": b"\x01\x00",
        }[service]
        parts = (stream_head(KINDS[service]), chunk(first))
        async with http_server(answering(*parts, hold=True)) as server, pooled(server, service) as pool:
            error = await failure_of(asker(service, pool)(SHORT))
            assert error.failure is Failure.STALLED
            await until(lambda: server.open == 0)

    run()


@live
async def test_comments_do_not_keep_a_stalled_stream_alive() -> None:
    async def handler(connection: Connection) -> None:
        await connection.request()
        await connection.send(stream_head(KINDS["llm"]))
        while True:
            await connection.send(chunk(b": still here\n\n"))
            await asyncio.sleep(0.01)

    async with serving(handler) as server, pooled(server, "llm") as pool:
        assert (await failure_of(asker("llm", pool)(SHORT))).failure is Failure.TIMEOUT


@pytest.mark.parametrize("service", SERVICES)
def test_nobody_there(service: str) -> None:
    @live
    async def run() -> None:
        async with serving(lambda connection: connection.gone()) as server:
            pass
        async with pooled(server, service) as pool:
            error = await failure_of(asker(service, pool)())
            assert error.failure is Failure.UNREACHABLE
            await pool.warm(2)

    run()


@live
async def test_a_name_that_does_not_resolve() -> None:
    pool = HttpPool("intent", "http://no-such-host.invalid:8002")
    pool.open()
    error = await failure_of(IntentClient(pool).classify("hi", replace(CALL, timeout_ms=20_000)))
    assert error.failure is Failure.UNREACHABLE
    await pool.close()


@pytest.mark.parametrize("service", STREAMS)
@pytest.mark.parametrize("how", ["aclose", "cancel", "drop"])
def test_an_abandoned_stream_is_aborted_on_the_wire(service: str, how: str) -> None:
    @live
    async def run() -> None:
        gone = asyncio.Event()
        first = {
            "rag stream": b'{"text":"a "}\n',
            "llm": b'data: {"choices":[{"delta":{"content":"a "}}]}\n\n',
            "tts": b"\x01\x00",
        }[service]

        async def handler(connection: Connection) -> None:
            await connection.request()
            await connection.send(stream_head(KINDS[service]) + chunk(first))
            await connection.gone()
            gone.set()

        async with serving(handler) as server, pooled(server, service) as pool:
            streams: dict[str, Callable[[], Any]] = {
                "rag stream": lambda: RagClient(pool).stream_query("hi", CALL),
                "llm": lambda: LlmClient(pool, "m", 5).stream([], CALL),
                "tts": lambda: TtsOpenAi(pool, "m", "v").synthesize("hi", CALL),
            }
            stream = streams[service]()
            await anext(stream)
            if how == "aclose":
                await stream.aclose()
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)
            elif how == "cancel":
                task = asyncio.ensure_future(collect(stream))
                await asyncio.sleep(0.005)
                task.cancel()
                await asyncio.wait((task,))
                assert task.cancelled()
            else:
                del stream
            await asyncio.wait_for(gone.wait(), 2)

    run()


@live
async def test_an_aborted_stream_is_replaced_by_a_warm_connection() -> None:
    async def answer(headers: dict[str, str], body: bytes, connection: Connection) -> bool:
        if headers[":method"] == "GET":
            await connection.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return True
        await connection.send(stream_head(KINDS["llm"]) + chunk(GOOD["llm"][:120]))
        await connection.gone()
        return False

    async with http_server(answer) as server, pooled(server, "llm", warm_connections=2) as pool:
        await pool.warm(2)
        assert server.connections == 2
        stream = LlmClient(pool, "m", 5).stream([], CALL)
        await anext(stream)
        assert server.connections == 2
        await stream.aclose()
        await until(lambda: server.open == 2 and server.connections == 3)
        assert [headers[":method"] for headers, _ in server.requests].count("POST") == 1


@live
async def test_warming_opens_what_is_missing_only() -> None:
    async with http_server(answering(ok(b"{}"))) as server, pooled(server, warm_path="/v") as pool:
        await pool.warm(3)
        await pool.warm(3)
        assert server.connections == 3
        assert {headers[":target"] for headers, _ in server.requests} == {"/v"}


@live
async def test_pieces_gather_unread_while_the_consumer_is_in_no_hurry() -> None:
    token = chunk(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n')

    async def handler(connection: Connection) -> None:
        await connection.request()
        await connection.send(stream_head(KINDS["llm"]))
        for _ in range(20):
            await connection.send(token)
            await asyncio.sleep(0.001)
        await connection.send(chunk(b"data: [DONE]\n\n") + LAST)
        await connection.gone()

    async with serving(handler) as server, pooled(server, "llm") as pool:
        pace = Pace()
        stream = LlmClient(pool, "m", 5).stream([], replace(CALL, pace=pace))
        pieces = [await anext(stream)]
        pace.gather_seconds = 0.03
        reading = asyncio.ensure_future(collect(stream))
        await asyncio.sleep(0.01)
        response = stream._response
        assert response is not None
        assert response.connection is not None
        assert response.connection.transport is not None
        assert not response.connection.transport.is_reading()
        pieces += await reading
        assert "".join(pieces) == "a" * 20
        assert len(pieces) < 10
        assert server.open == 1


@pytest.mark.parametrize("after_ms", [0, 5, 25])
def test_a_gathering_stream_is_aborted_like_any_other(after_ms: int) -> None:
    @live
    async def run() -> None:
        parts = (stream_head(KINDS["llm"]), chunk(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'))
        async with http_server(answering(*parts, hold=True)) as server, pooled(server, "llm") as pool:
            stream = LlmClient(pool, "m", 5).stream([], replace(CALL, pace=Pace(0.02)))
            await anext(stream)
            task = asyncio.ensure_future(collect(stream))
            await asyncio.sleep(after_ms / 1000)
            task.cancel()
            await asyncio.wait((task,))
            assert task.cancelled()
            await until(lambda: server.open == 0)

    run()


@live
async def test_speech_comes_in_whole_samples() -> None:
    sound = bytes(range(1, 200))
    parts = [stream_head("audio/pcm"), *(chunk(sound[i : i + 7]) for i in range(0, len(sound), 7)), LAST]
    async with http_server(answering(*parts)) as server, pooled(server, "tts") as pool:
        pieces = await collect(TtsOpenAi(pool, "m", "v").synthesize("hi", CALL))
        assert all(len(piece) % 2 == 0 for piece in pieces)
        assert b"".join(pieces) == sound[: len(sound) & ~1]


@pytest.mark.parametrize("end", ["[DONE]", "finish"])
def test_a_reply_may_end_by_either_mark(end: str) -> None:
    @live
    async def run() -> None:
        body = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
        body += b"data: [DONE]" if end == "[DONE]" else b'data: {"choices":[{"delta":null,"finish_reason":"stop"}]}\n\n'
        async with http_server(answering(whole("llm", body))) as server, pooled(server, "llm") as pool:
            assert await asker("llm", pool)() == "a"

    run()


@live
async def test_closing_the_pool_fails_calls_in_flight() -> None:
    async with serving(lambda connection: connection.gone()) as server:
        pool = HttpPool("intent", server.url)
        pool.open()
        pool.keep_warm()
        task = asyncio.ensure_future(failure_of(asker("intent", pool)()))
        await until(lambda: server.open >= 1)
        await pool.close()
        assert (await task).failure is Failure.UNREACHABLE
        assert (await failure_of(asker("intent", pool)())).failure is Failure.UNREACHABLE


class Garbage:
    """A server whose answer a test sets, on a loop of its own, so that hypothesis can run many examples on it."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self.raw = b""
        self.server = RawServer(self.answer)
        self.pools: dict[str, HttpPool] = {}
        self.run(self.start())

    def run(self, work: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(work)

    async def start(self) -> None:
        await self.server.start()
        for service in SERVICES:
            self.pools[service] = HttpPool(service.partition(" ")[0], self.server.url)
            self.pools[service].open()

    async def answer(self, connection: Connection) -> None:
        await connection.request()
        await connection.send(self.raw)

    async def stop(self) -> None:
        for pool in self.pools.values():
            await pool.close()
        await self.server.stop()


@pytest.fixture(scope="module")
def garbage() -> Iterator[Garbage]:
    server = Garbage()
    yield server
    server.run(server.stop())
    server.loop.close()


TOKENS = st.sampled_from(
    [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 500 \r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n",
     b"5\r\n", b"0\r\n\r\n", b"data: ", b"\n\n", b"{", b"}", b"[", b'"text":', b'"choices":', b'"intent":', b'"a"',
     b"[DONE]", b"Connection: close\r\n", b"Content-Type: text/event-stream\r\n", b"null", b",", b":", b"\x00", b"\xff"]
)  # fmt: skip
ANY_ANSWER = st.one_of(
    st.binary(max_size=200),
    st.lists(TOKENS, max_size=25).map(b"".join),
    st.binary(max_size=200).map(lambda body: ok(body)),
    st.lists(TOKENS, max_size=25).map(lambda parts: ok(b"".join(parts), "text/event-stream")),
    st.lists(st.binary(max_size=30), max_size=8).map(
        lambda parts: stream_head("x/y") + b"".join(chunk(part) for part in parts if part) + LAST
    ),
)


@pytest.mark.parametrize("service", SERVICES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=ANY_ANSWER)
def test_whatever_is_answered_is_an_answer_or_the_one_error(garbage: Garbage, service: str, raw: bytes) -> None:
    garbage.raw = raw

    async def ask() -> None:
        call = replace(CALL, timeout_ms=1000.0)
        try:
            await asyncio.wait_for(asker(service, garbage.pools[service])(call), 5)
        except DownstreamError as error:
            assert error.failure in Failure
            assert str(error).isprintable()

    garbage.run(ask())
