"""The orchestrator as a Pipecat pipeline, one per connection, speaking the same wire to the same services.

What Pipecat brings is used: its FastAPI transport with a serializer for this wire, its OpenAI LLM service, its
TTS base class (sentence aggregation, audio contexts), its interruptions and its paced output. What it has no part
for is one processor: Intent and RAG in parallel before the LLM. Configured as its documentation allows: 100 ms
output chunks, no RTVI, no turn tracking, no metrics, no idle timer, one LLM client and one pooled aiohttp
session for all connections, logging off, uvicorn on uvloop and httptools without compression.
Not here: state in Redis, speculation, STT relay, metrics, limits, admission, reconnects. Pipecat cuts at sentences,
so its first clause is longer; its output runs at twice the speed of playback rather than 400 ms ahead.

Run (in an environment with pipecat-ai, fastapi, uvicorn): PORT=8004 … python bench/peers/pipecat_app.py
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import uvicorn
from fastapi import FastAPI, WebSocket
from loguru import logger
from openai import AsyncOpenAI
from pipecat.frames.frames import (
    AggregatedTextFrame,
    ErrorFrame,
    Frame,
    InputTransportMessageFrame,
    InterruptionFrame,
    LLMContextFrame,
    LLMFullResponseEndFrame,
    OutputAudioRawFrame,
    OutputTransportMessageFrame,
    OutputTransportMessageUrgentFrame,
    TTSAudioRawFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.serializers.base_serializer import FrameSerializer
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.services.settings import TTSSettings
from pipecat.services.tts_service import TTSService
from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams, FastAPIWebsocketTransport
from pipecat.workers.runner import WorkerRunner

INTENT_URL = os.environ.get("INTENT_SERVICE_URL", "") + "/api/v1/classify"
RAG_URL = os.environ.get("RAG_SERVICE_URL", "") + "/api/v1/query"
TTS_URL = os.environ.get("TTS_SERVICE_URL", "") + "/v1/audio/speech"
LLM_BASE_URL = os.environ.get("LLM_BASE_URL", "")
SAMPLE_RATE = 24_000
HISTORY_TURNS = 6


class Wire(FrameSerializer):
    """JSON messages and raw audio, as the clients of the orchestrator expect them."""

    def __init__(self, session_id: str) -> None:
        super().__init__()
        self.session_id = session_id
        self.turn_number = 0
        self.interrupt_received = 0.0

    async def serialize(self, frame: Frame) -> str | bytes | None:
        if isinstance(frame, OutputAudioRawFrame):
            return frame.audio
        if isinstance(frame, OutputTransportMessageFrame | OutputTransportMessageUrgentFrame):
            return self.encode(frame.message)
        if isinstance(frame, InterruptionFrame):
            latency_ms = (time.perf_counter() - self.interrupt_received) * 1000
            return self.encode({"type": "interrupted", "turn_number": self.turn_number, "stop_latency_ms": latency_ms})
        return None

    def encode(self, message: dict[str, Any]) -> str:
        whole = {**message, "session_id": self.session_id, "timestamp": time.time()}
        return orjson.dumps(whole).decode()

    async def deserialize(self, data: str | bytes) -> Frame | None:
        return InputTransportMessageFrame(message=orjson.loads(data))


class Turns(FrameProcessor):
    """Takes the client's messages; at the end of speech asks Intent and RAG, then hands the LLM its context."""

    def __init__(self, wire: Wire, http: aiohttp.ClientSession) -> None:
        super().__init__()
        self.wire = wire
        self.http = http
        self.text = ""
        self.history: list[dict[str, str]] = []
        self.intent: dict[str, Any] = {}
        self.busy = False
        self.thinking: asyncio.Task[None] | None = None

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, InputTransportMessageFrame):
            if direction == FrameDirection.DOWNSTREAM:
                await self.handle(frame.message)
        else:
            await self.push_frame(frame, direction)

    async def handle(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        if kind == "stt_fragment":
            if self.busy:
                await self.interrupt()
            self.text = message["text"]
            if not message.get("is_final"):
                update = {"type": "state_update", "state": "LISTENING", "text_buffer": [self.text]}
                await self.push_frame(OutputTransportMessageUrgentFrame(message=update))
        elif kind == "vad_end" and self.text:
            self.wire.turn_number += 1
            text, self.text, self.busy = self.text, "", True
            self.thinking = self.create_task(self.think(text))
        elif kind == "user_speaking" and self.busy:
            await self.interrupt()

    async def interrupt(self) -> None:
        self.busy = False
        self.wire.interrupt_received = time.perf_counter()
        if self.thinking is not None:
            await self.cancel_task(self.thinking)
            self.thinking = None
        await self.broadcast_interruption()

    async def think(self, text: str) -> None:
        try:
            self.intent, rag = await asyncio.gather(
                self.ask(INTENT_URL, {"text": text}), self.ask(RAG_URL, {"query": text})
            )
        except aiohttp.ClientError as error:
            self.busy = False
            failed = {"type": "error", "code": "turn_failed", "message": str(error)}
            await self.push_frame(OutputTransportMessageUrgentFrame(message=failed))
            return
        system = "Answer from these passages: " + " ".join(source["text"] for source in rag["sources"])
        self.history.append({"role": "user", "content": text})
        del self.history[: -2 * HISTORY_TURNS]
        context = LLMContext([{"role": "system", "content": system}, *self.history])
        await self.push_frame(LLMContextFrame(context))

    async def ask(self, url: str, body: dict[str, str]) -> dict[str, Any]:
        headers = {"X-Session-Id": self.wire.session_id, "X-Turn-Number": str(self.wire.turn_number)}
        async with self.http.post(url, json=body, headers=headers) as answer:
            answer.raise_for_status()
            result: dict[str, Any] = orjson.loads(await answer.read())
            return result


class Announcer(FrameProcessor):
    """Tells the client what is about to be spoken, and when the turn is over."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.turns = turns
        self.texts: list[str] = []
        self.announced = 0

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, InterruptionFrame):
            self.texts, self.announced = [], 0
        elif isinstance(frame, AggregatedTextFrame) and frame.will_be_spoken:
            self.texts.append(frame.text.strip())
        elif isinstance(frame, TTSAudioRawFrame) and self.announced < len(self.texts):
            await self.announce()
        await self.push_frame(frame, direction)
        if isinstance(frame, LLMFullResponseEndFrame) and direction == FrameDirection.DOWNSTREAM:
            await self.complete()

    async def announce(self) -> None:
        number, text = self.turns.wire.turn_number, self.texts[self.announced]
        if self.announced == 0:
            message = {
                "type": "response_ready",
                "turn_number": number,
                "text": text,
                "is_partial": True,
                "intent": self.turns.intent["intent"],
                "confidence": self.turns.intent["confidence"],
                "audio": True,
                "audio_format": {"encoding": "pcm_s16le", "sample_rate": SAMPLE_RATE, "channels": 1},
                "latency_breakdown": {},
            }
        else:
            message = {
                "type": "response_text",
                "turn_number": number,
                "index": self.announced,
                "text": text,
            }
        self.announced += 1
        await self.push_frame(OutputTransportMessageFrame(message=message))

    async def complete(self) -> None:
        text = " ".join(self.texts)
        self.texts, self.announced = [], 0
        self.turns.history.append({"role": "assistant", "content": text})
        message = {
            "type": "turn_complete",
            "turn_number": self.turns.wire.turn_number,
            "state": "IDLE",
            "text": text,
            "cancelled": False,
        }
        self.turns.busy = False
        await self.push_frame(OutputTransportMessageFrame(message=message))


class SharedLlm(OpenAILLMService):
    """Pipecat's OpenAI service on one client for all connections, so that its pool is shared."""

    shared: AsyncOpenAI | None = None

    def create_client(self, **kwargs: Any) -> AsyncOpenAI:
        if SharedLlm.shared is None:
            SharedLlm.shared = super().create_client(**kwargs)
        return SharedLlm.shared


class PooledTts(TTSService):
    """OpenAI's speech endpoint over the shared aiohttp session; aggregation and contexts are Pipecat's."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        super().__init__(
            sample_rate=SAMPLE_RATE,
            push_start_frame=True,
            push_stop_frames=True,
            settings=TTSSettings(model="tts-1", voice="alloy", language=None),
        )
        self._http = http

    async def run_tts(self, text: str, context_id: str) -> AsyncGenerator[Frame | None, None]:
        body = {"model": "tts-1", "voice": "alloy", "input": text, "response_format": "pcm"}
        try:
            async with self._http.post(TTS_URL, json=body) as response:
                response.raise_for_status()
                async for data in response.content.iter_chunked(self.chunk_size):
                    yield TTSAudioRawFrame(data, SAMPLE_RATE, 1, context_id=context_id)
        except aiohttp.ClientError as error:
            yield ErrorFrame(error=f"tts failed: {error}")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0, limit_per_host=0, keepalive_timeout=60)
    async with aiohttp.ClientSession(
        connector=connector, json_serialize=lambda value: orjson.dumps(value).decode()
    ) as http:
        app.state.http = http
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/readyz")
async def readyz() -> dict[str, str]:
    return {"status": "ready"}


@app.websocket("/orchestrate")
async def orchestrate(websocket: WebSocket, session_id: str) -> None:
    await websocket.accept()
    http: aiohttp.ClientSession = websocket.app.state.http
    wire = Wire(session_id)
    transport = FastAPIWebsocketTransport(
        websocket,
        FastAPIWebsocketParams(
            audio_out_enabled=True,
            audio_out_sample_rate=SAMPLE_RATE,
            audio_out_10ms_chunks=10,
            audio_out_auto_silence=False,
            audio_out_end_silence_secs=0,
            serializer=wire,
        ),
    )
    turns = Turns(wire, http)
    llm = SharedLlm(
        api_key=os.environ.get("LLM_API_KEY") or "none",
        base_url=LLM_BASE_URL,
        settings=OpenAILLMService.Settings(model=os.environ.get("LLM_MODEL", "fake")),
    )
    pipeline = Pipeline([transport.input(), turns, llm, PooledTts(http), Announcer(turns), transport.output()])
    worker = PipelineWorker(
        pipeline,
        params=PipelineParams(audio_out_sample_rate=SAMPLE_RATE),
        enable_rtvi=False,
        enable_turn_tracking=False,
        idle_timeout_secs=None,
        check_dangling_tasks=False,
    )

    @worker.event_handler("on_pipeline_started")
    async def started(*_: Any) -> None:
        greeting = {"type": "connected", "state": "IDLE", "turn_number": 0, "resumed": False, "protocol": 1}
        await websocket.send_text(wire.encode(greeting))

    @transport.event_handler("on_client_disconnected")
    async def left(*_: Any) -> None:
        await worker.cancel()

    runner = WorkerRunner(handle_sigint=False, check_dangling_tasks=False)
    await runner.add_workers(worker)
    await runner.run()


def main() -> None:
    logger.remove()
    uvicorn.run(
        app,
        host=os.environ.get("HOST", "127.0.0.1"),
        port=int(os.environ.get("PORT", "8004")),
        loop="uvloop",
        http="httptools",
        ws="websockets-sansio",
        ws_per_message_deflate=False,
        access_log=False,
        log_level="warning",
        backlog=4096,
    )


if __name__ == "__main__":
    main()
