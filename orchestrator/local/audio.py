"""Sound as numbers: PCM16 bytes, WAV files, change of sample rate."""

from __future__ import annotations

import io
import math
import wave
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

_ZERO_CROSSINGS: Final = 16
"""Half-width of the interpolation kernel, in periods of the lower of the two rates."""
_BLOCK: Final = 16_384
_FULL_SCALE: Final = 32_768.0


def from_pcm16(data: bytes | bytearray | memoryview) -> Samples:
    """Little-endian PCM16 as floats from -1 to 1.

    Raises:
        ValueError: an odd number of bytes.
    """
    if len(data) % 2:
        raise ValueError(f"PCM16 audio has 2 bytes a sample, but {len(data)} bytes came")
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / np.float32(_FULL_SCALE)


def to_pcm16(samples: Samples) -> bytes:
    """Floats from -1 to 1 (what is beyond is clipped) as little-endian PCM16."""
    scaled = np.clip(samples * np.float32(_FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1)
    return bytes(np.rint(scaled).astype("<i2").tobytes())


def read_wav(data: bytes) -> tuple[Samples, int]:
    """The samples of a 16-bit PCM WAV file, channels mixed to one, and its rate in Hz.

    Raises:
        ValueError: not a WAV file, or another sample format.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"not a readable WAV file: {error}") from error
    if width != 2:
        raise ValueError(f"WAV files must hold 16-bit samples, this one holds {8 * width}-bit samples")
    samples = from_pcm16(frames[: len(frames) // (2 * channels) * 2 * channels])
    if channels > 1:
        samples = samples.reshape(-1, channels).mean(axis=1, dtype=np.float32)
    return samples, rate


def wav_bytes(pcm: bytes, rate: int) -> bytes:
    """A mono WAV file of PCM16 samples at `rate` Hz."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm)
    return out.getvalue()


def resample(samples: Samples, from_rate: int, to_rate: int) -> Samples:
    """The same sound at `to_rate` Hz, by a windowed sinc whose cut-off is half the lower rate.

    Raises:
        ValueError: a rate outside 1,000 to 384,000 Hz.
    """
    for rate in (from_rate, to_rate):
        if not 1_000 <= rate <= 384_000:
            raise ValueError(f"sample rate {rate} Hz is outside 1000 to 384000 Hz")
    if from_rate == to_rate or not len(samples):
        return samples
    divisor = math.gcd(from_rate, to_rate)
    up, down = to_rate // divisor, from_rate // divisor
    kernels = _kernels(up, down)
    half = kernels.shape[1] // 2 - 1
    padded = np.concatenate([np.zeros(half, np.float32), samples, np.zeros(half + 1, np.float32)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[1])
    positions = np.arange(len(samples) * up // down, dtype=np.int64) * down
    out = np.empty(len(positions), np.float32)
    for start in range(0, len(positions), _BLOCK):
        block = positions[start : start + _BLOCK]
        out[start : start + _BLOCK] = np.einsum("ij,ij->i", windows[block // up], kernels[block % up])
    return out


@lru_cache(maxsize=8)
def _kernels(up: int, down: int) -> Samples:
    """One row of interpolation weights for each of the `up` positions between two input samples."""
    cutoff = min(1.0, up / down)
    half = math.ceil(_ZERO_CROSSINGS / cutoff)
    offsets = np.arange(-half, half + 2)[None, :] - (np.arange(up) / up)[:, None]
    window = np.where(np.abs(offsets) <= half, 0.5 + 0.5 * np.cos(np.pi * offsets / half), 0.0)
    weights = cutoff * np.sinc(cutoff * offsets) * window
    kernels: Samples = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return kernels


def split_at_quiet(samples: Samples, max_samples: int, frame: int = 320) -> list[Samples]:
    """The recording in pieces of at most `max_samples`, each cut at the quietest frame of its second half."""
    pieces: list[Samples] = []
    while len(samples) > max_samples:
        half = samples[max_samples // 2 : max_samples]
        usable = len(half) // frame * frame
        energy = np.square(half[:usable]).reshape(-1, frame).sum(axis=1)
        cut = max_samples // 2 + int(np.argmin(energy)) * frame + frame // 2
        pieces.append(samples[:cut])
        samples = samples[cut:]
    pieces.append(samples)
    return pieces
