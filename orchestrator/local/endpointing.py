"""When does the user speak, pause, and stop? Decided from voice-activity probabilities alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Voice(Enum):
    """What has just become clear about the user's voice."""

    STARTED = "started"
    PAUSED = "paused"
    RESUMED = "resumed"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Signal:
    """`confidence` is 0…1: of STARTED and RESUMED, that it is speech; of the others, that it is silence."""

    kind: Voice
    confidence: float


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Times in ms, rounded to whole windows; probabilities 0…1.

    Speech begins after `start_ms` without a window below `start_threshold`. A pause begins with a window
    below `stop_threshold` and is broken by one at `start_threshold`; it is announced after `pause_ms` and ends the turn
    after `endpoint_ms`. The thresholds (0.5, and 0.15 less to stop) are those recommended for the Silero model.
    """

    window_ms: float = 32.0
    start_threshold: float = 0.5
    stop_threshold: float = 0.35
    start_ms: float = 64.0
    pause_ms: float = 96.0
    endpoint_ms: float = 400.0

    def windows(self, duration_ms: float) -> int:
        return max(1, round(duration_ms / self.window_ms))


class Endpointer:
    """Fed one probability a window, says when speech starts, pauses, resumes and ends."""

    def __init__(self, settings: EndpointSettings | None = None) -> None:
        self._settings = settings or EndpointSettings()
        self._start_windows = self._settings.windows(self._settings.start_ms)
        self._pause_windows = self._settings.windows(self._settings.pause_ms)
        self._end_windows = max(self._settings.windows(self._settings.endpoint_ms), self._pause_windows + 1)
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next window is the first."""
        self.speaking = False
        self.paused = False
        self._run: list[float] = []

    def push(self, probability: float) -> Signal | None:
        """Take the next window's probability of speech; the signal, if it changes anything."""
        return self._speaking(probability) if self.speaking else self._quiet(probability)

    def _quiet(self, probability: float) -> Signal | None:
        if probability < self._settings.start_threshold:
            self._run.clear()
            return None
        self._run.append(probability)
        if len(self._run) < self._start_windows:
            return None
        confidence = max(self._run)
        self._run.clear()
        self.speaking = True
        return Signal(Voice.STARTED, confidence)

    def _speaking(self, probability: float) -> Signal | None:
        settings = self._settings
        if not self._run and probability >= settings.stop_threshold:
            return None
        if probability >= settings.start_threshold:
            self._run.clear()
            if self.paused:
                self.paused = False
                return Signal(Voice.RESUMED, probability)
            return None
        self._run.append(probability)
        silence = 1.0 - sum(self._run) / len(self._run)
        if len(self._run) >= self._end_windows:
            self.reset()
            return Signal(Voice.ENDED, silence)
        if len(self._run) == self._pause_windows:
            self.paused = True
            return Signal(Voice.PAUSED, silence)
        return None
