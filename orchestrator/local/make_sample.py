"""Writes a spoken question as a WAV file: `python -m orchestrator.local.make_sample TEXT OUT.wav`.

16 kHz mono PCM16, as a microphone would send it, with 0.2 s of silence before and 0.6 s after, so that the end
of speech is heard when the file alone is streamed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

import numpy as np

from orchestrator.local.audio import from_pcm16, resample, to_pcm16, wav_bytes
from orchestrator.local.errors import LocalStackError
from orchestrator.local.models import STT_RATE
from orchestrator.local.pieces import pieces
from orchestrator.local.voice import Voice

_BEFORE_S: Final = 0.2
_AFTER_S: Final = 0.6
_LOUDNESS: Final = 0.5


def spoken(voice: Voice, text: str) -> bytes:
    """The WAV file of the text spoken by the voice."""
    pcm = b"".join(voice.speak(piece) for piece in pieces(text))
    speech = resample(from_pcm16(pcm), voice.sample_rate, STT_RATE) * np.float32(_LOUDNESS)
    silences = [np.zeros(int(seconds * STT_RATE), np.float32) for seconds in (_BEFORE_S, _AFTER_S)]
    return wav_bytes(to_pcm16(np.concatenate([silences[0], speech, silences[1]])), STT_RATE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.local.make_sample", description=__doc__)
    parser.add_argument("text", help="what to say")
    parser.add_argument("out", type=Path, help="the WAV file to write")
    args = parser.parse_args()
    try:
        args.out.write_bytes(spoken(Voice(), args.text))
    except (LocalStackError, OSError) as error:
        sys.stderr.write(f"make_sample: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
