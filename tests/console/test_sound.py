"""Playback and the microphone: counted in the audio thread, and as the frames that reach the server."""

from __future__ import annotations

import array
import itertools

import pytest

from tests.console.conftest import MICROPHONE_HERTZ, OpenConsole
from tests.console.scripted_agent import loudness, tone
from tests.console.scripted_server import ScriptedServer
from tests.console.steps import begin_turn, complete, respond


def test_interruption_drops_queued_audio_at_once_and_greys_the_rest(
    server: ScriptedServer, open_console: OpenConsole
) -> None:
    console = open_console(server.url)
    begin_turn(server, console)
    for _ in range(20):
        server.play(tone(0.5))
    console.wait(lambda: console.milliseconds("#played") > 300, "sound")
    assert console.milliseconds("#queued") > 5000
    before = console.milliseconds("#played")
    server.say("interrupted", turn_number=1, message="", heard_text="One two", played_ms=400.0, stop_latency_ms=0.3)
    server.play(tone(0.5))
    console.expect_text(".turn .unheard", "three four five six.")
    console.wait(lambda: console.milliseconds("#queued") == 0, "an empty queue")
    stopped = console.milliseconds("#played")
    reports = len(console.sent_of("playback"))
    assert stopped - before < 1000
    console.page.wait_for_timeout(400)
    assert console.milliseconds("#played") == stopped
    assert len(console.sent_of("playback")) == reports
    console.expect_text("#speaker-state", "silent")

    respond(server, 2, "Another answer.")
    server.play(tone(0.2))
    ended = server.wait(
        lambda: [report for report in server.link.of_type("playback") if report["ended"]], "the end of turn 2"
    )
    assert [report["turn_number"] for report in ended] == [2]
    assert ended[0]["played_ms"] == pytest.approx(200, abs=1)


def test_cancelled_turn_drops_queued_audio(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    begin_turn(server, console)
    for _ in range(10):
        server.play(tone(0.5))
    console.wait(lambda: console.milliseconds("#played") > 100, "sound")
    complete(server, 1, cancelled=True, heard_text="One two")
    console.wait(lambda: console.milliseconds("#queued") == 0, "an empty queue")
    assert console.milliseconds("#played") < 2500
    console.expect_contains(".turn .meta", "stopped")
    console.expect_text(".turn .unheard", "three four five six.")


def test_escape_stops_the_turn_and_its_sound(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    begin_turn(server, console)
    for _ in range(10):
        server.play(tone(0.5))
    console.wait(lambda: console.milliseconds("#played") > 100, "sound")
    console.page.keyboard.press("Escape")
    server.wait_for("cancel")
    console.wait(lambda: console.milliseconds("#queued") == 0, "an empty queue")
    assert console.milliseconds("#played") < 2500


@pytest.mark.parametrize("rate", [16_000, 22_050, 48_000])
def test_every_sample_rate_is_played_in_its_own_time(
    server: ScriptedServer, open_console: OpenConsole, rate: int
) -> None:
    console = open_console(server.url)
    begin_turn(server, console, rate=rate)
    pcm = tone(0.7, rate=rate)
    for cut in range(0, len(pcm), 3001):
        server.play(pcm[cut : cut + 3001])
    complete(server, 1)
    ended = server.wait(lambda: [m for m in server.link.of_type("playback") if m["ended"]], "the end of playback")
    assert ended[0]["turn_number"] == 1
    assert ended[0]["played_ms"] == pytest.approx(700, abs=1)


def test_gap_in_the_audio_is_waited_out_and_counted_right(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    begin_turn(server, console)
    server.play(tone(0.3))
    first = server.wait(lambda: [m for m in server.link.of_type("playback") if m["ended"]], "the first end")[0]
    assert first["played_ms"] == pytest.approx(300, abs=1)
    server.play(tone(0.3))
    complete(server, 1)
    second = server.wait(lambda: [m for m in server.link.of_type("playback") if m["ended"]][1:], "the second end")[0]
    assert second["played_ms"] == pytest.approx(600, abs=1)
    console.expect_text("#queued", "0.0 ms")


def test_answers_of_two_turns_are_played_one_after_the_other(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    begin_turn(server, console)
    server.play(tone(0.5))
    complete(server, 1)
    respond(server, 2, rate=16_000)
    server.play(tone(0.4, rate=16_000))
    complete(server, 2)
    ended = server.wait(
        lambda: (
            len([m for m in server.link.of_type("playback") if m["ended"]]) == 2
            and [(m["turn_number"], m["played_ms"]) for m in server.link.of_type("playback") if m["ended"]]
        ),
        "both ends",
    )
    assert ended == [(1, pytest.approx(500, abs=1)), (2, pytest.approx(400, abs=1))]


def test_microphone_frames_are_pcm16_at_16_khz(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    console.press("Start talking")
    server.wait(lambda: sum(loudness(frame) > 0.03 for frame in server.link.audio) >= 20, "the voice")
    assert {len(frame) for frame in server.link.audio} == {1024}
    heard = array.array("h", b"".join(frame for frame in server.link.audio if loudness(frame) > 0.03)[:16_384])
    crossings = sum((before < 0) != (after < 0) for before, after in itertools.pairwise(heard))
    assert crossings / 2 / (len(heard) / 16_000) == pytest.approx(MICROPHONE_HERTZ, rel=0.05)
    console.expect_text("#microphone-state", "on")
    console.wait(lambda: console.level("#microphone-level") > 0.1, "a level")


def test_muted_microphone_sends_silence(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    console.press("Start talking")
    server.wait(lambda: server.link.audio, "microphone audio")
    console.press("Mute")
    console.expect_text("#microphone-state", "muted")
    console.page.wait_for_timeout(150)
    before = len(server.link.audio)
    server.wait(lambda: len(server.link.audio) > before + 40, "frames while muted")
    assert max(map(loudness, server.link.audio[before:])) == 0
    console.press("Unmute")
    console.expect_text("#microphone-state", "on")


def test_holding_mute_mutes_only_while_held(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    console.press("Start talking")
    console.find("#mute").hover()
    console.page.mouse.down()
    console.expect_text("#microphone-state", "muted")
    console.page.wait_for_timeout(500)
    console.page.mouse.up()
    console.expect_text("#microphone-state", "on")
    console.find("#scroller").focus()
    console.page.keyboard.press("m")
    console.expect_text("#microphone-state", "muted")
    console.find("#text").press("m")
    console.expect_value("#text", "m")
    console.expect_text("#microphone-state", "muted")
