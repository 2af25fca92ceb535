"""The orchestrator written by hand with FastAPI: one coroutine per connection, one task per turn.

Configured as well as the libraries' documentation allows: uvicorn on uvloop and httptools with compression
and access log off, orjson both ways, one pooled aiohttp session for all downstream calls. Intent and RAG in
parallel, LLM stream cut into clauses, the next clause synthesised while this one plays, audio paced 400 ms
ahead, barge-in. Not here: state in Redis, speculation, STT relay, metrics, limits, admission, reconnects.

Run: PORT=8004 INTENT_SERVICE_URL=… python -m bench.peers.fastapi_app
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

INTENT_URL = os.environ.get("INTENT_SERVICE_URL", "") + "/api/v1/classify"
RAG_URL = os.environ.get("RAG_SERVICE_URL", "") + "/api/v1/query"
LLM_URL = os.environ.get("LLM_BASE_URL", "") + "/chat/completions"
TTS_URL = os.environ.get("TTS_SERVICE_URL", "") + "/v1/audio/speech"
LLM_MODEL = os.environ.get("LLM_MODEL", "fake")
SAMPLE_RATE = 24_000
FRAME_BYTES = SAMPLE_RATE // 10 * 2
LEAD_S = 0.4
HISTORY_TURNS = 6
CLAUSE_END = re.compile(r"[,.;:!?]$")
SENTENCE_END = re.compile(r"[.!?]$")


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


class Conversation:
    """One connection: what was said, and the turn that runs."""

    def __init__(self, websocket: WebSocket, session_id: str) -> None:
        self.websocket = websocket
        self.session_id = session_id
        self.http: aiohttp.ClientSession = websocket.app.state.http
        self.text = ""
        self.turn_number = 0
        self.turn: asyncio.Task[None] | None = None
        self.speaking = False
        self.history: list[dict[str, str]] = []

    async def send(self, kind: str, **fields: Any) -> None:
        message = {"type": kind, "session_id": self.session_id, "timestamp": time.time(), **fields}
        await self.websocket.send_text(orjson.dumps(message).decode())

    async def handle(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        if kind == "stt_fragment":
            if self.speaking:
                await self.interrupt()
            self.text = message["text"]
            if not message.get("is_final"):
                await self.send("state_update", state="LISTENING", text_buffer=[self.text])
        elif kind == "vad_end" and self.text:
            self.turn_number += 1
            text, self.text = self.text, ""
            self.turn = asyncio.create_task(self.run_turn(text))
        elif kind == "user_speaking" and self.speaking:
            await self.interrupt()

    async def interrupt(self) -> None:
        started = time.perf_counter()
        await self.stop()
        await self.send(
            "interrupted",
            turn_number=self.turn_number,
            message="barge-in",
            stop_latency_ms=(time.perf_counter() - started) * 1000,
        )

    async def stop(self) -> None:
        turn, self.turn, self.speaking = self.turn, None, False
        if turn is not None:
            turn.cancel()
            await asyncio.gather(turn, return_exceptions=True)

    async def run_turn(self, text: str) -> None:
        started = time.perf_counter()
        number = self.turn_number
        try:
            intent, rag = await asyncio.gather(self.classify(text), self.retrieve(text))
            clauses: asyncio.Queue[str | None] = asyncio.Queue(2)
            audio: asyncio.Queue[tuple[str, bytes | None]] = asyncio.Queue(64)
            async with asyncio.TaskGroup() as group:
                thinker = group.create_task(self.think(text, rag, clauses))
                group.create_task(self.synthesize(clauses, audio))
                await self.play(number, intent, audio, started)
            answer = thinker.result()
            self.history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            del self.history[: -2 * HISTORY_TURNS]
            self.speaking = False
            await self.send("turn_complete", turn_number=number, state="IDLE", text=answer, cancelled=False)
        except* (aiohttp.ClientError, TimeoutError, KeyError) as errors:
            self.speaking = False
            await self.send("error", code="turn_failed", message=str(errors.exceptions[0]), turn_number=number)

    def headers(self) -> dict[str, str]:
        return {"X-Session-Id": self.session_id, "X-Turn-Number": str(self.turn_number)}

    async def classify(self, text: str) -> dict[str, Any]:
        async with self.http.post(INTENT_URL, json={"text": text}, headers=self.headers()) as answer:
            answer.raise_for_status()
            result: dict[str, Any] = orjson.loads(await answer.read())
            return result

    async def retrieve(self, text: str) -> dict[str, Any]:
        async with self.http.post(RAG_URL, json={"query": text}, headers=self.headers()) as answer:
            answer.raise_for_status()
            result: dict[str, Any] = orjson.loads(await answer.read())
            return result

    async def think(self, text: str, rag: dict[str, Any], clauses: asyncio.Queue[str | None]) -> str:
        """Streams the answer and cuts it: the first clause early, sentences afterwards."""
        system = "Answer from these passages: " + " ".join(source["text"] for source in rag["sources"])
        messages = [{"role": "system", "content": system}, *self.history, {"role": "user", "content": text}]
        body = {"model": LLM_MODEL, "messages": messages, "stream": True}
        answer, pending, first = "", "", True
        async with self.http.post(LLM_URL, json=body, headers=self.headers()) as response:
            response.raise_for_status()
            async for token in tokens(response):
                answer += token
                pending += token
                words = len(pending.split())
                early = first and (words >= 8 or (words >= 3 and CLAUSE_END.search(pending)))
                if early or SENTENCE_END.search(pending):
                    await clauses.put(pending.strip())
                    pending, first = "", False
        if pending.strip():
            await clauses.put(pending.strip())
        await clauses.put(None)
        return answer

    async def synthesize(
        self, clauses: asyncio.Queue[str | None], audio: asyncio.Queue[tuple[str, bytes | None]]
    ) -> None:
        while (clause := await clauses.get()) is not None:
            body = {"model": "tts-1", "voice": "alloy", "input": clause, "response_format": "pcm"}
            async with self.http.post(TTS_URL, json=body, headers=self.headers()) as response:
                response.raise_for_status()
                async for data in response.content.iter_chunked(FRAME_BYTES):
                    await audio.put((clause, data))
        await audio.put(("", None))

    async def play(
        self,
        number: int,
        intent: dict[str, Any],
        audio: asyncio.Queue[tuple[str, bytes | None]],
        started: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        begun, played, spoken, index = 0.0, 0.0, "", 0
        while (item := await audio.get())[1] is not None:
            clause, data = item
            assert data is not None
            if not begun:
                begun = loop.time()
                self.speaking = True
                await self.announce(number, clause, intent, started)
            elif clause != spoken:
                index += 1
                await self.send("response_text", turn_number=number, index=index, text=clause)
            spoken = clause
            ahead = begun + played - loop.time()
            if ahead > LEAD_S:
                await asyncio.sleep(ahead - LEAD_S)
            await self.websocket.send_bytes(data)
            played += len(data) / (2 * SAMPLE_RATE)
        remaining = begun + played - loop.time()
        if remaining > 0:
            await asyncio.sleep(remaining)

    async def announce(self, number: int, clause: str, intent: dict[str, Any], started: float) -> None:
        thinking_ms = (time.perf_counter() - started) * 1000
        await self.send(
            "response_ready",
            turn_number=number,
            text=clause,
            is_partial=True,
            intent=intent["intent"],
            confidence=intent["confidence"],
            thinking_ms=thinking_ms,
            audio=True,
            audio_format={"encoding": "pcm_s16le", "sample_rate": SAMPLE_RATE, "channels": 1},
            latency_breakdown={
                "total_ms": thinking_ms,
                "budget_ms": 445.0,
                "within_budget": thinking_ms <= 445,
            },
        )


async def tokens(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """The text deltas of an OpenAI event stream."""
    async for line in response.content:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        delta = orjson.loads(line[6:])["choices"][0]["delta"].get("content")
        if delta:
            yield delta


@app.websocket("/orchestrate")
async def orchestrate(websocket: WebSocket, session_id: str) -> None:
    await websocket.accept()
    conversation = Conversation(websocket, session_id)
    await conversation.send("connected", state="IDLE", turn_number=0, resumed=False, protocol=1, budget_ms=445)
    try:
        while True:
            await conversation.handle(orjson.loads(await websocket.receive_text()))
    except WebSocketDisconnect:
        await conversation.stop()


def main() -> None:
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
