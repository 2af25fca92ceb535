"""A WebSocket client that costs far less than the server it loads: a raw protocol, audio only counted.

One `Session` is one connection. A turn is played by `Session.play`: partial transcripts at a talker's pace,
the final fragment and `vad_end` at the intended time, optionally a barge-in. Latency is measured from the
*intended* time of `vad_end`, so a client or server that falls behind does not hide it.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, cast

import orjson

from bench.fake_ws import CLOSE, PING, PONG, TEXT, masked_frame
from bench.timers import Handle, Timers

WORDS_PER_SECOND = 6.0
LAST_PARTIAL_S = 0.150

QUESTIONS = (
    "what are the admission requirements",
    "when do i have to send the forms",
    "which language certificate do i need",
    "how can i reach the office today",
    "what grades do i need for admission",
    "is there a deadline for international students",
    "who answers questions about the application",
    "where do i send my school leaving certificate",
)


@dataclass(slots=True)
class Turn:
    """What the client saw of one turn. Times are CLOCK_MONOTONIC seconds, 0.0 where it did not happen."""

    intended: float
    session_id: str = ""
    number: int = 0
    sent: float = 0.0
    ready: float = 0.0
    first_audio: float = 0.0
    completed: float = 0.0
    first_clause: str = ""
    audio_bytes: int = 0
    barge_sent: float = 0.0
    interrupted: float = 0.0
    stop_latency_ms: float = 0.0
    late_bytes: int = 0
    tail_bytes: int = 0
    error: str = ""
    breakdown: dict[str, float] = field(default_factory=dict)

    @property
    def total_ms(self) -> float:
        """Intended end of speech to the first audio byte, in milliseconds."""
        return (self.first_audio - self.intended) * 1000


def _message(**fields: object) -> bytes:
    return masked_frame(TEXT, orjson.dumps(fields))


_VAD_END = _message(type="vad_end", confidence=0.95)
_BARGE_IN = _message(type="user_speaking", confidence=1.0)


@dataclass(frozen=True, slots=True)
class Utterance:
    """The frames of one spoken question: growing partials with their offsets (s, ≤ 0) from `vad_end`."""

    partials: tuple[tuple[float, bytes], ...]
    end: bytes

    @classmethod
    def of(cls, text: str, *, partials: bool) -> Utterance:
        words = text.split()
        end = _message(type="stt_fragment", text=text, is_final=True) + _VAD_END
        if not partials:
            return cls((), end)
        grown = [" ".join(words[: i + 1]) for i in range(len(words))]
        offsets = [-LAST_PARTIAL_S - (len(words) - 1 - i) / WORDS_PER_SECOND for i in range(len(words))]
        frames = [_message(type="stt_fragment", text=part, is_final=False) for part in grown]
        return cls(tuple(zip(offsets, frames, strict=True)), end)

    @property
    def lead_s(self) -> float:
        """How long before `vad_end` the first partial is due."""
        return -self.partials[0][0] if self.partials else 0.0


UTTERANCES = {
    partials: tuple(Utterance.of(text, partials=partials) for text in QUESTIONS) for partials in (False, True)
}


class Session(asyncio.Protocol):
    """One conversation's connection. `on_idle` follows each turn, `on_gone` the end of the connection."""

    def __init__(
        self,
        session_id: str,
        timers: Timers,
        on_idle: Callable[[Session], None],
        on_gone: Callable[[Session, str], None],
    ) -> None:
        self.session_id = session_id
        self.timers = timers
        self.on_idle = on_idle
        self.on_gone = on_gone
        self.connected: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.turn: Turn | None = None
        self.barge_after_s: float | None = None
        self.messages = 0
        self.closing = False
        self._transport: asyncio.Transport | None = None
        self._upgraded = False
        self._stash = b""
        self._skip = 0
        self._after_barge = False
        self._handles: list[Handle] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        key = base64.b64encode(os.urandom(16))
        self._transport.write(
            b"GET /orchestrate?session_id=" + self.session_id.encode() + b" HTTP/1.1\r\n"
            b"Host: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n"
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._gone(f"connection lost{f': {exc}' if exc else ''}")

    def _gone(self, why: str) -> None:
        for handle in self._handles:
            handle.cancel()
        self._handles.clear()
        if not self.connected.done():
            self.connected.set_exception(ConnectionError(why))
        turn, self.turn = self.turn, None
        if turn is not None and not self.closing:
            turn.error = why
        self.on_gone(self, why)

    def close(self) -> None:
        """Leaves without ceremony; the server sees an abrupt end."""
        self.closing = True
        if self._transport is not None:
            self._transport.abort()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def play(self, turn: Turn, utterance: Utterance, barge_after_s: float | None = None) -> None:
        """Starts a turn: partials now and on, `vad_end` at `turn.intended` (or once the words are spoken).

        With `barge_after_s`, `user_speaking` is sent that long after the first audio byte.
        """
        turn.session_id = self.session_id
        self.turn = turn
        self.barge_after_s = barge_after_s
        end = max(turn.intended, monotonic() + utterance.lead_s)
        at = self.timers.at
        self._handles = [at(end + offset, self.write, data) for offset, data in utterance.partials]
        self._handles.append(at(end, self._end_of_speech, turn, utterance.end))

    def _end_of_speech(self, turn: Turn, data: bytes) -> None:
        turn.sent = monotonic()
        self._after_barge = False
        self._handles.clear()
        self.write(data)

    def _barge_in(self, turn: Turn) -> None:
        if self.turn is turn and turn.completed == 0.0:
            turn.barge_sent = monotonic()
            self.write(_BARGE_IN)

    def data_received(self, data: bytes) -> None:
        at = 0
        if self._skip:
            if len(data) <= self._skip:
                self._skip -= len(data)
                return
            at, self._skip = self._skip, 0
        elif self._stash:
            data, self._stash = self._stash + data, b""
        if not self._upgraded:
            at = self._handshake(data)
            if at < 0:
                return
        self._frames(data, at, monotonic())

    def _handshake(self, data: bytes) -> int:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._stash = data
            return -1
        status = data[9:12]
        if status != b"101":
            self.closing = True
            self._gone(f"refused with {status.decode('latin-1')}")
            self.close()
            return -1
        self._upgraded = True
        return end + 4

    def _frames(self, data: bytes, at: int, now: float) -> None:
        size = len(data)
        while at < size:
            if size - at < 10 and (size - at < 2 or size - at < (2, 4, 10)[max(0, data[at + 1] - 125)]):
                self._stash = data[at:]
                return
            first = data[at]
            length = data[at + 1]
            start = at + 2
            if length == 126:
                length = (data[start] << 8) | data[start + 1]
                start += 2
            elif length == 127:
                length = int.from_bytes(data[start : start + 8], "big")
                start += 8
            end = start + length
            opcode = first & 15
            if opcode == 2 or (opcode == 0 and length):
                self._audio(length, now)
                if end > size:
                    self._skip = end - size
                    return
            elif end > size:
                self._stash = data[at:]
                return
            elif opcode == TEXT:
                self.messages += 1
                self._text(orjson.loads(data[start:end]), now)
            elif opcode == PING:
                self.write(masked_frame(PONG, data[start:end]))
            elif opcode == CLOSE:
                self._closed_by_server(data[start:end])
            at = end

    def _closed_by_server(self, payload: bytes) -> None:
        self.write(masked_frame(CLOSE, payload))
        code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else 1005
        self._gone(f"closed with {code}")
        self.close()

    def _audio(self, length: int, now: float) -> None:
        turn = self.turn
        if turn is None:
            return
        if self._after_barge:
            turn.tail_bytes += length
            return
        if turn.first_audio == 0.0:
            turn.first_audio = now
            if self.barge_after_s is not None:
                self._handles.append(self.timers.at(now + self.barge_after_s, self._barge_in, turn))
        if turn.barge_sent:
            turn.late_bytes += length
        turn.audio_bytes += length

    def _text(self, message: dict[str, Any], now: float) -> None:
        kind = message["type"]
        turn = self.turn
        if kind == "connected":
            if not self.connected.done():
                self.connected.set_result(message)
        elif turn is None:
            return
        elif kind == "response_ready":
            turn.ready = now
            turn.first_clause = message["text"]
            turn.number = message.get("turn_number", 0)
            turn.breakdown = message.get("latency_breakdown") or {}
        elif kind == "turn_complete":
            if turn.first_audio == 0.0:
                turn.error = "turn_complete without audio"
            turn.breakdown = message.get("latency_breakdown") or turn.breakdown
            self._over(turn, now)
        elif kind == "interrupted":
            turn.interrupted = now
            turn.stop_latency_ms = message.get("stop_latency_ms", 0.0)
            self._after_barge = True
            # Audio that comes after `interrupted` would come at once; a moment's wait catches it.
            self._handles.append(self.timers.at(now + 0.25, self._over, turn, now))
        elif kind == "error":
            turn.error = str(message.get("code") or message.get("message"))
            # `turn_complete` may follow; where it does not, the session must not be lost to the crowd.
            self._handles.append(self.timers.at(now + 0.5, self._over, turn, now))

    def _over(self, turn: Turn, completed: float) -> None:
        if self.turn is turn:
            turn.completed = completed
            self.turn = None
            self._handles.clear()
            self.on_idle(self)
