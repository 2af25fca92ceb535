"""TTS over both of its protocols, and STT."""

from __future__ import annotations

import base64
import math
import struct
import time
from abc import ABC, abstractmethod
from typing import Any
from urllib.parse import parse_qs

import msgspec

from bench.fake_config import FakeConfig, Script
from bench.fake_http import (
    LAST_CHUNK,
    Exchange,
    FakeService,
    HttpConnection,
    Request,
    chunk,
    response,
    scripted_body,
    stream_head,
)
from bench.fake_services import not_found
from bench.fake_ws import BINARY, CLOSE, PING, PONG, TEXT, ClientFrames, accept_response, frame
from bench.timers import Handle

_ENDLESS_FRAMES = 100_000
_encode = msgspec.json.encode


def tone(sample_rate: int, ms: float, hz: float = 440.0) -> bytes:
    """PCM16 mono, a sine at a tenth of full scale; never silent, so that tests can tell it from padding."""
    samples = round(sample_rate * ms / 1000)
    step = 2 * math.pi * hz / sample_rate
    values = (int(3276 * math.sin(i * step)) or 1 for i in range(samples))
    return struct.pack(f"<{samples}h", *values)


def frame_count(config: FakeConfig, text: str) -> int:
    """Audio frames for a text: `tts_ms_per_word` a word, at least one frame."""
    words = max(1, len(text.split()))
    return max(1, round(words * config.tts_ms_per_word / config.tts_frame_ms))


class Tts(FakeService):
    """`POST /v1/audio/speech`, and the WebSocket `/api/v1/stream` where the configuration has it."""

    name = "tts"
    _audio: bytes = b""
    _base64: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._whole: dict[int, tuple[bytes]] = {}

    def answer(self, exchange: Exchange, request: Request, script: Script | None) -> None:
        config = self.config
        if request.path != "/v1/audio/speech":
            not_found(exchange)
            return
        text = _text_of(request.body, "input")
        if text is None:
            self.counters.bad_requests += 1
            exchange.send_pieces(0.0, (response(400, b'{"error":"input is missing"}'),), 0.0)
            return
        count = frame_count(config, text)
        if script is None and config.tts_spacing_ms == 0:
            whole = self._whole.get(count) or self._whole.setdefault(
                count, (b"".join(speech_pieces(self.audio, count)),)
            )
            exchange.send_pieces(config.tts_first.draw_s(self.rng), whole, 0.0)
            return
        pcm = self.audio
        if script is not None and script.oversize_bytes:
            pcm, count = pcm * (script.oversize_bytes // len(pcm) + 1), 1
        if script is not None and script.endless:
            count = _ENDLESS_FRAMES
        pieces = speech_pieces(pcm, count)
        gap = config.tts_spacing_ms / 1000
        if script is not None and (script.stall_after is not None or script.drop_after is not None):
            gap = max(gap, 0.001)
        exchange.send_pieces(self.draw_s(config.tts_first, script), pieces, gap)

    @property
    def audio(self) -> bytes:
        """One frame of audio."""
        if not self._audio:
            self._audio = tone(self.config.sample_rate, self.config.tts_frame_ms)
        return self._audio

    @property
    def audio_base64(self) -> str:
        if not self._base64:
            self._base64 = base64.b64encode(self.audio).decode()
        return self._base64

    def upgrade(self, conn: HttpConnection, request: Request) -> bool:
        if not self.config.tts_stream or request.path != "/api/v1/stream":
            return False
        TtsStream(self, conn, request)
        return True


def speech_pieces(pcm: bytes, count: int) -> list[bytes]:
    """A chunked response of `count` frames, a piece to write for each."""
    pieces = [chunk(pcm)] * count
    pieces[0] = stream_head(b"audio/pcm") + pieces[0]
    pieces[-1] += LAST_CHUNK
    return pieces


class WsPeer(ABC):
    """A WebSocket connection of a fake service."""

    def __init__(self, service: FakeService, conn: HttpConnection, request: Request) -> None:
        self.service = service
        self.conn = conn
        self.session_id = parse_qs(request.query).get("session_id", [""])[0]
        self._frames = ClientFrames()
        conn.upgraded = self._feed
        conn.on_lost = self.lost
        service.counters.websockets += 1
        conn.write(accept_response(request.header(b"sec-websocket-key")))
        self.send({"type": "connected", "session_id": self.session_id})

    def send(self, message: dict[str, Any]) -> None:
        self.conn.write(frame(TEXT, _encode(message)))

    def _feed(self, data: bytes) -> None:
        for opcode, payload in self._frames.feed(data):
            if opcode == TEXT:
                self.service.counters.messages += 1
                self.message(msgspec.json.decode(payload))
            elif opcode == BINARY:
                self.service.counters.audio_bytes += len(payload)
                self.audio(len(payload))
            elif opcode == PING:
                self.conn.write(frame(PONG, payload))
            elif opcode == CLOSE:
                self.conn.write(frame(CLOSE, payload))
                self.conn.close()

    @abstractmethod
    def message(self, message: dict[str, Any]) -> None:
        """One JSON message of the client's."""

    def audio(self, size: int) -> None:
        return None

    def lost(self) -> None:
        return None


class TtsStream(WsPeer):
    """One TTS stream: a `synthesize` at a time, `cancel` stops it."""

    service: Tts

    def __init__(self, service: Tts, conn: HttpConnection, request: Request) -> None:
        self._handle: Handle | None = None
        self._exchange: Exchange | None = None
        self._frames_left: list[bytes] = []
        super().__init__(service, conn, request)

    def message(self, message: dict[str, Any]) -> None:
        if message.get("type") == "synthesize":
            self._synthesize(str(message.get("text", "")), message)
        elif message.get("type") == "cancel":
            self.service.counters.cancels += 1
            self._stop(aborted=True)
            if self.service.config.tts_acknowledges_cancel:
                self.send({"type": "complete", "cancelled": True})
        else:
            self.send({"type": "error", "message": "unknown message"})

    def _synthesize(self, text: str, message: dict[str, Any]) -> None:
        service = self.service
        if self._exchange is not None:
            self.send({"type": "error", "message": "busy"})
            return
        service.counters.requests += 1
        exchange = Exchange(self.conn, service.clock())
        exchange.tag = f"{self.session_id}/"
        self._exchange = exchange
        script = service.script_for("/api/v1/stream")
        if script is not None and script.hang:
            return
        body = None if script is None else scripted_body(script)
        frames = self._error(body) if body is not None else self._answer(text, script)
        self._frames_left = frames[::-1]
        after = service.draw_s(service.config.tts_first, script)
        self._handle = service.timers.at(exchange.received + after, self._step, script, 0)

    def _error(self, body: bytes) -> list[bytes]:
        return [frame(TEXT, b'{"type":"error","message":"scripted failure"}' if body[:1] == b"{" else body)]

    def _answer(self, text: str, script: Script | None) -> list[bytes]:
        config = self.service.config
        count = frame_count(config, text)
        data = self.service.audio_base64
        if script is not None and script.oversize_bytes:
            data, count = "A" * script.oversize_bytes, 1
        duration = count * config.tts_frame_ms
        start = frame(TEXT, _encode({"type": "sentence_start", "index": 0, "text": text}))
        audio = {"type": "audio", "data": data, "index": 0, "sample_rate": config.sample_rate}
        frames = [frame(TEXT, _encode(audio))] * count
        if script is not None and script.endless:
            frames = frames[:1] * _ENDLESS_FRAMES
        frames[0] = start + frames[0]
        frames[-1] += (
            frame(TEXT, _encode({"type": "sentence_playing", "index": 0, "duration_ms": duration}))
            + frame(TEXT, _encode({"type": "sentence_complete", "index": 0, "duration_ms": duration}))
            + frame(TEXT, b'{"type":"complete"}')
        )
        if config.tts_spacing_ms == 0 and not _cuts(script):
            frames = [b"".join(frames)]
        return frames

    def _step(self, script: Script | None, sent: int) -> None:
        exchange = self._exchange
        assert exchange is not None
        self._handle = None
        if script is not None and script.drop_after == sent:
            self.conn.close()
            return
        if script is not None and script.stall_after == sent:
            return
        if sent == 0:
            exchange.first_sent = self.service.clock()
        self.conn.write(self._frames_left.pop())
        if self._frames_left:
            gap = max(self.service.config.tts_spacing_ms, 1.0) / 1000
            self._handle = self.service.timers.at(self.service.clock() + gap, self._step, script, sent + 1)
        else:
            self._exchange = None
            self.service.finished(exchange)

    def _stop(self, *, aborted: bool) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._frames_left = []
        exchange, self._exchange = self._exchange, None
        if exchange is not None and aborted:
            self.service.abandoned(exchange)

    def lost(self) -> None:
        self._stop(aborted=True)


def _cuts(script: Script | None) -> bool:
    return script is not None and (script.stall_after is not None or script.drop_after is not None or script.endless)


class Stt(FakeService):
    """The WebSocket `/api/v1/transcribe/stream`."""

    name = "stt"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.streams: dict[str, SttStream] = {}

    def answer(self, exchange: Exchange, request: Request, script: Script | None) -> None:
        not_found(exchange)

    def upgrade(self, conn: HttpConnection, request: Request) -> bool:
        if request.path != "/api/v1/transcribe/stream":
            return False
        script = self.script_for(request.path)
        if script is not None and script.hang:
            return True
        if script is not None and script.status != 200:
            conn.write(response(script.status, b'{"error":"scripted failure"}'))
            conn.close()
            return True
        stream = SttStream(self, conn, request)
        self.streams[stream.session_id] = stream
        return True

    def say(self, session_id: str, message: dict[str, Any]) -> bool:
        """Sends `message` on the live stream of `session_id`; False where there is none."""
        stream = self.streams.get(session_id)
        if stream is None:
            return False
        stream.send(message)
        return True


class SttStream(WsPeer):
    """Hears `stt_text` once, a word every `stt_word_ms` of audio: growing partials, final, `vad_end`.

    `start_capture` makes it hear the text again.
    """

    service: Stt

    def __init__(self, service: Stt, conn: HttpConnection, request: Request) -> None:
        self._words = service.config.stt_text.split()
        self._heard = 0
        self._bytes = 0
        super().__init__(service, conn, request)

    def message(self, message: dict[str, Any]) -> None:
        if message.get("type") == "start_capture":
            self._heard = self._bytes = 0
            self.send({"type": "capture_started"})
        elif message.get("type") != "stop_capture":
            self.send({"type": "error", "message": "unknown message"})

    def audio(self, size: int) -> None:
        self._bytes += size
        # 16 kHz PCM16: 32 bytes a millisecond.
        due = min(len(self._words), int(self._bytes / (self.service.config.stt_word_ms * 32)))
        while self._heard < due:
            self._heard += 1
            final = self._heard == len(self._words)
            text = " ".join(self._words[: self._heard])
            self.send({"type": "fragment", "text": text, "is_final": final, "timestamp": time.time()})
            if final and self.service.config.stt_ends_turn:
                self.send({"type": "vad_end", "confidence": 0.95})

    def lost(self) -> None:
        if self.service.streams.get(self.session_id) is self:
            del self.service.streams[self.session_id]


def _text_of(body: bytes, key: str) -> str | None:
    try:
        decoded = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return None
    value = decoded.get(key) if isinstance(decoded, dict) else None
    return value if isinstance(value, str) and value.strip() else None
