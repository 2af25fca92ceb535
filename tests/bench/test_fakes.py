from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import pytest
import pytest_asyncio

from bench.fakes import Delay, FakeConfig, FakeProcess, FakeServices

pytestmark = pytest.mark.asyncio

NOW = Delay.fixed(0)
QUICK = FakeConfig(intent=NOW, rag=NOW, llm_first=NOW, tts_first=NOW, llm_gap_ms=0.2)
LLM_BODY = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "stream": True}


@dataclass
class Rig:
    fakes: FakeServices
    http: aiohttp.ClientSession

    async def post(self, service: str, path: str, body: Any, **headers: str) -> tuple[int, bytes]:
        async with self.http.post(self.fakes.urls[service] + path, json=body, headers=headers) as answer:
            return answer.status, await answer.read()

    async def tokens(self) -> list[str]:
        url = self.fakes.env["LLM_BASE_URL"] + "/chat/completions"
        async with self.http.post(url, json=LLM_BODY) as answer:
            lines = (await answer.read()).decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        events = [orjson.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
        return [event["choices"][0]["delta"].get("content", "") for event in events]


async def eventually(condition: Any) -> None:
    """Lets the loop run until the condition holds; a connection's end is seen a moment after it."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    async with FakeServices(QUICK) as fakes, aiohttp.ClientSession() as http:
        yield Rig(fakes, http)


async def test_environment_names_every_service(rig: Rig) -> None:
    assert set(rig.fakes.env) >= {"INTENT_SERVICE_URL", "RAG_SERVICE_URL", "LLM_BASE_URL", "TTS_SERVICE_URL"}
    for name, url in rig.fakes.urls.items():
        async with rig.http.get(url + "/health") as answer:
            assert await answer.json() == {"status": "healthy"}, name


async def test_intent_and_rag_answer_and_remember_what_was_asked(rig: Rig) -> None:
    status, body = await rig.post("intent", "/api/v1/classify", {"text": "hi"}, **{"X-Session-Id": "s-1"})
    assert (status, orjson.loads(body)["intent"]) == (200, "admission_requirements")
    status, body = await rig.post("rag", "/api/v1/query", {"query": "hi"})
    assert orjson.loads(body)["answer"].startswith("Admission needs")
    seen = rig.fakes.requests("intent")[0]
    assert seen.json() == {"text": "hi"}
    assert seen.headers["x-session-id"] == "s-1"
    assert seen.finished >= seen.first_sent >= seen.received > 0
    assert rig.fakes.counters["intent"].completed == 1


async def test_llm_streams_every_token(rig: Rig) -> None:
    assert "".join(await rig.tokens()) == " ".join(QUICK.sentences)


async def test_llm_answers_whole_where_no_stream_is_asked_for(rig: Rig) -> None:
    _, body = await rig.post("llm", "/v1/chat/completions", {"model": "m", "messages": []})
    assert orjson.loads(body)["choices"][0]["message"]["content"] == " ".join(QUICK.sentences)


async def test_rag_streams_lines_and_takes_partials_early(rig: Rig) -> None:
    _, body = await rig.post("rag", "/api/v1/stream_query", {"query": "hi"})
    lines = [orjson.loads(line) for line in body.splitlines()]
    assert "".join(line["text"] for line in lines) == " ".join(QUICK.sentences)
    assert [line["is_final"] for line in lines] == [False] * 39 + [True]
    early = {"session_id": "s", "text": "hi", "is_final": False}
    assert b"docs_retrieved" in (await rig.post("rag", "/api/v1/query/incremental", early))[1]
    final = await rig.post("rag", "/api/v1/query/incremental", {**early, "is_final": True})
    assert final[1] == body


async def test_speech_is_as_long_as_its_text(rig: Rig) -> None:
    _, one = await rig.post("tts", "/v1/audio/speech", {"input": "one two three"})
    _, more = await rig.post("tts", "/v1/audio/speech", {"input": "one two three four five six"})
    assert len(one) == 3 * 4800
    assert len(more) == 2 * len(one)
    assert any(one)
    assert (await rig.post("tts", "/v1/audio/speech", {"input": " "}))[0] == 400


async def test_delays_are_never_cut_short() -> None:
    async with FakeServices(FakeConfig(rag=Delay.fixed(30))) as fakes, aiohttp.ClientSession() as http:
        await Rig(fakes, http).post("rag", "/api/v1/query", {"query": "hi"})
        seen = fakes.requests("rag")[0]
    assert seen.first_sent - seen.received >= 0.0299


async def test_scripts_apply_in_order_and_run_out(rig: Rig) -> None:
    rig.fakes.script("intent", status=503, times=1)
    rig.fakes.script("intent", garbage=True, times=1)
    rig.fakes.script("intent", wrong_type=True, times=1)
    rig.fakes.script("intent", oversize_bytes=100_000, times=1)
    answers = [await rig.post("intent", "/api/v1/classify", {"text": "hi"}) for _ in range(5)]
    assert [status for status, _ in answers] == [503, 200, 200, 200, 200]
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(answers[1][1])
    assert isinstance(orjson.loads(answers[2][1]), list)
    assert len(answers[3][1]) > 100_000
    assert orjson.loads(answers[4][1])["intent"] == "admission_requirements"


async def test_hang_ends_when_the_client_goes_and_counts_as_aborted(rig: Rig) -> None:
    rig.fakes.script("rag", hang=True)
    asking = asyncio.create_task(rig.post("rag", "/api/v1/query", {"query": "hi"}))
    await eventually(lambda: rig.fakes.counters["rag"].requests == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: rig.fakes.counters["rag"].aborted == 1)
    assert rig.fakes.counters["rag"].open == 0
    assert rig.fakes.requests("rag")[0].aborted


async def test_stream_stalls_or_drops_after_so_many_pieces(rig: Rig) -> None:
    rig.fakes.script("llm", drop_after=3, times=1)
    url = rig.fakes.env["LLM_BASE_URL"] + "/chat/completions"
    async with rig.http.post(url, json=LLM_BODY) as answer:
        got = b"".join([await answer.content.readuntil(b"\n\n") for _ in range(4)])
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.content.readuntil(b"\n\n")
    assert got.count(b'"content":') == 4
    rig.fakes.script("llm", stall_after=2, times=1)
    async with rig.http.post(url, json=LLM_BODY) as answer:
        got = b""
        while got.count(b'"content":') < 3:
            got += await answer.content.readany()
    await eventually(lambda: rig.fakes.counters["llm"].aborted == 2)
    rig.fakes.script("llm", drop_after=0, times=1)
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await rig.http.post(url, json=LLM_BODY)


async def test_wrong_script_is_refused(rig: Rig) -> None:
    with pytest.raises(ValueError, match="unknown field"):
        rig.fakes.script("llm", statsu=500)
    with pytest.raises(ValueError, match="accepted are"):
        rig.fakes.script("lmm", status=500)
    status, body = await rig.post("llm", "/__script", {"service": "llm", "status": "no"})
    assert status == 400
    assert b"status" in body


async def test_streaming_tts_speaks_and_cancels(rig: Rig) -> None:
    async with rig.http.ws_connect(rig.fakes.urls["tts"] + "/api/v1/stream?session_id=s-1") as ws:
        assert (await ws.receive_json())["session_id"] == "s-1"
        await ws.send_json({"type": "synthesize", "text": "one two", "streaming": True})
        messages = [await ws.receive_json() for _ in range(6)]
        assert [each["type"] for each in messages] == [
            "sentence_start", "audio", "audio", "sentence_playing", "sentence_complete", "complete",
        ]  # fmt: skip
        assert len(base64.b64decode(messages[1]["data"])) == 4800
        rig.fakes.script("tts", hang=True, times=1)
        await ws.send_json({"type": "synthesize", "text": "never"})
        await ws.send_json({"type": "cancel"})
        assert (await ws.receive_json()) == {"type": "complete", "cancelled": True}
    counters = rig.fakes.counters["tts"]
    assert (counters.requests, counters.completed, counters.aborted, counters.cancels) == (2, 1, 1, 1)


async def test_tts_without_its_streaming_protocol_refuses_the_websocket() -> None:
    config = FakeConfig(tts_stream=False)
    async with FakeServices(config) as fakes, aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
            await http.ws_connect(fakes.urls["tts"] + "/api/v1/stream?session_id=s-1")


async def test_stt_hears_its_text_word_by_word_and_says_what_it_is_told(rig: Rig) -> None:
    async with rig.http.ws_connect(rig.fakes.urls["stt"] + "/api/v1/transcribe/stream?session_id=s-1") as ws:
        assert (await ws.receive_json())["type"] == "connected"
        await ws.send_bytes(bytes(5 * 6400))
        heard = [await ws.receive_json() for _ in range(5)]
        assert [each["text"] for each in heard][:2] == ["what", "what are"]
        assert [each["is_final"] for each in heard] == [False] * 4 + [True]
        assert (await ws.receive_json())["type"] == "vad_end"
        assert rig.fakes.stt_say("s-1", {"type": "user_speaking", "confidence": 1.0})
        assert (await ws.receive_json())["type"] == "user_speaking"
    await eventually(lambda: not rig.fakes.stt_say("s-1", {}))
    assert rig.fakes.counters["stt"].audio_bytes == 5 * 6400


async def test_reset_forgets_all_but_open_connections(rig: Rig) -> None:
    await rig.tokens()
    rig.fakes.script("llm", status=500)
    rig.fakes.reset()
    assert rig.fakes.requests("llm") == []
    assert rig.fakes.counters["llm"].requests == 0
    assert rig.fakes.counters["llm"].open == 1
    assert len(await rig.tokens()) > 40


@pytest.mark.server
async def test_process_of_its_own_is_scripted_and_asked_over_http() -> None:
    with FakeProcess(QUICK) as fakes:
        fakes.script("intent", status=500, times=1)
        async with aiohttp.ClientSession() as http:
            url = fakes.urls["intent"] + "/api/v1/classify"
            for expected in (500, 200):
                async with http.post(url, json={"text": "hi"}) as answer:
                    assert answer.status == expected
                    await answer.read()
            stats = fakes.stats()["intent"]
            assert (stats.requests, stats.connections) == (2, 1)
        assert [seen.json() for seen in fakes.requests("intent")] == [{"text": "hi"}] * 2
        with pytest.raises(ValueError, match="unknown field"):
            fakes.script("intent", nonsense=True)
        fakes.reset()
        assert fakes.stats()["intent"].requests == 0
        process = fakes._process
    assert process is not None
    assert process.returncode == 0
