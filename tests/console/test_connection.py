"""How the page keeps, loses and finds its connection."""

from __future__ import annotations

from http import HTTPStatus

import pytest

from tests.console.conftest import OpenConsole
from tests.console.scripted_agent import tone
from tests.console.scripted_server import ByHand, ScriptedServer
from tests.console.steps import ANSWER, LOST, begin_turn, complete, hear, respond


def wait_for_links(server: ScriptedServer, count: int) -> None:
    server.wait(lambda: len(server.links) == count, f"{count} connections")


@pytest.mark.parametrize("loss", ["cut", "restart"])
def test_lost_connection_comes_back_with_the_session_and_last_seq(
    server: ScriptedServer, open_console: OpenConsole, loss: str
) -> None:
    console = open_console(server.url, "?session_id=test_001", tolerate=LOST)
    assert server.link.query == {"session_id": "test_001", "events": "all"}
    hear(server, "kept")
    console.expect_text("#draft", "kept")
    seen = server.link.seq
    if loss == "cut":
        server.abort()
    else:
        server.close(1012, "restart")
    wait_for_links(server, 2)
    assert server.link.query == {"session_id": "test_001", "events": "all", "last_seq": str(seen)}
    console.expect_connected()
    console.expect_text("#reconnects", "1")
    console.expect_hidden("#banner")


def test_microphone_goes_on_after_a_reconnect(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url, tolerate=LOST)
    console.press("Start talking")
    server.wait(lambda: server.link.audio, "microphone audio")
    server.abort()
    wait_for_links(server, 2)
    server.wait(lambda: server.link.audio, "microphone audio on the new connection")


def test_events_missed_are_taken_up_after_a_reconnect(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url, tolerate=LOST)
    begin_turn(server, console)
    console.expect_seen(".turn .bubble.agent")
    server.abort()
    wait_for_links(server, 2)
    respond(server, 1)
    complete(server, 1, "One two three.", cancelled=True)
    console.expect_text(".turn .bubble.agent", "One two three.")
    assert console.find(".turn").count() == 1


def test_server_that_forgot_the_conversation_does_not_overwrite_it(
    server: ScriptedServer, open_console: OpenConsole
) -> None:
    console = open_console(server.url, tolerate=LOST)
    begin_turn(server, console)
    server.play(tone(5.0))
    console.wait(lambda: console.milliseconds("#played") > 100, "sound")
    server.script = ByHand(resumed=False)
    server.abort()
    wait_for_links(server, 2)
    console.expect_contains(".line", "starts anew")
    console.wait(lambda: console.milliseconds("#queued") == 0, "an empty queue")
    hear(server, "Another question")
    respond(server, 1, "Another answer.")
    console.expect_count(".turn", 2)
    assert console.find(".turn .bubble.agent").all_inner_texts() == [ANSWER, "Another answer."]
    assert server.link.of_type("playback") == []


def test_reload_says_that_the_conversation_goes_on(server: ScriptedServer, open_console: OpenConsole) -> None:
    server.script = ByHand(resumed=True, turn_number=3)
    console = open_console(server.url, "?session_id=test_001")
    console.expect_text(".line", "The conversation goes on after turn 3.")
    console.expect_hidden("#welcome")


def test_draining_server_is_left_at_its_word(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    server.say("draining", reconnect_after_ms=300)
    wait_for_links(server, 2)
    assert server.links[0].query["session_id"] == server.link.query["session_id"]
    console.expect_connected()


def test_draining_does_not_cut_a_running_turn(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    begin_turn(server, console)
    console.expect_state("SPEAKING")
    server.say("draining", reconnect_after_ms=0)
    console.page.wait_for_timeout(700)
    assert len(server.links) == 1
    complete(server, 1)
    wait_for_links(server, 2)


def test_server_away_for_a_while_is_found_again(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url, tolerate=(*LOST, "ERR_CONNECTION_REFUSED"))
    server.run(server.shut())
    console.expect_contains("#banner", "The server does not answer.")
    console.ask("kept for later")
    console.expect_contains("#hint", "Not connected")
    console.expect_value("#text", "kept for later")
    console.press("Start talking")
    console.expect_contains("#hint", "did not deliver the page's sound parts")
    server.run(server.listen())
    wait_for_links(server, 2)
    console.expect_connected()
    console.press("Start talking")
    server.wait(lambda: server.link.audio, "microphone audio")


def test_conversation_taken_elsewhere_is_not_taken_back_unasked(
    server: ScriptedServer, open_console: OpenConsole
) -> None:
    console = open_console(server.url)
    server.close(4409, "taken")
    console.expect_contains("#banner", "another window")
    console.page.wait_for_timeout(1200)
    assert len(server.links) == 1
    console.press("Connect again")
    wait_for_links(server, 2)
    console.expect_hidden("#banner")


def test_expired_conversation_offers_a_new_one(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    server.close(4410, "idle")
    console.expect_contains("#banner", "idle for too long")
    console.find("#banner-action").click()
    wait_for_links(server, 2)
    assert server.links[0].query["session_id"] != server.link.query["session_id"]
    assert "last_seq" not in server.link.query
    assert f"session_id={server.link.query['session_id']}" in console.page.url


def test_server_without_speech_to_text_turns_the_microphone_off(
    server: ScriptedServer, open_console: OpenConsole
) -> None:
    console = open_console(server.url)
    console.press("Start talking")
    server.wait(lambda: server.link.audio, "microphone audio")
    server.close(1003, "no STT")
    wait_for_links(server, 2)
    console.expect_text("#microphone-state", "off")
    console.expect_contains("#hint", "no speech-to-text")
    assert server.link.audio == []


def test_missing_token_is_asked_for_and_used(server: ScriptedServer, open_console: OpenConsole) -> None:
    server.refuse_with = HTTPStatus.UNAUTHORIZED
    console = open_console(server.url, "?session_id=test_001", connected=False, tolerate=(*LOST, "401"))
    console.expect_contains("#banner", "needs an access token")
    assert server.links == []
    server.refuse_with = None
    console.find("#token").fill("a.b.c")
    console.press("Use token")
    console.expect_connected()
    assert server.link.query["token"] == "a.b.c"
    assert "a.b.c" not in console.page.content() + console.page.url


def test_full_server_is_tried_again_after_its_own_delay(server: ScriptedServer, open_console: OpenConsole) -> None:
    server.refuse_with = HTTPStatus.SERVICE_UNAVAILABLE
    console = open_console(server.url, connected=False, tolerate=(*LOST, "503"))
    console.expect_contains("#banner", "takes no more conversations")
    server.refuse_with = None
    console.expect_connected()


def test_settings_come_from_the_address(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url, "?session_id=a.b_c:d-1&token=t.o.k")
    assert server.link.query == {"session_id": "a.b_c:d-1", "events": "all", "token": "t.o.k"}
    console.expect_text("#session-id", "a.b_c:d-1")


def test_session_made_by_the_page_survives_a_reload(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url)
    made = server.link.query["session_id"]
    assert f"session_id={made}" in console.page.url
    console.page.reload()
    wait_for_links(server, 2)
    assert server.link.query["session_id"] == made
    console.press("New conversation")
    wait_for_links(server, 3)
    assert server.link.query["session_id"] != made


def test_malformed_session_id_is_named_and_not_sent(server: ScriptedServer, open_console: OpenConsole) -> None:
    console = open_console(server.url, "?session_id=no%20spaces", connected=False)
    console.expect_contains("#banner", "session_id in the address is not valid")
    assert server.links == []
    console.find("#banner-action").click()
    console.expect_connected()
