"""PCM, WAV and resampling."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")

from orchestrator.local.audio import (  # noqa: E402
    from_pcm16,
    read_wav,
    resample,
    split_at_quiet,
    to_pcm16,
    wav_bytes,
)


def tone(frequency: float, rate: int, seconds: float = 0.5):
    return np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate).astype(np.float32) * 0.5


def level(samples) -> float:
    middle = samples[len(samples) // 4 : -len(samples) // 4]
    return float(np.sqrt(np.mean(middle**2)))


@pytest.mark.parametrize(
    ("from_rate", "to_rate"), [(22_050, 16_000), (24_000, 16_000), (16_000, 24_000), (8_000, 16_000)]
)
def test_a_tone_keeps_its_pitch_level_and_length(from_rate: int, to_rate: int) -> None:
    out = resample(tone(440, from_rate), from_rate, to_rate)
    assert len(out) == to_rate // 2
    error = out - tone(440, to_rate)
    assert float(np.abs(error[400:-400]).max()) < 0.002


def test_what_the_lower_rate_cannot_hold_is_removed() -> None:
    assert level(resample(tone(9_500, 22_050), 22_050, 16_000)) < 0.01 * level(tone(9_500, 22_050))
    assert level(resample(tone(6_500, 22_050), 22_050, 16_000)) == pytest.approx(level(tone(6_500, 22_050)), rel=0.02)


def test_the_same_rate_and_silence_of_no_length_are_left_alone() -> None:
    samples = tone(440, 16_000)
    assert resample(samples, 16_000, 16_000) is samples
    assert len(resample(samples[:0], 22_050, 16_000)) == 0
    assert len(resample(samples[:1], 22_050, 16_000)) == 0


@pytest.mark.parametrize("rate", [0, -1, 999, 400_000])
def test_an_impossible_rate_is_refused(rate: int) -> None:
    with pytest.raises(ValueError, match="outside 1000 to 384000"):
        resample(tone(440, 16_000), rate, 16_000)


def test_pcm_there_and_back() -> None:
    pcm = bytes(range(256))
    assert to_pcm16(from_pcm16(pcm)) == pcm
    assert to_pcm16(np.array([2.0, -2.0], np.float32)) == b"\xff\x7f\x00\x80"
    with pytest.raises(ValueError, match="2 bytes a sample"):
        from_pcm16(b"abc")


def test_wav_there_and_back() -> None:
    samples, rate = read_wav(wav_bytes(b"\x00\x40\x00\xc0", 22_050))
    assert rate == 22_050
    assert samples.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("data", [b"", b"RIFF", b"RIFF1234WAVEjunk", wav_bytes(b"\0\0", 8000)[:30]])
def test_a_broken_wav_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a readable WAV file"):
        read_wav(data)


def test_a_long_recording_is_cut_where_it_is_quiet() -> None:
    samples = np.concatenate([tone(440, 16_000, 0.7), np.zeros(1600, np.float32), tone(440, 16_000, 0.7)])
    pieces = split_at_quiet(samples, 16_000)
    assert [len(piece) for piece in pieces] == [pytest.approx(12_000, abs=900), pytest.approx(12_000, abs=900)]
    assert np.array_equal(np.concatenate(pieces), samples)
