"""The real services, each over the protocol that the orchestrator speaks with it."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

np = pytest.importorskip("numpy")

from orchestrator.local.audio import from_pcm16, read_wav, to_pcm16  # noqa: E402
from orchestrator.local.stack import LocalStack  # noqa: E402

pytestmark = [pytest.mark.local_stack, pytest.mark.asyncio]

QUESTION = "What are admission requirements?"
FACT = "high school diploma"
WAIT_S = 20.0


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_S)) as session:
        yield session


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


async def post(http: aiohttp.ClientSession, url: str, body: object) -> Any:
    async with http.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def receive(socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(await socket.receive_str(timeout=WAIT_S))
    return message


async def until(socket: aiohttp.ClientWebSocketResponse, kind: str) -> list[dict[str, Any]]:
    """What comes up to and with the first message of that type."""
    messages = [await receive(socket)]
    while messages[-1]["type"] != kind:
        messages.append(await receive(socket))
    return messages


def stt_socket(http: aiohttp.ClientSession, stack: LocalStack, session_id: str) -> Any:
    return http.ws_connect(f"{stack.urls['STT_SERVICE_URL']}/api/v1/transcribe/stream?session_id={session_id}")


async def speak(socket: aiohttp.ClientWebSocketResponse, pcm: bytes, pace: float = 1.0) -> None:
    """Send audio at 16 kHz as a microphone does: 20 ms at a time."""
    for start in range(0, len(pcm), 640):
        await socket.send_bytes(pcm[start : start + 640])
        await asyncio.sleep(0.02 * pace)


def pcm_of(wav: bytes) -> bytes:
    return to_pcm16(read_wav(wav)[0])


async def test_a_spoken_question_gives_partials_the_text_and_the_end(
    local_stack: LocalStack, http: aiohttp.ClientSession, question_wav: bytes
) -> None:
    async with stt_socket(http, local_stack, "speaker") as socket:
        assert (await receive(socket))["type"] == "connected"
        await socket.send_json({"type": "start_capture"})
        assert (await receive(socket))["type"] == "capture_started"
        speaking = asyncio.ensure_future(speak(socket, pcm_of(question_wav)))
        messages = await until(socket, "vad_end")
        await speaking
    assert messages[0]["type"] == "user_speaking"
    assert messages[0]["confidence"] > 0.7
    fragments = messages[1:-1]
    assert [fragment["type"] for fragment in fragments] == ["fragment"] * len(fragments)
    assert [fragment["is_final"] for fragment in fragments] == [False] * (len(fragments) - 1) + [True]
    assert len(fragments) >= 3, "partials come while the user speaks"
    assert len(fragments[0]["text"]) < len(fragments[-1]["text"])
    assert fragments[-1]["text"] == "What are the admission requirements?"
    assert fragments[-2]["text"] == fragments[-1]["text"], "the text is known before the endpoint"
    times = [message["timestamp"] for message in messages]
    assert times == sorted(times)
    assert messages[-1]["confidence"] > 0.7


async def test_stop_capture_gives_the_final_text_at_once(
    local_stack: LocalStack, http: aiohttp.ClientSession, question_wav: bytes
) -> None:
    speech = pcm_of(question_wav)[: int(2.0 * 32_000)]
    async with stt_socket(http, local_stack, "push-to-talk") as socket:
        await until(socket, "connected")
        await speak(socket, speech, pace=0.1)
        await socket.send_json({"type": "stop_capture"})
        messages = await until(socket, "vad_end")
    assert messages[-2]["is_final"]
    assert words(messages[-2]["text"]) == words("What are the admission requirements?")


async def test_one_session_that_floods_or_talks_nonsense_harms_no_other(
    local_stack: LocalStack, http: aiohttp.ClientSession, question_wav: bytes
) -> None:
    pcm = pcm_of(question_wav)
    async with (
        stt_socket(http, local_stack, "flood") as flood,
        stt_socket(http, local_stack, "nonsense") as nonsense,
        stt_socket(http, local_stack, "calm") as calm,
    ):
        await flood.send_bytes(pcm * 2)
        await nonsense.send_str("{")
        await nonsense.send_json({"type": "sing"})
        await nonsense.send_bytes(b"\0")
        speaking = asyncio.ensure_future(speak(calm, pcm))
        messages = await until(calm, "vad_end")
        await speaking
        assert messages[-2]["text"] == "What are the admission requirements?"
        assert len((await until(flood, "vad_end"))[-2]["text"]) > 0
        assert [(await receive(nonsense))["type"] for _ in range(4)] == ["connected", "error", "error", "error"]
        assert not nonsense.closed


async def test_a_connection_without_a_session_is_refused(local_stack: LocalStack, http: aiohttp.ClientSession) -> None:
    for url in ("STT_SERVICE_URL", "TTS_SERVICE_URL"):
        path = "/api/v1/transcribe/stream" if url.startswith("STT") else "/api/v1/stream"
        async with http.get(local_stack.urls[url] + path) as response:
            assert response.status == 400
            assert "session_id" in (await response.json())["error"]


@pytest.mark.parametrize(
    ("body", "content_type", "error"),
    [
        (b"abc", "application/octet-stream;rate=16000", "2 bytes a sample"),
        (b"ab", "application/octet-stream;rate=5", "sample rate 5 Hz"),
        (b"ab", "text/plain", "send a WAV file"),
        (b"RIFFxxxx", "audio/wav", "not a readable WAV file"),
    ],
)
async def test_a_recording_that_is_none_is_refused(
    local_stack: LocalStack, http: aiohttp.ClientSession, body: bytes, content_type: str, error: str
) -> None:
    url = f"{local_stack.urls['STT_SERVICE_URL']}/api/v1/transcribe"
    async with http.post(url, data=body, headers={"Content-Type": content_type}) as response:
        assert response.status == 400
        assert error in (await response.json())["error"]


async def test_silence_has_no_words(local_stack: LocalStack, http: aiohttp.ClientSession) -> None:
    url = f"{local_stack.urls['STT_SERVICE_URL']}/api/v1/transcribe"
    headers = {"Content-Type": "application/octet-stream;rate=16000"}
    async with http.post(url, data=bytes(64_000), headers=headers) as response:
        assert (await response.json())["text"] == ""


PHRASED = [
    (QUESTION, "admission_requirements"),
    ("I'd like to know what I need to get into the bachelor's program.", "admission_requirements"),
    ("What's the last day I can apply for fall?", "application_deadline"),
    ("What papers should I hand in?", "application_process"),
    ("How much would a year cost me?", "tuition_fees"),
    ("Can I get some funding for my studies?", "scholarships"),
    ("Is an IELTS of 6 enough?", "language_requirements"),
    ("What subjects do you teach?", "programs"),
    ("Do you have dorms?", "housing"),
    ("I'm from India, do I need a visa to come?", "visa"),
    ("Can I talk to someone in the office?", "contact"),
    ("hello there", "greeting"),
    ("okay, thanks for your help", "thanks"),
    ("alright, bye", "goodbye"),
    ("Who won the football match yesterday?", "unknown"),
    ("How do I bake a chocolate cake?", "unknown"),
]


@pytest.mark.parametrize(("text", "intent"), PHRASED)
async def test_intent(local_stack: LocalStack, http: aiohttp.ClientSession, text: str, intent: str) -> None:
    url = f"{local_stack.urls['INTENT_SERVICE_URL']}/api/v1/classify"
    answer = await post(http, url, {"text": text, "context": {"turn": 1}})
    assert answer["intent"] == intent
    assert 0.45 <= answer["confidence"] <= 1.0
    assert set(answer["context"]) == {"user_goal", "key_entities", "extracted_meaning"}
    assert answer["layer_type"] == "embedding"
    assert answer["reasoning"].startswith("nearest example")


async def test_intent_names_what_the_utterance_names(local_stack: LocalStack, http: aiohttp.ClientSession) -> None:
    url = f"{local_stack.urls['INTENT_SERVICE_URL']}/api/v1/classify"
    context = (await post(http, url, {"text": "What grades do I need for the master's in data science?"}))["context"]
    assert context["key_entities"] == "degree: master, subject: data science"
    assert context["user_goal"] == "find out what is required to be admitted"


@pytest.mark.parametrize("body", [{}, {"text": ""}, {"text": 5}, [], {"text": "x" * 5000}])
async def test_a_wrong_request_is_one_line(local_stack: LocalStack, http: aiohttp.ClientSession, body: object) -> None:
    async with http.post(f"{local_stack.urls['INTENT_SERVICE_URL']}/api/v1/classify", json=body) as response:
        assert response.status == 400
        assert (await response.json())["error"].startswith(("Object missing", "Expected"))


async def test_rag_answers_the_question_with_the_fact(local_stack: LocalStack, http: aiohttp.ClientSession) -> None:
    url = f"{local_stack.urls['RAG_SERVICE_URL']}/api/v1/query"
    await post(http, url, {"query": QUESTION})
    answer = await post(http, url, {"query": QUESTION, "context": {}})
    assert FACT in answer["answer"]
    assert "grade average of at least 3.0" in answer["answer"]
    assert FACT in answer["sources"][0]["text"]
    assert answer["sources"][0]["title"] == "Admission requirements"
    assert answer["cached"] is True
    assert answer["confidence"] > 0.6
    assert answer["timing_breakdown"]["total_ms"] >= 0
    assert answer["metadata"]["docs_retrieved"] == len(answer["sources"]) == 4


@pytest.mark.parametrize(
    ("query", "fact"),
    [
        ("When is the application deadline for the fall semester?", "July 15"),
        ("How much does a master's cost?", "6,000 dollars"),
        ("What IELTS score do I need?", "6.5"),
        ("How much is a dorm room?", "350 dollars"),
        ("Can I pay in installments?", "three installments"),
    ],
)
async def test_rag_knows(local_stack: LocalStack, http: aiohttp.ClientSession, query: str, fact: str) -> None:
    answer = await post(http, f"{local_stack.urls['RAG_SERVICE_URL']}/api/v1/query", {"query": query})
    assert fact in answer["answer"]


async def test_rag_says_so_when_it_knows_nothing(local_stack: LocalStack, http: aiohttp.ClientSession) -> None:
    answer = await post(
        http, f"{local_stack.urls['RAG_SERVICE_URL']}/api/v1/query", {"query": "How do I bake a chocolate cake?"}
    )
    assert answer["sources"] == []
    assert answer["confidence"] == 0.0
    assert "could not find" in answer["answer"]


async def ndjson(http: aiohttp.ClientSession, url: str, body: object) -> list[dict[str, Any]]:
    async with http.post(url, json=body) as response:
        assert response.status == 200
        assert response.content_type == "application/x-ndjson"
        return [json.loads(line) async for line in response.content]


async def test_rag_streams_its_answer(local_stack: LocalStack, http: aiohttp.ClientSession) -> None:
    lines = await ndjson(http, f"{local_stack.urls['RAG_SERVICE_URL']}/api/v1/stream_query", {"query": QUESTION})
    assert len(lines) > 2
    assert [line["is_final"] for line in lines] == [False] * (len(lines) - 1) + [True]
    whole = await post(http, f"{local_stack.urls['RAG_SERVICE_URL']}/api/v1/query", {"query": QUESTION})
    assert "".join(line["text"] for line in lines) == whole["answer"]


async def test_rag_retrieves_early(local_stack: LocalStack, http: aiohttp.ClientSession) -> None:
    url = f"{local_stack.urls['RAG_SERVICE_URL']}/api/v1/query/incremental"
    early = await post(http, url, {"session_id": "a", "text": "how much is a dorm room", "is_final": False})
    assert early["status"] == "retrieved"
    assert early["docs_retrieved"] == 4
    lines = await ndjson(http, url, {"session_id": "a", "text": "How much is a dorm room?", "is_final": True})
    assert lines[-1]["retrieved_early"] is True
    assert "350 dollars" in "".join(line["text"] for line in lines)
    again = await ndjson(http, url, {"session_id": "a", "text": "How much is a dorm room?", "is_final": True})
    assert again[-1]["retrieved_early"] is False


async def messages_for(http: aiohttp.ClientSession, stack: LocalStack, question: str) -> list[dict[str, str]]:
    found = await post(http, f"{stack.urls['RAG_SERVICE_URL']}/api/v1/query", {"query": question})
    passages = "\n".join(f"[{number}] {source['text']}" for number, source in enumerate(found["sources"], 1))
    return [
        {"role": "system", "content": f"You are a voice assistant.\n\nPassages:\n{passages}"},
        {"role": "user", "content": question},
    ]


async def chat(http: aiohttp.ClientSession, stack: LocalStack, messages: list[dict[str, str]]) -> str:
    body = {"model": stack.urls["LLM_MODEL"], "messages": messages}
    answer = await post(http, f"{stack.urls['LLM_BASE_URL']}/chat/completions", body)
    return str(answer["choices"][0]["message"]["content"])


async def test_the_model_streams_an_answer_with_the_fact(local_stack: LocalStack, http: aiohttp.ClientSession) -> None:
    body = {
        "model": local_stack.urls["LLM_MODEL"],
        "messages": await messages_for(http, local_stack, QUESTION),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with http.post(f"{local_stack.urls['LLM_BASE_URL']}/chat/completions", json=body) as response:
        assert response.content_type == "text/event-stream"
        events = [line.decode().strip() async for line in response.content if line.strip()]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event[6:]) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
    assert sum(bool(delta) for delta in deltas) > 10
    assert FACT in "".join(deltas)
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] > 10


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("Hello", "What would you like to know?"),
        ("Thanks a lot", "You're welcome"),
        ("Bye bye", "Goodbye"),
        ("How do I bake a chocolate cake?", "I only know about admissions"),
    ],
)
async def test_the_model_is_honest_without_passages(
    local_stack: LocalStack, http: aiohttp.ClientSession, question: str, part: str
) -> None:
    assert part in await chat(http, local_stack, [{"role": "user", "content": question}])


async def test_the_model_keeps_to_passages_it_has_never_seen(
    local_stack: LocalStack, http: aiohttp.ClientSession
) -> None:
    passages = "Passages:\n[1] The library closes at ten. Books may be kept for 30 days.\n[2] Coffee costs 2 dollars."
    messages = [{"role": "system", "content": passages}, {"role": "user", "content": "How long may I keep a book?"}]
    assert await chat(http, local_stack, messages) == "Books may be kept for 30 days."


async def test_the_model_lists_itself_and_refuses_in_openai_form(
    local_stack: LocalStack, http: aiohttp.ClientSession
) -> None:
    base = local_stack.urls["LLM_BASE_URL"]
    async with http.get(f"{base}/models") as response:
        assert (await response.json())["data"][0]["id"] == local_stack.urls["LLM_MODEL"]
    async with http.post(f"{base}/chat/completions", json={"messages": []}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def transcribed(http: aiohttp.ClientSession, stack: LocalStack, body: bytes, content_type: str) -> str:
    url = f"{stack.urls['STT_SERVICE_URL']}/api/v1/transcribe"
    async with http.post(url, data=body, headers={"Content-Type": content_type}) as response:
        assert response.status == 200
        return str((await response.json())["text"])


async def test_the_spoken_answer_contains_the_fact(local_stack: LocalStack, http: aiohttp.ClientSession) -> None:
    answer = await chat(http, local_stack, await messages_for(http, local_stack, QUESTION))
    body = {"model": "piper", "voice": "joe", "input": answer, "response_format": "pcm"}
    async with http.post(f"{local_stack.urls['TTS_SERVICE_URL']}/v1/audio/speech", json=body) as response:
        assert response.status == 200
        rate = response.headers["X-Sample-Rate"]
        pcm = await response.read()
    assert rate == local_stack.urls["TTS_SAMPLE_RATE"]
    heard = await transcribed(http, local_stack, pcm, f"application/octet-stream;rate={rate}")
    assert FACT in " ".join(words(heard))


async def test_a_wav_is_spoken_and_heard(local_stack: LocalStack, http: aiohttp.ClientSession) -> None:
    body = {"input": "The library closes at ten.", "response_format": "wav", "speed": 1.1}
    async with http.post(f"{local_stack.urls['TTS_SERVICE_URL']}/v1/audio/speech", json=body) as response:
        wav = await response.read()
    assert read_wav(wav)[1] == 22_050
    assert "library" in words(await transcribed(http, local_stack, wav, "audio/wav"))


@pytest.mark.parametrize("body", [{"input": ""}, {"input": "x", "response_format": "mp3"}, {"input": "x", "speed": 9}])
async def test_speech_that_cannot_be_is_refused(
    local_stack: LocalStack, http: aiohttp.ClientSession, body: dict[str, object]
) -> None:
    async with http.post(f"{local_stack.urls['TTS_SERVICE_URL']}/v1/audio/speech", json=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"]


def tts_socket(http: aiohttp.ClientSession, stack: LocalStack) -> Any:
    return http.ws_connect(f"{stack.urls['TTS_SERVICE_URL']}/api/v1/stream?session_id=listener")


async def test_the_streaming_protocol_speaks_sentence_by_sentence(
    local_stack: LocalStack, http: aiohttp.ClientSession
) -> None:
    async with tts_socket(http, local_stack) as socket:
        assert (await receive(socket))["type"] == "connected"
        command = {
            "type": "synthesize",
            "text": "Hello there. The library is open.",
            "emotion": "calm",
            "streaming": True,
        }
        await socket.send_json(command)
        messages = await until(socket, "complete")
    kinds = [message["type"] for message in messages if message["type"] != "audio"]
    sentence = ["sentence_start", "sentence_playing", "sentence_complete"]
    assert kinds == [*sentence, *sentence, "complete"]
    pcm = b""
    for index in (0, 1):
        chunks = [
            base64.b64decode(message["data"])
            for message in messages
            if message["type"] == "audio" and message["index"] == index
        ]
        assert max(len(chunk) for chunk in chunks) <= 22_050 // 10 * 2
        spoken_ms = sum(len(chunk) for chunk in chunks) / 44.1
        complete = next(m for m in messages if m["type"] == "sentence_complete" and m["index"] == index)
        assert complete["duration_ms"] == pytest.approx(spoken_ms, abs=0.1)
        pcm += b"".join(chunks)
    assert float(np.abs(from_pcm16(pcm)).max()) > 0.3
    heard = await transcribed(http, local_stack, pcm, "application/octet-stream;rate=22050")
    assert "library" in words(heard)


async def test_cancel_stops_the_synthesis_and_the_next_text_is_spoken(
    local_stack: LocalStack, http: aiohttp.ClientSession
) -> None:
    long_text = " ".join(f"This is sentence number {number} of a very long story." for number in range(60))
    async with tts_socket(http, local_stack) as socket:
        await until(socket, "connected")
        await socket.send_json({"type": "synthesize", "text": long_text, "request_id": 1})
        await socket.send_json({"type": "synthesize", "text": "Never said.", "request_id": 2})
        await until(socket, "audio")
        await socket.send_json({"type": "cancel"})
        first = await until(socket, "complete")
        second = await receive(socket)
        assert [(item["request_id"], item["cancelled"]) for item in (first[-1], second)] == [(1, True), (2, True)]
        said = {item["index"] for item in first if item["type"] == "audio"}
        assert len(said) < 20, "most of the story was never synthesised"
        await socket.send_json({"type": "cancel"})
        await socket.send_json({"type": "synthesize", "text": "Yes.", "request_id": 3})
        third = await until(socket, "complete")
    assert {item["request_id"] for item in third} == {3}
    assert third[-1]["cancelled"] is False


async def test_a_wrong_command_is_an_error_and_the_connection_goes_on(
    local_stack: LocalStack, http: aiohttp.ClientSession
) -> None:
    async with tts_socket(http, local_stack) as socket:
        await until(socket, "connected")
        for wrong in ("{", '{"type":"sing"}', '{"type":"synthesize"}'):
            await socket.send_str(wrong)
            assert (await receive(socket))["type"] == "error"
        await socket.send_json({"type": "synthesize", "text": "..."})
        assert (await receive(socket))["type"] == "complete"
