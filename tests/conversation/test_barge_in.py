"""Barge-in in every phase: `interrupted` at once, no audio after it, nothing left running, history as it was heard."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.wire.messages import Cancel, PlaybackReport, SttFragment
from tests.conversation.scripted import Stage, on_virtual_time, staged

# Milliseconds after the end of speech, and what the turn is doing then.
PHASES = {
    "understanding": 30,
    "waiting for the first token": 120,
    "waiting for the first chunk": 210,
    "just speaking": 271,
    "mid-clause": 700,
    "between clauses": 1270,
    "the last clause": 2600,
    "all sent, not all played": 3200,
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("by", ["user_speaking", "fragment"])
def test_barge_in(phase: str, by: str) -> None:
    async def run() -> None:
        stage = Stage()
        session = await stage.connect()
        stage.ask(session)
        await asyncio.sleep(PHASES[phase] / 1000.0)
        before = len(stage.link.sent)
        if by == "user_speaking":
            stage.interrupt(session)
        else:
            stage.say(session, "wait a moment", final=False)
        at_once = [sent.kind for sent in stage.link.sent[before:]]
        assert "interrupted" in at_once
        await asyncio.sleep(10)
        assert [sent.kind for sent in stage.link.sent[before:]] == at_once
        message = stage.link.messages("interrupted")[0]
        assert message["turn_number"] == 1
        spoken = max(0, PHASES[phase] - 270)
        assert message["played_ms"] == pytest.approx(spoken, abs=15)
        for service in (stage.intent, stage.rag, stage.llm, stage.tts):
            assert service.seen.open == 0
        assert session.machine.state.value == "LISTENING"
        assert stage.observer.outcomes == ["interrupted"]
        assert stage.observer.stops == [0.0]

    on_virtual_time(run)


@pytest.mark.parametrize(
    ("phase", "aborted"),
    [
        ("understanding", {"intent": 1, "rag": 1, "llm": 0, "tts": 0}),
        ("waiting for the first token", {"intent": 0, "rag": 0, "llm": 1, "tts": 0}),
        ("waiting for the first chunk", {"intent": 0, "rag": 0, "llm": 1, "tts": 1}),
    ],
)
def test_streams_under_way_are_really_aborted(phase: str, aborted: dict[str, int]) -> None:
    async def run() -> None:
        stage = Stage()
        session = await stage.connect()
        stage.ask(session)
        await asyncio.sleep(PHASES[phase] / 1000.0)
        stage.interrupt(session)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        seen = {s.service: s.seen.aborted for s in (stage.intent, stage.rag, stage.llm, stage.tts)}
        assert seen == aborted

    on_virtual_time(run)


@staged
async def test_a_fragment_that_interrupts_begins_the_next_utterance() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("audio", 4)
    stage.say(session, "wait", final=False)
    assert stage.link.kinds[-2:] == ["interrupted", "state_update"]
    assert stage.link.messages("state_update")[-1]["text_buffer"] == ["wait"]
    stage.say(session, "wait and until when", final=True)
    stage.end(session)
    await stage.link.until("response_ready", 2)
    assert stage.llm.messages[-1][-1]["content"] == "wait and until when"


@staged
async def test_history_holds_what_was_heard_by_the_paced_clock() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await asyncio.sleep(0.270 + 1.5)
    stage.interrupt(session)
    heard = stage.link.messages("interrupted")[0]["heard_text"]
    # All of the first second's clause, and the whole words in the first half of the second.
    assert heard == "You need a diploma. Send it"
    stage.say(session, "what else")
    stage.end(session)
    await stage.link.until("response_ready", 2)
    contents = [message["content"] for message in stage.llm.messages[-1][1:]]
    assert contents == ["What are admission requirements?", "You need a diploma. Send it", "what else"]


@staged
async def test_history_holds_what_the_client_reports() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await asyncio.sleep(0.270 + 1.5)
    session.receive(PlaybackReport(turn_number=1, played_ms=600))
    stage.interrupt(session)
    message = stage.link.messages("interrupted")[0]
    assert message["played_ms"] == pytest.approx(600, abs=1)
    assert message["heard_text"] == "You need a"


@staged
async def test_a_barge_in_before_anything_was_heard_leaves_only_the_question() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await asyncio.sleep(0.271)
    stage.interrupt(session)
    assert stage.link.messages("interrupted")[0]["heard_text"] == ""
    assert [entry.role for entry in session._turns.memory.history()] == ["user"]


@staged
async def test_the_user_who_goes_on_while_we_think_keeps_the_utterance() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session, "What are admission requirements")
    await asyncio.sleep(0.1)
    stage.say(session, "for students from abroad", final=False)
    assert stage.link.kinds[-2:] == ["state_update", "interrupted"]
    stage.end(session)
    await stage.link.until("response_ready")
    assert stage.llm.messages[-1][-1]["content"] == "What are admission requirements for students from abroad"
    assert session._turns.memory.history() == ()


@staged
async def test_a_quiet_voice_does_not_stop_the_answer() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("audio")
    stage.interrupt(session, confidence=0.3)
    assert (await stage.link.until("notice")).message["code"] == "speech_ignored"
    await stage.link.until("turn_complete")


@staged
async def test_stale_results_do_not_pass_the_gate() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("audio")
    stale = session._turns.turn
    assert stale is not None
    stage.interrupt(session)
    count = len(stage.link.sent)
    stale.send_audio(b"\0\0")
    session._deliver(1, b"\0\0")
    assert len(stage.link.sent) == count


@staged
async def test_cancel_stops_the_turn_and_says_so() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await asyncio.sleep(0.270 + 1.1)
    session.receive(Cancel())
    done = stage.link.messages("turn_complete")[0]
    assert (done["cancelled"], done["state"], done["heard_text"]) == (True, "IDLE", "You need a diploma.")
    count = len(stage.link.sent)
    await asyncio.sleep(5)
    assert len(stage.link.sent) == count
    session.receive(Cancel())
    assert stage.link.messages("error")[0]["code"] == "illegal_event"


@staged
async def test_playback_reports_end_a_turn_early_or_late() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    first = await stage.link.until("audio")
    await asyncio.sleep(2.9)
    session.receive(PlaybackReport(turn_number=1, played_ms=2500))
    done = await stage.link.until("turn_complete")
    assert done.at - first.at == pytest.approx(3.4, abs=0.03)
    stage.ask(session)
    second = await stage.link.until("response_ready", 2)
    await asyncio.sleep(2.8)
    session.receive(PlaybackReport(turn_number=2, played_ms=3000, ended=True))
    done = await stage.link.until("turn_complete", 2)
    assert done.at - second.at == pytest.approx(2.8, abs=0.03)


@staged
async def test_reports_cannot_keep_a_turn_alive_for_ever() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    first = await stage.link.until("audio")
    for _ in range(400):
        session.receive(PlaybackReport(turn_number=1, played_ms=0))
        await asyncio.sleep(0.1)
        if "turn_complete" in stage.link.kinds:
            break
    done = await stage.link.until("turn_complete")
    assert done.at - first.at < 5.1
    session.receive(PlaybackReport(turn_number=9, played_ms=0))
    assert stage.link.messages("error")[0]["code"] == "bad_message"


@staged
async def test_a_reader_that_does_not_read_is_closed() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("audio")
    stage.link.writable = False
    await asyncio.sleep(4.5)
    assert stage.link.closed is None
    await asyncio.sleep(1.5)
    assert stage.link.closed is not None
    assert stage.link.closed[0] == 4408


@staged
async def test_a_reader_that_pauses_loses_nothing() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("audio")
    stage.link.writable = False
    await asyncio.sleep(3)
    stage.link.writable = True
    session.resume_writing()
    await stage.link.until("turn_complete")
    assert stage.link.audio_ms() == 3000


@staged
async def test_a_late_final_of_the_same_words_changes_nothing() -> None:
    stage = Stage()
    session = await stage.connect()
    session.receive(SttFragment(text="what are admission requirements"))
    stage.end(session)
    await asyncio.sleep(0.1)
    session.receive(SttFragment(text="What are admission requirements?", is_final=True))
    assert (await stage.link.until("response_ready")).message["turn_number"] == 1


@staged
async def test_a_late_final_with_other_words_asks_again() -> None:
    stage = Stage()
    session = await stage.connect()
    session.receive(SttFragment(text="what are a mission requirements"))
    stage.end(session)
    await asyncio.sleep(0.1)
    session.receive(SttFragment(text="What are admission requirements?", is_final=True))
    assert (await stage.link.until("response_ready")).message["turn_number"] == 2
    assert stage.llm.messages[-1][-1]["content"] == "What are admission requirements?"
