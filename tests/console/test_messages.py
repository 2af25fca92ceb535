"""What the page shows of each message, and what it says to the server."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.console.conftest import OpenConsole
from tests.console.scripted_agent import BREAKDOWN
from tests.console.scripted_server import ScriptedServer
from tests.console.steps import ANSWER, begin_turn, complete, hear, move, respond

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b>bold</b> &amp;'


def test_typed_text_is_a_final_fragment_and_the_turns_end(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    console.ask("What are admission requirements?")
    server.wait_for("vad_end")
    assert [message for message in server.link.messages if message["type"] != "ping"] == [
        {"type": "stt_fragment", "text": "What are admission requirements?", "is_final": True},
        {"type": "vad_end", "confidence": 1},
    ]
    console.expect_value("#text", "")


def test_text_longer_than_a_message_may_be_is_kept_and_said(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    console.ask("ü" * 2049)
    console.expect_contains("#hint", "4098 bytes")
    console.expect_value("#text", "ü" * 2049)
    assert server.link.of_type("stt_fragment") == []


def test_live_transcript_becomes_the_users_bubble(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    hear(server, "What are", "admi")
    console.expect_text("#draft", "What are admi")
    console.expect_state("LISTENING")
    hear(server, "What are admission requirements?")
    console.expect_text("#draft", "What are admission requirements?")
    move(server, "LISTENING", "THINKING", "vad_end")
    server.say("processing", stage="intent_rag", progress=0.5, details={})
    console.expect_text("#thinking-stage", "intent rag")
    respond(server, 1, "You need a certificate.")
    console.expect_text(".turn .bubble.user", "What are admission requirements?")
    console.expect_text(".turn .bubble.agent", "You need a certificate.")
    console.expect_hidden("#draft")
    console.expect_hidden("#thinking")
    server.say("response_text", turn_number=1, index=1, text="And a transcript.")
    console.expect_text(".turn .bubble.agent", "You need a certificate. And a transcript.")


def test_session_details_are_shown(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url, "?session_id=test_001")
    console.expect_text("#session-id", "test_001")
    console.expect_text("#served-by", "slot 1 on node-a")
    console.expect_text("#budget", "445 ms")
    console.wait(lambda: "ms" in console.find("#round-trip").inner_text(), "a round trip")
    respond(server, 7)
    console.expect_text("#turn-number", "7")


def test_interrupt_is_seen_although_it_is_over_at_once(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    begin_turn(server, console)
    move(server, "SPEAKING", "INTERRUPT", "user_speaking")
    move(server, "INTERRUPT", "LISTENING", "interrupted")
    console.expect_seen("[data-state=INTERRUPT].flash")
    console.expect_state("LISTENING")


def test_text_from_the_server_is_never_markup(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    hear(server, HOSTILE)
    console.expect_text("#draft", HOSTILE)
    server.say("processing", stage=HOSTILE, progress=0.1, details=HOSTILE)
    broken = {**BREAKDOWN, "budget_broken_by": HOSTILE, "within_budget": False}
    respond(server, 1, HOSTILE, intent=HOSTILE, confidence=HOSTILE, audio_format=HOSTILE, latency_breakdown=broken)
    server.say("response_text", turn_number=1, index=1, text=HOSTILE)
    server.say(
        "interrupted", turn_number=1, message=HOSTILE, heard_text="<img", played_ms=HOSTILE, stop_latency_ms=None
    )
    complete(server, 1, HOSTILE, state=HOSTILE, degraded=[HOSTILE, {"a": HOSTILE}], latency_breakdown=HOSTILE)
    server.say("notice", code=HOSTILE, message=HOSTILE)
    server.say("error", code=HOSTILE, message=HOSTILE, fatal=False, retryable=False, turn_number=HOSTILE)
    move(server, HOSTILE, HOSTILE, HOSTILE)
    server.say("constructor", text=HOSTILE)
    server.say("connected", state=HOSTILE, turn_number=HOSTILE, node=HOSTILE, slot=HOSTILE, budget_ms=HOSTILE)
    console.expect_text("#served-by", f"slot {HOSTILE} on {HOSTILE}")
    console.expect_text(".turn .bubble.user", HOSTILE)
    console.expect_text(".turn .bubble.agent", HOSTILE)
    console.expect_text(".line.error", HOSTILE)
    assert console.find("img, b, script:not([src])").count() == 0
    assert console.page.evaluate("window.hacked") is None


def test_degraded_truncated_and_silent_answers_say_so(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    hear(server, "A question")
    respond(server, 1, "Text alone.", intent="greeting", confidence=1.0, audio=False, audio_format=None)
    server.say("error", code="tts_failed", message="No speech came.", fatal=False, retryable=True, turn_number=1)
    complete(server, 1, "Text alone.", truncated=True, degraded=["rag", "tts"])
    server.say("notice", code="nothing_heard", message="Nothing was heard.")
    console.expect_text("#hint", "Nothing was heard.")
    notes = console.find(".turn .note").all_inner_texts()
    assert notes == ["greeting 100 %", "text only, no speech", "the answer broke off", "without rag", "without tts"]
    console.expect_text(".line.error", "No speech came. You can try again.")


def test_budget_that_was_broken_says_by_what(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    slow = {**BREAKDOWN, "total_ms": 545.0, "within_budget": False, "budget_broken_by": "tts_first_chunk"}
    begin_turn(server, console, latency_breakdown=slow)
    console.expect_text(".latency.over .verdict", "100 ms over 445 ms, by tts first chunk")


def test_question_without_an_answer_keeps_its_bubble(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    hear(server, "A question")
    move(server, "LISTENING", "THINKING", "vad_end")
    server.say("error", code="no_answer", message="No answer came.", fatal=False, retryable=True, turn_number=1)
    move(server, "THINKING", "IDLE", "failed")
    console.expect_text(".turn .bubble.user", "A question")
    hear(server, "Again")
    move(server, "THINKING", "IDLE", "cancel")
    complete(server, 2, "", cancelled=True, latency_breakdown={})
    console.expect_contains(".turn >> nth=1", "stopped")
    console.expect_count(".turn", 2)
    console.expect_hidden("#draft")


def test_user_who_goes_on_while_it_thinks_has_one_bubble(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    hear(server, "What are")
    move(server, "LISTENING", "THINKING", "vad_end")
    server.say("interrupted", turn_number=1, message="went on", heard_text="", played_ms=0, stop_latency_ms=0.1)
    move(server, "THINKING", "LISTENING", "fragment")
    hear(server, "What are", "the fees?")
    console.expect_text("#draft", "What are the fees?")
    assert console.find(".turn").count() == 0
    respond(server, 2)
    console.expect_text(".turn .bubble.user", "What are the fees?")


def test_what_the_browser_cannot_give_is_said_once(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    console.page.evaluate(
        """() => { navigator.mediaDevices.getUserMedia = async () => {
            throw new DOMException('no', 'NotAllowedError'); }; }"""
    )
    console.press("Start talking")
    console.expect_contains("#hint", "may not use the microphone")
    console.expect_attribute("#talk", "aria-pressed", "false")
    assert console.find("#talk").is_enabled()


def test_page_works_by_keyboard_and_names_its_controls(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    for name in ("Start talking", "Send", "Stop", "New conversation"):
        assert console.page.get_by_role("button", name=name, exact=True).is_visible()
    assert console.page.get_by_label("Type instead of talking").is_visible()
    for _ in range(8):
        console.page.keyboard.press("Tab")
        if console.page.evaluate("document.activeElement.id") == "talk":
            break
    console.page.keyboard.press("Enter")
    server.wait(lambda: server.link.audio, "microphone audio")
    console.expect_attribute("#talk", "aria-pressed", "true")
    console.expect_text(".states [aria-current=step]", "Idle")


def overlap(one: Any, other: Any) -> bool:
    return all(
        one[at] < other[at] + other[size] and other[at] < one[at] + one[size]
        for at, size in (("x", "width"), ("y", "height"))
    )


@pytest.mark.parametrize("width", [320, 390, 900, 1280])
def test_nothing_overflows_at_any_width(server: ScriptedServer, open_console: OpenConsole, width: int) -> None:
    console = open_console(server.url, width=width)
    begin_turn(server, console, text="word " * 60 + "x" * 200)
    server.say("error", code="x", message="y" * 300, fatal=False, retryable=False)
    console.expect_text(".turn .bubble.agent", ANSWER)
    console.expect_seen(".stages")
    console.expect_seen(".line.error")
    wider = console.page.evaluate(
        """() => [...document.querySelectorAll('body *')]
        .filter(node => node.getBoundingClientRect().right > innerWidth + 1)
        .map(node => node.tagName + '.' + node.className)"""
    )
    assert wider == []
    console.press("Start talking")
    console.expect_seen("#mute")
    boxes = [console.find(f"#{name}").bounding_box() for name in ("talk", "mute", "stop", "send", "text")]
    assert [pair for pair in itertools.combinations(filter(None, boxes), 2) if overlap(*pair)] == []
    if width < 800:
        console.expect_hidden("#panel")
        console.press("Details")
        console.expect_seen("#panel")
