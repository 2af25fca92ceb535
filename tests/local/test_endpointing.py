"""Endpointing, driven by probabilities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.local.endpointing import Endpointer, EndpointSettings, Signal, Voice


def heard(endpointer: Endpointer, *probabilities: float) -> list[Voice]:
    """The kinds of signal for these windows, in order."""
    signals = [endpointer.push(probability) for probability in probabilities]
    return [signal.kind for signal in signals if signal is not None]


def test_one_loud_window_is_no_speech() -> None:
    endpointer = Endpointer()
    assert heard(endpointer, 0.0, 0.99, 0.1, 0.99, 0.1, 0.99) == []
    assert not endpointer.speaking


def test_speech_starts_with_the_second_window_in_a_row_and_its_higher_probability() -> None:
    endpointer = Endpointer()
    assert endpointer.push(0.6) is None
    assert endpointer.push(0.9) == Signal(Voice.STARTED, 0.9)
    assert endpointer.speaking


def test_a_turn_pauses_and_ends_after_the_silence_asked_for() -> None:
    endpointer = Endpointer(EndpointSettings(pause_ms=96, endpoint_ms=320))
    heard(endpointer, 0.9, 0.9, 0.9)
    signals = [endpointer.push(0.1) for _ in range(10)]
    assert [index for index, signal in enumerate(signals, 1) if signal] == [3, 10]
    assert signals[2] == Signal(Voice.PAUSED, pytest.approx(0.9))
    assert signals[9] == Signal(Voice.ENDED, pytest.approx(0.9))
    assert not endpointer.speaking


def test_speech_in_a_pause_resumes_the_same_turn() -> None:
    endpointer = Endpointer(EndpointSettings(endpoint_ms=320))
    heard(endpointer, 0.9, 0.9)
    assert heard(endpointer, 0.1, 0.1, 0.1, 0.8) == [Voice.PAUSED, Voice.RESUMED]
    assert heard(endpointer, *[0.1] * 9) == [Voice.PAUSED]
    assert heard(endpointer, 0.1) == [Voice.ENDED]


def test_a_short_gap_between_words_is_no_pause() -> None:
    endpointer = Endpointer()
    assert heard(endpointer, 0.9, 0.9, 0.1, 0.1, 0.9, 0.1, 0.1, 0.9) == [Voice.STARTED]


def test_a_doubtful_window_neither_begins_nor_breaks_silence() -> None:
    endpointer = Endpointer(EndpointSettings(endpoint_ms=160))
    heard(endpointer, 0.9, 0.9)
    assert heard(endpointer, *[0.4] * 20) == []
    assert heard(endpointer, 0.1, 0.4, 0.4, 0.4, 0.4) == [Voice.PAUSED, Voice.ENDED]


def test_after_the_end_a_new_turn_can_start() -> None:
    endpointer = Endpointer(EndpointSettings(endpoint_ms=160))
    assert heard(endpointer, 0.9, 0.9, *[0.0] * 5, 0.9, 0.9)[-2:] == [Voice.ENDED, Voice.STARTED]


def test_an_endpoint_shorter_than_the_pause_comes_one_window_after_it() -> None:
    endpointer = Endpointer(EndpointSettings(pause_ms=96, endpoint_ms=32))
    assert heard(endpointer, 0.9, 0.9, 0.0, 0.0, 0.0, 0.0) == [Voice.STARTED, Voice.PAUSED, Voice.ENDED]


@given(st.lists(st.floats(0.0, 1.0), max_size=400))
def test_signals_alternate_and_every_turn_ends_once(probabilities: list[float]) -> None:
    kinds = heard(Endpointer(), *probabilities, *[0.0] * 20)
    allowed = {
        None: {Voice.STARTED},
        Voice.STARTED: {Voice.PAUSED},
        Voice.PAUSED: {Voice.RESUMED, Voice.ENDED},
        Voice.RESUMED: {Voice.PAUSED},
        Voice.ENDED: {Voice.STARTED},
    }
    before: Voice | None = None
    for kind in kinds:
        assert kind in allowed[before]
        before = kind
    assert before in (None, Voice.ENDED)
