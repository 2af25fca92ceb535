"""Text-to-speech with Piper, English, as a service: OpenAI's speech endpoint and a streaming WebSocket."""

from __future__ import annotations

import asyncio
import base64
import logging
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Annotated, Any, Final, Literal

import msgspec
import orjson
from aiohttp import WSMsgType, web

from orchestrator.local.audio import wav_bytes
from orchestrator.local.openai_api import error_body
from orchestrator.local.pieces import Piece, pieces
from orchestrator.local.service import command_line, json_response, new_app, run, session_of, together, websocket
from orchestrator.local.voice import VOICE, Voice
from orchestrator.local.worker import InferenceWorker

logger = logging.getLogger(__name__)

DEFAULT_PORT: Final = 8005

_CHUNK_MS: Final = 100
_MAX_WAITING: Final = 32
_MAX_MESSAGE: Final = 64 * 1024

_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_Speed = Annotated[float, msgspec.Meta(ge=0.25, le=4.0)]


class SpeechRequest(msgspec.Struct):
    """OpenAI's speech request. `model` and `voice` are accepted and not used: there is one voice."""

    input: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    model: str = ""
    voice: str = ""
    response_format: Literal["pcm", "wav"] = "pcm"
    speed: _Speed = 1.0


class Synthesize(msgspec.Struct, tag="synthesize"):
    """Speak a text. `emotion` and `streaming` are accepted and not used: one mood, always streaming."""

    text: _Text
    emotion: str | None = None
    streaming: bool = True
    request_id: str | int | None = None


class Cancel(msgspec.Struct, tag="cancel"):
    """Stop speaking, and drop what waits."""


_decode_command = msgspec.json.Decoder(Synthesize | Cancel).decode


class TtsService:
    def __init__(self) -> None:
        self._voice = Voice()
        self._worker = InferenceWorker("tts")
        self._chunk_bytes = self._voice.sample_rate * _CHUNK_MS // 1000 * 2

    @property
    def sample_rate(self) -> int:
        return self._voice.sample_rate

    def app(self) -> web.Application:
        app = new_app("tts-service")
        app.router.add_post("/v1/audio/speech", self.speech)
        app.router.add_get("/api/v1/stream", self.stream)
        app.on_cleanup.append(self._close)
        return app

    async def speech(self, request: web.Request) -> web.StreamResponse:
        """The whole text as one response, streamed as it is synthesised (`pcm`) or complete (`wav`)."""
        try:
            asked = msgspec.json.decode(await request.read(), type=SpeechRequest)
        except msgspec.DecodeError as error:
            return json_response(error_body(str(error)), status=400)
        headers = {"X-Sample-Rate": str(self.sample_rate), "X-Voice": VOICE}
        if asked.response_format == "wav":
            audio = b"".join([pcm async for _, pcm in self.synthesise(asked.input, asked.speed)])
            body = wav_bytes(audio, self.sample_rate)
            return web.Response(body=body, content_type="audio/wav", headers=headers)
        response = web.StreamResponse(headers={**headers, "Content-Type": "audio/pcm"})
        async for _, pcm in self.synthesise(asked.input, asked.speed):
            if not response.prepared:
                await response.prepare(request)
            for chunk in self.chunks(pcm):
                await response.write(chunk)
        if not response.prepared:
            await response.prepare(request)
        await response.write_eof()
        return response

    async def stream(self, request: web.Request) -> web.WebSocketResponse:
        """One session's streaming connection."""
        session_id = session_of(request)
        async with websocket(request, _MAX_MESSAGE) as socket:
            await _Connection(self, socket, session_id).serve()
        return socket

    async def synthesise(self, text: str, speed: float = 1.0) -> AsyncIterator[tuple[Piece, bytes]]:
        """The pieces of the text with their PCM16, each as soon as it is there.

        A first piece is synthesised before other texts' later ones: somebody waits for it in silence.
        """
        for place, piece in enumerate(pieces(text)):
            yield piece, await self._worker.run(partial(self._voice.speak, piece, speed), min(place, 1))

    def chunks(self, pcm: bytes) -> Iterator[bytes]:
        """The audio in chunks of at most 100 ms."""
        for start in range(0, len(pcm), self._chunk_bytes):
            yield pcm[start : start + self._chunk_bytes]

    def duration_ms(self, pcm_bytes: int) -> float:
        return round(pcm_bytes / 2 / self.sample_rate * 1000, 1)

    async def _close(self, _app: web.Application) -> None:
        self._worker.close()


class _Connection:
    """Reads commands, speaks the texts in order, answers each `synthesize` with one `complete` or `error`."""

    def __init__(self, service: TtsService, socket: web.WebSocketResponse, session_id: str) -> None:
        self._service = service
        self._socket = socket
        self._session_id = session_id
        self._waiting: deque[Synthesize] = deque()
        self._dropped: deque[Synthesize] = deque()
        self._answered = False
        self._wake = asyncio.Event()
        self._current: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        await self._send({"type": "connected", "sample_rate": self._service.sample_rate})
        await together(self._read(), self._speak_all())

    async def _read(self) -> None:
        async for message in self._socket:
            if message.type is not WSMsgType.TEXT:
                await self._send({"type": "error", "message": "commands are JSON text frames"})
                continue
            try:
                command = _decode_command(message.data)
            except msgspec.DecodeError as error:
                await self._send({"type": "error", "message": f"not a command: {error}"})
                continue
            if isinstance(command, Cancel):
                self._cancel()
            elif len(self._waiting) >= _MAX_WAITING:
                await self._answer(command, "error", message=f"{_MAX_WAITING} texts wait already")
            else:
                self._waiting.append(command)
                self._wake.set()

    def _cancel(self) -> None:
        self._dropped.extend(self._waiting)
        self._waiting.clear()
        if self._current is not None:
            self._current.cancel()
        self._wake.set()

    async def _speak_all(self) -> None:
        while True:
            while self._dropped:
                await self._answer(self._dropped.popleft(), "complete", cancelled=True)
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            command = self._waiting.popleft()
            self._answered = False
            self._current = asyncio.ensure_future(self._speak(command))
            try:
                await asyncio.wait([self._current])
            finally:
                current, self._current = self._current, None
                current.cancel()
                await asyncio.gather(current, return_exceptions=True)
            if not current.cancelled():
                current.result()
            elif not self._answered:
                await self._answer(command, "complete", cancelled=True)

    async def _speak(self, command: Synthesize) -> None:
        total, in_sentence, sentences = 0, 0, 0
        try:
            async for piece, pcm in self._service.synthesise(command.text):
                if piece.starts_sentence:
                    in_sentence, sentences = 0, sentences + 1
                    await self._answer(command, "sentence_start", index=piece.sentence, text=piece.text)
                await self._audio(command, piece, pcm)
                in_sentence += len(pcm)
                total += len(pcm)
                if piece.ends_sentence:
                    spoken_ms = self._service.duration_ms(in_sentence)
                    await self._answer(command, "sentence_complete", index=piece.sentence, duration_ms=spoken_ms)
        except (RuntimeError, ValueError) as error:
            logger.exception("synthesis failed")
            self._answered = True
            await self._answer(command, "error", message=f"synthesis failed: {error}")
            return
        duration = self._service.duration_ms(total)
        # A cancel that comes while `complete` is written finds it said already.
        self._answered = True
        await self._answer(command, "complete", cancelled=False, sentences=sentences, duration_ms=duration)

    async def _audio(self, command: Synthesize, piece: Piece, pcm: bytes) -> None:
        for place, chunk in enumerate(self._service.chunks(pcm)):
            data = base64.b64encode(chunk).decode("ascii")
            await self._answer(command, "audio", data=data, index=piece.sentence, sample_rate=self._service.sample_rate)
            if place == 0 and piece.starts_sentence:
                await self._answer(command, "sentence_playing", index=piece.sentence)
            # A cancel that has arrived is read between two chunks, not after the last.
            await asyncio.sleep(0)

    async def _answer(self, command: Synthesize, kind: str, **fields: Any) -> None:
        if command.request_id is not None:
            fields["request_id"] = command.request_id
        await self._send({"type": kind, **fields})

    async def _send(self, message: dict[str, Any]) -> None:
        await self._socket.send_str(orjson.dumps({"session_id": self._session_id, **message}).decode())


def main() -> int:
    args = command_line("tts", DEFAULT_PORT, "Text-to-speech with the Piper voice.").parse_args()
    return run("tts", args, lambda: TtsService().app())


if __name__ == "__main__":
    sys.exit(main())
