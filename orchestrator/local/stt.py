"""Speech-to-text with endpointing, as a service: Silero VAD and Moonshine tiny-en, English."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Literal

import msgspec
import numpy as np
import orjson
from aiohttp import WSMsgType, web

from orchestrator.local.audio import Samples, from_pcm16, read_wav, resample, split_at_quiet
from orchestrator.local.endpointing import Endpointer, EndpointSettings
from orchestrator.local.models import STT_RATE, SpeechModel, VoiceActivityModel
from orchestrator.local.service import command_line, json_response, new_app, run, session_of, together, websocket
from orchestrator.local.transcription import PARTIAL_PRIORITY, Message, SpeechSession
from orchestrator.local.worker import InferenceWorker

DEFAULT_PORT: Final = 8001

_MAX_RECORDING_S: Final = 120
_MAX_BODY: Final = _MAX_RECORDING_S * 48_000 * 4
_MAX_MESSAGE: Final = 256 * 1024
_MAX_UNSENT: Final = 200
_PIECE: Final = 15 * STT_RATE


class Control(msgspec.Struct):
    """A text frame from the client."""

    type: Literal["start_capture", "stop_capture"]


class SttService:
    """The models and the handlers around them."""

    def __init__(self, endpoint_ms: float, capture_timeout_s: float) -> None:
        self._endpoint = EndpointSettings(endpoint_ms=endpoint_ms)
        self._capture_timeout_s = capture_timeout_s
        self._activity = VoiceActivityModel()
        self._speech = SpeechModel()
        self._worker = InferenceWorker("stt")
        self._activity.stream().push(np.zeros(512, np.float32))
        self._speech.transcribe(np.zeros(STT_RATE, np.float32))

    def app(self) -> web.Application:
        app = new_app("stt-vad-service", max_body_bytes=_MAX_BODY)
        app.router.add_get("/api/v1/transcribe/stream", self.stream)
        app.router.add_post("/api/v1/transcribe", self.transcribe)
        app.on_cleanup.append(self._close)
        return app

    async def transcribe(self, request: web.Request) -> web.Response:
        """A whole recording at once: WAV, or raw PCM16 with its rate in the content type."""
        body = await request.read()
        samples = await asyncio.to_thread(_recording, request.headers.get("Content-Type", ""), body)
        if len(samples) > _MAX_RECORDING_S * STT_RATE:
            raise web.HTTPBadRequest(text=f"a recording may last {_MAX_RECORDING_S} s at most")
        speech = await self._worker.run(partial(self._activity.speech, samples), PARTIAL_PRIORITY)
        texts = [await self.recognise(piece, PARTIAL_PRIORITY) for piece in split_at_quiet(speech, _PIECE)]
        duration_ms = len(samples) * 1000 / STT_RATE
        return json_response({"text": " ".join(filter(None, texts)), "duration_ms": round(duration_ms, 1)})

    async def stream(self, request: web.Request) -> web.WebSocketResponse:
        """One session's microphone."""
        session_id = session_of(request)
        async with websocket(request, _MAX_MESSAGE) as socket:
            await _Connection(self, socket, session_id).serve()
        return socket

    def session(self, send: Callable[[Message], None]) -> SpeechSession:
        return SpeechSession(self._activity.stream(), Endpointer(self._endpoint), self.recognise, send, time.monotonic)

    def recognise(self, samples: Samples, priority: int) -> Awaitable[str]:
        """The text of samples at 16 kHz, transcribed on the one worker thread."""
        return self._worker.run(partial(self._speech.transcribe, samples), priority)

    @property
    def capture_timeout_s(self) -> float:
        return self._capture_timeout_s

    async def _close(self, _app: web.Application) -> None:
        self._worker.close()


class _Connection:
    """What goes on at a socket: reading, transcribing, writing. The first to end ends the others."""

    def __init__(self, service: SttService, socket: web.WebSocketResponse, session_id: str) -> None:
        self._service = service
        self._socket = socket
        self._session_id = session_id
        self._outbox: asyncio.Queue[Message] = asyncio.Queue()
        self._session = service.session(self._send)
        self._timer: asyncio.TimerHandle | None = None

    async def serve(self) -> None:
        self._send({"type": "connected", "sample_rate": STT_RATE})
        try:
            await together(self._read(), self._session.run(), self._write())
        finally:
            self._stop_timer()

    def _send(self, message: Message) -> None:
        if self._outbox.qsize() >= _MAX_UNSENT:
            raise ConnectionError(f"{_MAX_UNSENT} messages wait and the client does not read")
        self._outbox.put_nowait({"session_id": self._session_id, **message})

    async def _write(self) -> None:
        while True:
            message = await self._outbox.get()
            await self._socket.send_str(orjson.dumps(message).decode())

    async def _read(self) -> None:
        async for message in self._socket:
            if message.type is WSMsgType.BINARY:
                self._audio(message.data)
            elif message.type is WSMsgType.TEXT:
                self._control(message.data)

    def _audio(self, data: bytes) -> None:
        try:
            self._session.feed(data, time.time())
        except ValueError as error:
            self._send({"type": "error", "message": str(error)})
        if self._session.speaking:
            self._stop_timer()

    def _control(self, data: str) -> None:
        try:
            control = msgspec.json.decode(data, type=Control)
        except msgspec.DecodeError as error:
            self._send({"type": "error", "message": f"not a control message: {error}"})
            return
        self._stop_timer()
        if control.type == "stop_capture":
            self._session.flush()
            return
        self._session.start()
        self._send({"type": "capture_started"})
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._service.capture_timeout_s, self._nothing_heard)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _nothing_heard(self) -> None:
        self._timer = None
        self._send({"type": "timeout", "message": "no speech was heard"})


def _recording(content_type: str, body: bytes) -> Samples:
    try:
        if body[:4] == b"RIFF":
            samples, rate = read_wav(body)
        else:
            kind, _, parameters = content_type.partition(";")
            if kind.strip() != "application/octet-stream":
                raise ValueError(
                    "send a WAV file, or PCM16 samples with Content-Type: application/octet-stream;rate=16000"
                )
            rate = int(parameters.strip().removeprefix("rate=") or STT_RATE)
            samples = from_pcm16(body)
        return resample(samples, rate, STT_RATE)
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error


def main() -> int:
    parser = command_line("stt", DEFAULT_PORT, "Speech-to-text with endpointing.")
    parser.add_argument(
        "--endpoint-ms",
        type=_endpoint_ms,
        default=os.environ.get("STT_ENDPOINT_MS", "400"),
        help="silence that ends the user's turn, in ms (default: STT_ENDPOINT_MS or 400)",
    )
    parser.add_argument(
        "--capture-timeout-s", type=float, default=30.0, help="`timeout` after start_capture without speech"
    )
    args = parser.parse_args()
    return run("stt", args, lambda: SttService(args.endpoint_ms, args.capture_timeout_s).app())


def _endpoint_ms(raw: str) -> float:
    try:
        value = float(raw)
    except ValueError:
        value = 0.0
    if not 130 <= value <= 5000:
        raise argparse.ArgumentTypeError(f"{raw!r} is not a number from 130 to 5000")
    return value


if __name__ == "__main__":
    sys.exit(main())
