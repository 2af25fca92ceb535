"""WAV files in and out of the command line: 16-bit PCM, resampled to what the microphone line takes."""

from __future__ import annotations

import sys
import wave
from array import array
from pathlib import Path

from orchestrator.errors import OrchestratorError

MICROPHONE_RATE = 16_000
_ACCEPTED = "a WAV file with 16-bit PCM, mono or stereo, 4000 to 192000 Hz"


class RecordingError(OrchestratorError):
    """A file that cannot be read as speech, or not be written."""


def read_recording(path: Path) -> bytes:
    """The speech in `path` as PCM16 mono 16 kHz. Raises RecordingError."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            pcm = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise RecordingError(f"{path}: {error or 'not a WAV file'}; accepted is {_ACCEPTED}") from None
    if width != 2 or channels not in (1, 2) or not 4000 <= rate <= 192_000:
        raise RecordingError(f"{path} has {width * 8} bits, {channels} channels, {rate} Hz; accepted is {_ACCEPTED}")
    samples = array("h")
    samples.frombytes(pcm[: len(pcm) // (2 * channels) * 2 * channels])
    if sys.byteorder == "big":
        samples.byteswap()
    if not samples:
        raise RecordingError(f"{path} has no samples; accepted is {_ACCEPTED}")
    if channels == 2:
        samples = array("h", ((left + right) // 2 for left, right in zip(samples[::2], samples[1::2], strict=True)))
    return _resampled(samples, rate).tobytes()


def write_recording(path: Path, pcm: bytes, sample_rate: int) -> None:
    """Write PCM16 mono as a WAV file. Raises RecordingError."""
    try:
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            file.writeframes(pcm)
    except OSError as error:
        raise RecordingError(f"{path} cannot be written: {error.strerror}") from None


def _resampled(samples: array[int], rate: int) -> array[int]:
    """Linear interpolation to 16 kHz, averaged first where the rate is a multiple: good enough for speech."""
    if rate == MICROPHONE_RATE:
        return samples
    factor = rate // MICROPHONE_RATE
    if factor > 1:
        usable = len(samples) // factor * factor
        samples = array("h", (sum(samples[at : at + factor]) // factor for at in range(0, usable, factor)))
        rate = rate // factor if rate % factor == 0 else round(rate / factor)
    if rate == MICROPHONE_RATE:
        return samples
    step, last = rate / MICROPHONE_RATE, len(samples) - 1
    out = array("h")
    for place in range(int(len(samples) / step)):
        at = place * step
        low = min(int(at), last)
        high = min(low + 1, last)
        out.append(int(samples[low] + (samples[high] - samples[low]) * (at - low)))
    return out
