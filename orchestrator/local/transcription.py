"""One user's stream of speech: what is sent to the recogniser when, and what becomes of its answers.

While the user speaks, a growing partial transcript is asked for at a sane rate. When a pause begins, the
utterance is transcribed at once, on speculation that it has ended: at the endpoint the final text is then already
there. A session has at most one request with the recogniser and one waiting, the newest, so that a busy
recogniser makes partials rarer and never late by a queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from orchestrator.local.audio import Samples, from_pcm16
from orchestrator.local.endpointing import Endpointer, Signal, Voice
from orchestrator.local.models import STT_RATE, VAD_WINDOW

FINAL_PRIORITY: Final = 0
PARTIAL_PRIORITY: Final = 1

_WINDOW_BYTES: Final = VAD_WINDOW * 2
_PARTIAL_INTERVAL_MS: Final = 300.0
_PARTIAL_DUTY: Final = 4.0
"""A session's partials may keep the recogniser busy for one part in four of the time."""
_PREROLL_BYTES: Final = 192 * STT_RATE // 1000 * 2
"""With the 64 ms that onset takes this leaves about 0.1 s before the first sound, where recognition is best: of 54
questions 35 were exact with 0.1 s around, 29 with none, 31 with 0.3 s."""
_COMMIT_BYTES: Final = 10 * STT_RATE * 2
"""At the first pause after 10 s the text so far is fixed, for every partial costs as much as all of it."""
_LONGEST_BYTES: Final = 20 * STT_RATE * 2
"""Moonshine is trained on pieces up to 30 s."""

Message = dict[str, Any]


class VoiceActivity(Protocol):
    def push(self, window: Samples) -> float: ...
    def reset(self) -> None: ...


@dataclass(slots=True)
class _Job:
    """A stretch of speech to transcribe.

    `received` is the Unix time at which the last of its audio came; `is_final` fixes the text; `end_confidence`
    is set once the user's turn is over, and then `vad_end` follows the text.
    """

    audio: bytes
    received: float
    is_pause: bool = False
    is_final: bool = False
    end_confidence: float | None = None
    text: str | None = None
    text_sent: bool = False
    dropped: bool = False


class SpeechSession:
    """Takes microphone audio with `feed`, hands messages of the STT protocol to `send`.

    `recognise` gives the text of samples at 16 kHz; `clock` is monotonic, in seconds. Whoever makes the session
    awaits `run`.
    """

    def __init__(
        self,
        activity: VoiceActivity,
        endpointer: Endpointer,
        recognise: Callable[[Samples, int], Awaitable[str]],
        send: Callable[[Message], None],
        clock: Callable[[], float],
    ) -> None:
        self._activity = activity
        self._endpointer = endpointer
        self._recognise = recognise
        self._send = send
        self._clock = clock
        self._window = bytearray()
        self._speech = bytearray()
        self._received = 0.0
        self._since_partial = 0
        self._interval_ms = _PARTIAL_INTERVAL_MS
        self._pause: _Job | None = None
        self._latest: _Job | None = None
        self._finals: deque[_Job] = deque()
        self._running: _Job | None = None
        self._last_partial = ""
        self._wake = asyncio.Event()

    @property
    def speaking(self) -> bool:
        return self._endpointer.speaking

    def feed(self, pcm: bytes, received: float) -> None:
        """Take PCM16 at 16 kHz that came at Unix time `received`.

        Raises:
            ValueError: an odd number of bytes.
        """
        if len(pcm) % 2:
            raise ValueError(f"PCM16 audio has 2 bytes a sample, but {len(pcm)} bytes came")
        self._received = received
        self._window += pcm
        while len(self._window) >= _WINDOW_BYTES:
            window = bytes(self._window[:_WINDOW_BYTES])
            del self._window[:_WINDOW_BYTES]
            self._take(window)

    def start(self) -> None:
        """Begin a new utterance; if one was being spoken, it is dropped."""
        if not self._endpointer.speaking:
            return
        self._endpointer.reset()
        self._activity.reset()
        self._window.clear()
        self._speech.clear()
        self._pause = self._latest = None
        self._last_partial = ""
        if self._running is not None and not self._running.is_final:
            self._running.dropped = True

    def flush(self) -> None:
        """End the utterance now, if there is one: its final fragment and `vad_end` follow at once."""
        if self._endpointer.speaking:
            self._endpointer.reset()
            self._end(1.0)

    async def run(self) -> None:
        """Transcribe what is asked for, until cancelled."""
        while True:
            await self._wake.wait()
            job = self._next()
            if job is None:
                self._wake.clear()
                continue
            self._running = job
            began = self._clock()
            priority = FINAL_PRIORITY if job.is_final or job.is_pause else PARTIAL_PRIORITY
            job.text = await self._recognise(from_pcm16(job.audio), priority)
            self._running = None
            self._interval_ms = max(_PARTIAL_INTERVAL_MS, (self._clock() - began) * 1000 * _PARTIAL_DUTY)
            self._deliver(job)

    def _take(self, window: bytes) -> None:
        signal = self._endpointer.push(self._activity.push(from_pcm16(window)))
        self._speech += window
        if signal is not None:
            self._on_signal(signal)
        if not self._endpointer.speaking:
            del self._speech[:-_PREROLL_BYTES]
        elif not self._endpointer.paused:
            self._since_partial += VAD_WINDOW
            self._grow()

    def _on_signal(self, signal: Signal) -> None:
        if signal.kind is Voice.STARTED:
            self._since_partial = 0
            self._send(
                {
                    "type": "user_speaking",
                    "confidence": round(signal.confidence, 3),
                    "timestamp": self._received,
                }
            )
        elif signal.kind is Voice.PAUSED:
            self._pause = self._request(is_pause=True, is_final=len(self._speech) >= _COMMIT_BYTES)
        elif signal.kind is Voice.RESUMED:
            self._pause = None
        else:
            self._end(signal.confidence)

    def _grow(self) -> None:
        if len(self._speech) >= _LONGEST_BYTES:
            self._request(is_final=True)
            return
        due = self._since_partial * 1000 >= self._interval_ms * STT_RATE
        if due and not (self._running or self._latest):
            self._request()

    def _request(self, is_pause: bool = False, is_final: bool = False) -> _Job:
        job = _Job(bytes(self._speech), self._received, is_pause, is_final)
        self._since_partial = 0
        if is_final:
            self._speech.clear()
            self._latest = None
            self._finals.append(job)
        else:
            self._latest = job
        self._wake.set()
        return job

    def _end(self, confidence: float) -> None:
        job = self._pause or self._request(is_final=True)
        self._pause = None
        job.is_final = True
        job.end_confidence = round(confidence, 3)
        # A fragment's age is what recognition has cost, so it counts from the audio that decided the end.
        job.received = self._received
        del self._speech[:-_PREROLL_BYTES]
        if job is self._latest:
            self._latest = None
            self._finals.append(job)
        if job.text is not None and job is not self._running:
            self._deliver(job)

    def _next(self) -> _Job | None:
        if self._finals:
            return self._finals.popleft()
        job, self._latest = self._latest, None
        return job

    def _deliver(self, job: _Job) -> None:
        text = job.text or ""
        if job.dropped:
            return
        if job.is_final:
            if text and not job.text_sent:
                self._fragment(job, text)
            job.text_sent = True
            self._last_partial = ""
        else:
            partial = text if job.is_pause else text.rstrip(" .,;:!?-…")
            if partial and partial != self._last_partial:
                self._last_partial = partial
                self._fragment(job, partial)
        if job.end_confidence is not None:
            self._send({"type": "vad_end", "confidence": job.end_confidence, "timestamp": job.received})

    def _fragment(self, job: _Job, text: str) -> None:
        self._send(
            {
                "type": "fragment",
                "text": text,
                "is_final": job.is_final,
                "timestamp": job.received,
                "mode": "replace",
            }
        )
