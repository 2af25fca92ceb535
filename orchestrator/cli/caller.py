"""A caller on the client's wire: connects, speaks or types, listens, and keeps the times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException

from orchestrator.cli.recording import MICROPHONE_RATE
from orchestrator.errors import OrchestratorError

CHUNK_MS = 20
_CHUNK_BYTES = MICROPHONE_RATE * CHUNK_MS // 1000 * 2
TRAILING_SILENCE_SECONDS = 3.0
"""Sent after the recording so that the endpointing of the STT service finds the end of speech."""

Show = Callable[[str, dict[str, Any]], None]


class CallError(OrchestratorError):
    """The conversation could not be held: no server, refused, closed, or no answer in time."""


@dataclass(slots=True)
class Exchange:
    """One question and its answer as the caller saw them. Times are seconds on the monotonic clock."""

    transcript: str = ""
    intent: str = ""
    confidence: float = 0.0
    answer: str = ""
    heard: str = ""
    interrupted: bool = False
    breakdown: dict[str, Any] = field(default_factory=dict)
    degraded: list[str] = field(default_factory=list)
    audio: bytearray = field(default_factory=bytearray)
    sample_rate: int = 24_000
    speech_ended: float | None = None
    first_audio: float | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def response_ms(self) -> float | None:
        """From the end of speech, as the caller sent it, to the first audio byte received."""
        if self.speech_ended is None or self.first_audio is None:
            return None
        return (self.first_audio - self.speech_ended) * 1000.0


class Caller:
    """One connection; exchanges one after the other."""

    def __init__(self, connection: ClientConnection, greeting: dict[str, Any], show: Show) -> None:
        self._connection = connection
        self._show = show
        self.greeting = greeting

    async def type_question(self, text: str, barge_in_ms: float | None = None) -> Exchange:
        """Send `text` as a final transcript and wait for the whole answer. Raises CallError."""
        exchange = Exchange(transcript=text)
        await self._send(type="stt_fragment", text=text, is_final=True)
        await self._send(type="vad_end")
        exchange.speech_ended = time.monotonic()
        return await self._listen(exchange, barge_in_ms)

    async def speak(self, pcm: bytes, barge_in_ms: float | None = None, speech_ms: float | None = None) -> Exchange:
        """Send PCM16 16 kHz audio in real time and wait for the whole answer.

        `speech_ms` is where in the recording the speech ends, for the response time; by default where it falls silent.
        Raises CallError.
        """
        exchange = Exchange()
        ends_at = (speech_ms if speech_ms is not None else speech_end_ms(pcm)) / 1000.0
        began = time.monotonic()
        exchange.speech_ended = began + ends_at
        microphone = asyncio.create_task(self._send_audio(pcm, began))
        try:
            return await self._listen(exchange, barge_in_ms)
        finally:
            microphone.cancel()
            await asyncio.gather(microphone, return_exceptions=True)

    async def _send_audio(self, pcm: bytes, began: float) -> None:
        silence = bytes(int(MICROPHONE_RATE * TRAILING_SILENCE_SECONDS) * 2)
        whole = pcm + silence
        for number, at in enumerate(range(0, len(whole), _CHUNK_BYTES)):
            await asyncio.sleep(max(0.0, began + number * CHUNK_MS / 1000.0 - time.monotonic()))
            await self._connection.send(whole[at : at + _CHUNK_BYTES])

    async def _listen(self, exchange: Exchange, barge_in_ms: float | None, limit_seconds: float = 90.0) -> Exchange:
        interruption: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(limit_seconds):
                async for frame in self._connection:
                    if isinstance(frame, bytes):
                        if exchange.first_audio is None:
                            exchange.first_audio = time.monotonic()
                            if barge_in_ms is not None:
                                interruption = asyncio.create_task(self._barge_in(barge_in_ms))
                        exchange.audio += frame
                    elif self._take(exchange, orjson.loads(frame)):
                        return exchange
        except TimeoutError:
            raise CallError(f"no complete answer within {limit_seconds:g} s") from None
        except ConnectionClosed as error:
            raise CallError(_explain_close(error)) from None
        finally:
            if interruption is not None:
                interruption.cancel()
                await asyncio.gather(interruption, return_exceptions=True)
        raise CallError("the server closed the connection before the answer was complete")

    async def _barge_in(self, after_ms: float) -> None:
        await asyncio.sleep(after_ms / 1000.0)
        await self._send(type="user_speaking", confidence=1.0)

    def _take(self, exchange: Exchange, message: dict[str, Any]) -> bool:
        """Note what a message says; True when the exchange is over."""
        kind = message["type"]
        self._show(kind, message)
        if kind == "state_update":
            exchange.transcript = " ".join(message["text_buffer"])
        elif kind == "response_ready":
            exchange.intent, exchange.confidence = message["intent"], message["confidence"]
            exchange.breakdown = message["latency_breakdown"]
            exchange.sample_rate = message["audio_format"]["sample_rate"]
            exchange.answer = message["text"]
        elif kind == "response_text":
            exchange.answer += " " + message["text"]
        elif kind == "error":
            exchange.errors.append(f"{message['code']}: {message['message']}")
        elif kind == "notice" and message["code"] == "nothing_heard":
            raise CallError("the server heard no speech in what was sent")
        elif kind == "turn_complete":
            exchange.answer, exchange.heard = message["text"], message["text"]
            exchange.degraded = message["degraded"]
            return True
        elif kind == "interrupted" and (exchange.answer or exchange.first_audio is not None):
            exchange.interrupted, exchange.heard = True, message["heard_text"]
            return True
        return False

    async def _send(self, **message: Any) -> None:
        await self._connection.send(orjson.dumps(message).decode())


def speech_end_ms(pcm: bytes) -> float:
    """Where the last loud 20 ms of a PCM16 16 kHz recording end."""
    chunks = [memoryview(pcm[at : at + _CHUNK_BYTES // 2 * 2]).cast("h") for at in range(0, len(pcm), _CHUNK_BYTES)]
    loudness = [max((abs(sample) for sample in chunk), default=0) for chunk in chunks]
    threshold = max(loudness, default=0) * 0.05
    last = max((place for place, level in enumerate(loudness) if level > threshold), default=0)
    return (last + 1) * float(CHUNK_MS)


@asynccontextmanager
async def call(url: str, session_id: str, token: str, show: Show) -> AsyncIterator[Caller]:
    """A connection to the orchestrator at `url` (ws:// or http://). Raises CallError."""
    target = url.rstrip("/").replace("http", "ws", 1) if url.startswith("http") else url.rstrip("/")
    target += f"/orchestrate?session_id={quote(session_id, safe='')}&events=state"
    if token:
        target += f"&token={quote(token, safe='')}"
    try:
        connection = await connect(target, max_size=None, compression=None, open_timeout=10, proxy=None)
    except InvalidURI:
        raise CallError(
            f"--url {url!r} is not accepted: a ws:// or http:// address of a running orchestrator"
        ) from None
    except InvalidStatus as error:
        reason = error.response.body.decode("utf-8", "replace").strip() if error.response.body else ""
        raise CallError(f"{url} refused the connection: HTTP {error.response.status_code} {reason}") from None
    except (OSError, TimeoutError, WebSocketException) as error:
        raise CallError(f"no orchestrator answers at {url}: {error or type(error).__name__}") from None
    try:
        async with asyncio.timeout(10):
            greeting = orjson.loads(await connection.recv())
        yield Caller(connection, greeting, show)
    except ConnectionClosed as error:
        raise CallError(_explain_close(error)) from None
    except TimeoutError:
        raise CallError(f"{url} did not greet within 10 s") from None
    finally:
        await connection.close()


def _explain_close(error: ConnectionClosed) -> str:
    received = error.rcvd
    if received is None:
        return "the connection broke off"
    return f"the server closed the connection: {received.code} {received.reason}".rstrip()
