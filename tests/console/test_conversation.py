"""Whole conversations in the page. They hold against any server: see CONSOLE_URL in conftest."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

import pytest

from tests.console.conftest import OpenConsole
from tests.console.scripted_agent import loudness

if TYPE_CHECKING:
    from tests.console.page import Console

QUESTION = "What are admission requirements?"
ROWS = {
    "stt": "stt",
    "intent": "intent",
    "rag": "rag",
    "llm": "llm_first_token",
    "clause": "first_clause",
    "tts": "tts_first_chunk",
    "overhead": "overhead",
}
"""Rows of the waterfall, and the fields of the breakdown they show."""


def received_ms(console: Console, turn: int) -> float:
    """The length of the audio that came in for a turn: the page's only one in these tests."""
    ready = next(message for message in console.received_of("response_ready") if message["turn_number"] == turn)
    rate: int = ready["audio_format"]["sample_rate"]
    return 1000 * sum(map(len, console.received_audio)) / 2 / rate


def test_typed_question_is_answered_and_timed(console_url: str, open_console: OpenConsole) -> None:
    console = open_console(console_url)
    console.expect_state("IDLE")
    console.ask(QUESTION)
    console.expect_text(".turn .bubble.user", QUESTION)
    console.expect_seen(".turn .bubble.agent")
    console.expect_state("IDLE")
    complete = console.wait(lambda: console.received_of("turn_complete"), "turn_complete")[-1]
    console.expect_text(".turn .bubble.agent", complete["text"])

    breakdown = complete["latency_breakdown"]
    assert float(console.find(".latency").get_attribute("data-total-ms") or 0) == pytest.approx(breakdown["total_ms"])
    shown = console.find(".stage").evaluate_all("rows => rows.map(row => row.dataset.stage)")
    assert [row for row in shown if row != "saved"] == [row for row, key in ROWS.items() if f"{key}_ms" in breakdown]
    assert console.find(".latency .budget").count() == len(shown) + 1


def test_answer_is_played_to_its_end_and_reported(console_url: str, open_console: OpenConsole) -> None:
    console = open_console(console_url)
    console.ask(QUESTION)
    console.wait(lambda: console.level("#speaker-level") > 0.1, "audible sound")
    console.wait(lambda: console.received_of("turn_complete"), "turn_complete")
    console.wait(lambda: console.sent_of("playback")[-1]["ended"], "the last playback report")

    reports = console.sent_of("playback")
    turn = console.received_of("response_ready")[0]["turn_number"]
    assert {report["turn_number"] for report in reports} == {turn}
    played = [report["played_ms"] for report in reports]
    assert played == sorted(played)
    assert played[-1] == pytest.approx(received_ms(console, turn), abs=1.0)
    steps = [later - earlier for earlier, later in itertools.pairwise(played)]
    assert max(steps) < 350
    assert console.milliseconds("#played") == pytest.approx(played[-1], abs=1.0)
    assert console.milliseconds("#queued") == 0


def test_spoken_question_is_answered(console_url: str, open_console: OpenConsole) -> None:
    console = open_console(console_url)
    console.press("Start talking")
    console.expect_seen(".turn .bubble.user")
    console.expect_seen(".turn .bubble.agent")
    assert {len(frame) for frame in console.sent_audio} == {1024}
    assert max(map(loudness, console.sent_audio)) > 0.02
    console.press("End talking")
    frames = len(console.sent_audio)
    console.wait(lambda: console.received_of("turn_complete") or console.received_of("interrupted"), "the turn's end")
    assert len(console.sent_audio) - frames <= 2


def test_typing_over_the_answer_interrupts_it(console_url: str, open_console: OpenConsole) -> None:
    console = open_console(console_url)
    console.ask(QUESTION)
    console.wait(lambda: console.milliseconds("#played") > 600, "600 ms of answer")
    console.ask("And how much is the tuition?")
    console.expect_seen(".turn .unheard")
    first = console.find(".turn").first
    interrupted = console.received_of("interrupted")[0]
    whole = first.locator(".bubble.agent").inner_text()
    unheard = first.locator(".unheard").inner_text()
    assert whole.startswith(interrupted["heard_text"])
    assert whole.removesuffix(unheard).split() == interrupted["heard_text"].split()
    assert "interrupted after" in first.locator(".meta").inner_text()
    console.expect_text(".turn:nth-child(2) .bubble.user", "And how much is the tuition?")
    console.expect_seen(".turn:nth-child(2) .bubble.agent")


def test_stop_ends_the_answer(console_url: str, open_console: OpenConsole) -> None:
    console = open_console(console_url)
    console.ask(QUESTION)
    console.wait(lambda: console.milliseconds("#played") > 300, "300 ms of answer")
    console.press("Stop")
    complete = console.wait(lambda: console.received_of("turn_complete"), "turn_complete")[0]
    assert complete["cancelled"]
    console.expect_state("IDLE")
    console.wait(lambda: console.milliseconds("#queued") == 0, "an empty queue")
    assert "stopped" in console.find(".turn .meta").inner_text()
    assert console.find("#stop").is_disabled()


@pytest.mark.skipif("CONSOLE_URL" in os.environ, reason="its voice is timed for the scripted agent")
def test_speaking_over_the_answer_interrupts_it(console_url: str, open_console: OpenConsole) -> None:
    console = open_console(console_url)
    console.press("Start talking")
    console.wait(lambda: console.received_of("interrupted"), "barge-in")
    console.expect_seen(".turn .unheard")
    console.wait(lambda: len(console.received_of("response_ready")) == 2, "the second answer")
