"""A turn on virtual time: what runs beside what, what comes in which order, and the failure table."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.conversation.playback import FRAME_MS, QUEUE_MS
from orchestrator.conversation.runtime import Services
from orchestrator.conversation.turn import JOINED_CHARS
from orchestrator.errors import Failure
from tests.conversation.scripted import (
    ScriptedIntent,
    ScriptedLlm,
    ScriptedRag,
    ScriptedTts,
    Stage,
    on_virtual_time,
    staged,
)


@staged
async def test_a_turn_from_end_of_speech_to_idle() -> None:
    stage = Stage()
    session = await stage.connect()
    ended = stage.ask(session)
    ready = await stage.link.until("response_ready")
    message = ready.message
    assert message["text"] == "You need a diploma."
    assert message["is_partial"] is True
    assert message["intent"] == "admission_requirements"
    assert message["confidence"] == 0.93
    assert message["audio"] is True
    assert message["audio_format"] == {"encoding": "pcm_s16le", "sample_rate": 24000, "channels": 1}
    # Intent 50 beside RAG 80, first token 100 and the clause's other three tokens 5 ms apart, first chunk 75.
    assert ready.at - ended == pytest.approx(0.080 + 0.100 + 3 * 0.005 + 0.075, abs=1e-4)
    done = await stage.link.until("turn_complete")
    assert stage.link.kinds == [
        "connected", "response_ready", "audio", "response_text", "audio", "turn_complete",
    ]  # fmt: skip
    complete = done.message
    assert complete["text"] == "You need a diploma. Send it by May. Good luck!"
    assert complete["state"] == "IDLE"
    assert (complete["cancelled"], complete["truncated"], complete["degraded"]) == (False, False, [])
    assert stage.link.audio_ms() == pytest.approx(3000)
    assert done.at - ready.at == pytest.approx(3.0, abs=0.02)
    assert stage.observer.outcomes == ["completed"]


@staged
async def test_intent_and_rag_take_the_longer_of_the_two_not_the_sum() -> None:
    stage = Stage()
    session = await stage.connect()
    ended = stage.ask(session)
    await stage.link.until("response_ready")
    assert stage.intent.seen.started[0][0] == stage.rag.seen.started[0][0] == ended
    assert stage.llm.seen.started[0][0] - ended == pytest.approx(0.080, abs=1e-4)


@staged
async def test_the_first_clause_is_spoken_before_the_llm_is_done() -> None:
    stage = Stage()
    stage.llm.token_ms = 400
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("response_ready")
    assert stage.llm.seen.open == 1
    assert stage.tts.seen.started[0][1] == "You need a diploma."


@staged
async def test_the_breakdown_names_every_stage_and_our_own_time() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    breakdown = (await stage.link.until("response_ready")).message["latency_breakdown"]
    expected = {
        "intent_ms": 50, "rag_ms": 80, "intent_rag_ms": 80, "llm_first_token_ms": 100, "first_clause_ms": 115,
        "tts_first_chunk_ms": 75, "thinking_ms": 195, "overhead_ms": 0, "total_ms": 270, "budget_ms": 445,
    }  # fmt: skip
    for name, value in expected.items():
        assert breakdown[name] == pytest.approx(value, abs=0.1), name
    assert breakdown["within_budget"] is True
    assert "stt_ms" not in breakdown


@staged
async def test_overhead_is_what_we_take_ourselves() -> None:
    stage = Stage()
    session = await stage.connect()
    create_task = stage.runtime.loop.create_task

    def create_late(coroutine, **kwargs):  # type: ignore[no-untyped-def]
        async def late() -> None:
            await asyncio.sleep(0.030)
            await coroutine

        return create_task(late() if coroutine.__name__ == "_think" else coroutine, **kwargs)

    stage.runtime.loop.create_task = create_late  # type: ignore[method-assign]
    stage.ask(session)
    breakdown = (await stage.link.until("response_ready")).message["latency_breakdown"]
    assert breakdown["overhead_ms"] == pytest.approx(30, abs=0.1)
    assert breakdown["total_ms"] == pytest.approx(300, abs=0.1)


@staged
async def test_each_call_carries_what_is_left_of_its_deadline() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("turn_complete")
    calls = [service.seen.calls[0] for service in (stage.intent, stage.rag, stage.llm, stage.tts)]
    assert [call.timeout_ms for call in calls] == [100, 150, 300, 200]
    assert [(call.session_id, call.turn_number) for call in calls] == [("s1", 1)] * 4
    stages = {call.stage for service in (stage.intent, stage.rag, stage.llm, stage.tts) for call in service.seen.calls}
    assert stages == {"intent", "rag", "llm", "tts-0", "tts-1"}


@staged
async def test_the_prompt_has_passages_intent_and_what_was_said_before() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("turn_complete")
    stage.ask(session, "And until when?")
    await stage.link.until("turn_complete", 2)
    system, *rest = stage.llm.messages[1]
    assert "Passages:\n[1] A diploma is required." in system["content"]
    assert "admission_requirements" in system["content"]
    assert [(message["role"], message["content"]) for message in rest] == [
        ("user", "What are admission requirements?"),
        ("assistant", "You need a diploma. Send it by May. Good luck!"),
        ("user", "And until when?"),
    ]


@staged
async def test_without_an_llm_the_answer_is_rags_stream() -> None:
    stage = Stage()
    stage.runtime.services = Services(stage.intent, stage.rag, None, None, stage.tts)
    session = await stage.connect()
    ended = stage.ask(session)
    ready = await stage.link.until("response_ready")
    # RAG's stream starts at once beside intent; the first sentence ends where the second line begins.
    assert ready.at - ended == pytest.approx(0.080 + 0.075, abs=0.011)
    assert ready.message["intent"] == "admission_requirements"
    assert ready.message["latency_breakdown"]["rag_ms"] == pytest.approx(80, abs=0.1)
    done = await stage.link.until("turn_complete")
    assert done.message["text"] == ScriptedRag.answer
    assert stage.llm.seen.started == []


@staged
async def test_without_tts_the_text_is_the_answer() -> None:
    stage = Stage()
    stage.runtime.services = Services(stage.intent, stage.rag, stage.llm, None, None)
    session = await stage.connect()
    stage.ask(session)
    ready = await stage.link.until("response_ready")
    assert ready.message["audio"] is False
    await stage.link.until("turn_complete")
    assert stage.link.kinds == ["connected", "response_ready", "response_text", "response_text", "turn_complete"]


LONG_SENTENCE = "The office for international students looks at every application twice before it answers anybody."
FAILURES = [Failure.TIMEOUT, Failure.UNREACHABLE, Failure.STATUS, Failure.BAD_ANSWER]


@pytest.mark.parametrize("failure", FAILURES)
def test_intent_down(failure: Failure) -> None:
    async def run() -> None:
        stage = Stage()
        stage.intent.fails = failure
        session = await stage.connect()
        stage.ask(session)
        ready = (await stage.link.until("response_ready")).message
        assert (ready["intent"], ready["confidence"]) == ("unknown", 0.0)
        done = (await stage.link.until("turn_complete")).message
        assert done["degraded"] == ["intent"]
        assert done["text"].startswith("You need a diploma.")

    on_virtual_time(run)


@staged
async def test_intent_late() -> None:
    stage = Stage()
    stage.intent.delay_ms = 5000
    session = await stage.connect()
    ended = stage.ask(session)
    await stage.link.until("response_ready")
    assert stage.llm.seen.started[0][0] - ended == pytest.approx(0.100, abs=1e-4)


@staged
async def test_rag_late_goes_on_without_passages() -> None:
    stage = Stage()
    stage.rag.delay_ms = 5000
    session = await stage.connect()
    ended = stage.ask(session)
    done = (await stage.link.until("turn_complete")).message
    assert stage.llm.seen.started[0][0] - ended == pytest.approx(0.150, abs=1e-4)
    assert done["degraded"] == ["rag"]
    assert "Passages" not in stage.llm.messages[0][0]["content"]


@staged
async def test_no_first_token_in_time_speaks_rags_own_answer() -> None:
    stage = Stage()
    stage.llm.delay_ms = 10_000
    session = await stage.connect()
    ended = stage.ask(session)
    ready = await stage.link.until("response_ready")
    assert ready.at - ended == pytest.approx(0.080 + 0.300 + 0.075, abs=1e-3)
    assert ready.message["text"] == "You need a diploma."
    done = (await stage.link.until("turn_complete")).message
    assert (done["text"], done["degraded"]) == (ScriptedRag.answer, ["llm"])
    assert stage.llm.seen.failed == 1


@staged
async def test_no_first_token_and_no_rag_answer_asks_the_fallback_llm() -> None:
    stage = Stage(llm_fallback_base_url="http://other")
    stage.llm.delay_ms = 10_000
    stage.rag.fails = Failure.STATUS
    fallback = ScriptedLlm(tokens=("Please ", "hold ", "on."))
    stage.runtime.services = Services(stage.intent, stage.rag, stage.llm, fallback, stage.tts)
    session = await stage.connect()
    stage.ask(session)
    done = (await stage.link.until("turn_complete")).message
    assert (done["text"], done["degraded"]) == ("Please hold on.", ["rag", "llm"])


@staged
async def test_nothing_that_could_answer_speaks_the_fallback_sentence() -> None:
    stage = Stage()
    stage.llm.fails = Failure.UNREACHABLE
    stage.rag.fails = Failure.UNREACHABLE
    session = await stage.connect()
    stage.ask(session)
    done = (await stage.link.until("turn_complete")).message
    assert done["text"] == stage.settings.fallback_text
    assert done["degraded"] == ["rag", "llm"]


@staged
async def test_without_a_fallback_sentence_the_turn_fails_with_an_error() -> None:
    stage = Stage(fallback_text="")
    stage.llm.fails = Failure.UNREACHABLE
    stage.rag.fails = Failure.UNREACHABLE
    session = await stage.connect()
    stage.ask(session)
    error = (await stage.link.until("error")).message
    assert (error["code"], error["fatal"], error["retryable"], error["turn_number"]) == ("llm_failed", False, True, 1)
    await stage.link.until("turn_complete")
    assert session.machine.state.value == "IDLE"
    assert stage.observer.outcomes == ["failed"]


@staged
async def test_an_llm_that_says_nothing_counts_as_failed() -> None:
    stage = Stage()
    stage.llm.tokens = (" ", "\n")
    session = await stage.connect()
    stage.ask(session)
    done = (await stage.link.until("turn_complete")).message
    assert (done["text"], done["degraded"]) == (ScriptedRag.answer, ["llm"])


@staged
async def test_an_llm_that_stalls_mid_answer_truncates_the_turn() -> None:
    stage = Stage()
    stage.llm.stalls_after = 6
    session = await stage.connect()
    stage.ask(session)
    done = (await stage.link.until("turn_complete")).message
    assert (done["text"], done["truncated"]) == ("You need a diploma. Send it", True)
    assert stage.observer.outcomes == ["truncated"]


@pytest.mark.parametrize("failure", FAILURES)
def test_tts_down_gives_the_text(failure: Failure) -> None:
    async def run() -> None:
        stage = Stage()
        stage.tts = ScriptedTts(fails=failure)
        stage.runtime.services = Services(stage.intent, stage.rag, stage.llm, None, stage.tts)
        session = await stage.connect()
        stage.ask(session)
        ready = (await stage.link.until("response_ready")).message
        assert (ready["audio"], ready["text"]) == (False, "You need a diploma.")
        error = (await stage.link.until("error")).message
        assert (error["code"], error["turn_number"]) == ("tts_failed", 1)
        done = (await stage.link.until("turn_complete")).message
        assert done["degraded"] == ["tts"]
        assert stage.link.kinds == [
            "connected", "response_ready", "error", "response_text", "response_text", "turn_complete",
        ]  # fmt: skip

    on_virtual_time(run)


@staged
async def test_tts_late_gives_the_text_at_its_deadline() -> None:
    stage = Stage()
    stage.tts.delay_ms = 10_000
    session = await stage.connect()
    ended = stage.ask(session)
    ready = await stage.link.until("response_ready")
    assert ready.at - ended == pytest.approx(0.080 + 0.115 + 0.200, abs=1e-3)


@staged
async def test_short_sentences_that_wait_are_spoken_together() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("turn_complete")
    assert [text for _, text in stage.tts.seen.started] == ["You need a diploma.", "Send it by May. Good luck!"]
    (message,) = stage.link.messages("response_text")
    assert (message["index"], message["text"]) == (1, "Send it by May. Good luck!")


@staged
async def test_long_sentences_are_spoken_one_by_one() -> None:
    stage = Stage()
    stage.llm.tokens = ("You need a diploma. ", LONG_SENTENCE + " ", "Good luck! ", LONG_SENTENCE)
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("turn_complete")
    spoken = [text for _, text in stage.tts.seen.started]
    assert spoken == ["You need a diploma.", f"{LONG_SENTENCE} Good luck!", LONG_SENTENCE]
    assert max(map(len, spoken)) <= JOINED_CHARS


@staged
async def test_a_sentence_that_is_due_does_not_wait_for_company() -> None:
    stage = Stage()
    stage.llm.token_ms = 400
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("turn_complete")
    assert [text for _, text in stage.tts.seen.started] == ["You need a diploma.", "Send it by May.", "Good luck!"]


@staged
async def test_the_next_clause_is_asked_for_when_what_is_left_would_just_cover_its_way() -> None:
    stage = Stage()
    stage.llm.tokens = ("You need a diploma. ", LONG_SENTENCE)
    session = await stage.connect()
    stage.ask(session)
    ready = await stage.link.until("response_ready")
    await stage.link.until("turn_complete")
    left_ms = 1000 - (stage.tts.seen.started[1][0] - ready.at) * 1000
    assert left_ms == pytest.approx(QUEUE_MS + stage.runtime.settings.audio_lead_ms, abs=FRAME_MS)


@staged
async def test_a_later_clause_may_take_as_long_as_there_is_audio_left() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("response_ready")
    stage.tts.delay_ms = 700
    done = await stage.link.until("turn_complete")
    assert done.message["degraded"] == []
    assert stage.link.audio_ms() == pytest.approx(3000)
    first, later = stage.tts.seen.calls
    assert first.timeout_ms == 200
    assert later.timeout_ms == pytest.approx(900, abs=FRAME_MS)


@staged
async def test_tts_that_fails_in_a_later_clause_plays_what_is_there() -> None:
    stage = Stage()
    stage.tts = ScriptedTts(fails=Failure.STATUS, fails_from=1)
    stage.runtime.services = Services(stage.intent, stage.rag, stage.llm, None, stage.tts)
    stage.llm.tokens = ("You need a diploma. ", LONG_SENTENCE + " ", LONG_SENTENCE)
    session = await stage.connect()
    stage.ask(session)
    ready = await stage.link.until("response_ready")
    done = await stage.link.until("turn_complete")
    assert done.at - ready.at == pytest.approx(1.0, abs=0.02)
    assert stage.link.audio_ms() == 1000
    assert done.message["degraded"] == ["tts"]
    assert [message["index"] for message in stage.link.messages("response_text")] == [1, 2]


@staged
async def test_tts_without_a_byte_counts_as_failed() -> None:
    stage = Stage()
    stage.tts.frames = 0
    session = await stage.connect()
    stage.ask(session)
    assert (await stage.link.until("error")).message["code"] == "tts_failed"


@staged
async def test_a_defect_in_a_turn_ends_the_turn_and_not_the_session() -> None:
    stage = Stage()

    async def broken(text, call):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError
        yield b""

    stage.tts.synthesize = broken  # type: ignore[method-assign]
    session = await stage.connect()
    stage.ask(session)
    assert (await stage.link.until("error")).message["code"] == "internal_error"
    await stage.link.until("turn_complete")
    stage.tts = ScriptedTts()
    stage.runtime.services = Services(stage.intent, stage.rag, stage.llm, None, stage.tts)
    stage.ask(session)
    assert (await stage.link.until("turn_complete", 2)).message["degraded"] == []


@staged
async def test_speech_ends_even_if_every_service_is_slow() -> None:
    stage = Stage()
    for service in (stage.intent, stage.rag, stage.llm, stage.tts):
        service.delay_ms = 1e9
    session = await stage.connect()
    ended = stage.ask(session)
    done = await stage.link.until("turn_complete")
    assert done.at - ended < 1.0


@staged
async def test_audio_runs_at_most_its_lead_ahead() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    first = await stage.link.until("audio")
    await stage.link.until("turn_complete")
    sent_ms = 0.0
    for sent in stage.link.sent:
        if sent.audio:
            sent_ms += sent.audio / 48.0
            assert sent_ms - (sent.at - first.at) * 1000 <= stage.settings.audio_lead_ms + 0.1


@staged
async def test_stt_latency_counts_where_the_timestamp_is_sane() -> None:
    from orchestrator.wire.messages import SttFragment, VadEnd

    stage = Stage()
    session = await stage.connect()
    session.receive(SttFragment(text="Hello there", is_final=True, timestamp=stage.runtime.wall() - 0.06))
    session.receive(VadEnd())
    breakdown = (await stage.link.until("response_ready")).message["latency_breakdown"]
    assert breakdown["stt_ms"] == pytest.approx(60, abs=0.5)
    assert breakdown["total_ms"] == pytest.approx(330, abs=1)
    await stage.link.until("turn_complete")
    session.receive(SttFragment(text="Hello again", is_final=True, timestamp=1234567890.0))
    session.receive(VadEnd())
    assert "stt_ms" not in (await stage.link.until("response_ready", 2)).message["latency_breakdown"]


@staged
async def test_cancelling_at_every_await_leaves_nothing_behind() -> None:
    for step_ms in range(0, 600, 7):
        stage = Stage()
        session = await stage.connect()
        stage.ask(session)
        await asyncio.sleep(step_ms / 1000.0)
        stage.interrupt(session)
        stopped = stage.link.messages("interrupted")
        assert len(stopped) == 1, step_ms
        count = len(stage.link.sent)
        await asyncio.sleep(5)
        assert len(stage.link.sent) == count, step_ms
        for service in (stage.intent, stage.rag, stage.llm, stage.tts):
            assert service.seen.open == 0, (step_ms, service)
        await stage.sessions.close()
        leftover = asyncio.all_tasks() - {asyncio.current_task()}
        assert leftover == set(), step_ms


def test_scripted_services_are_what_the_conversation_expects() -> None:
    services = Services(ScriptedIntent(), ScriptedRag(), ScriptedLlm(), None, ScriptedTts())
    assert services.tts is not None
