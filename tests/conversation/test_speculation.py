"""Intent and RAG asked early: adopted only for the very words of the turn, and never twice at once."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.conversation.runtime import Services
from orchestrator.errors import Failure
from tests.conversation.scripted import Stage, on_virtual_time, staged


@staged
async def test_a_stable_partial_is_asked_early_and_adopted() -> None:
    stage = Stage(speculation="on")
    session = await stage.connect()
    stage.say(session, "what are admission requirements", final=False)
    await asyncio.sleep(0.3)
    stage.say(session, "What are admission requirements?", final=True)
    ended = stage.end(session)
    ready = await stage.link.until("response_ready")
    assert ready.at - ended == pytest.approx(0.100 + 0.015 + 0.075, abs=1e-3)
    breakdown = ready.message["latency_breakdown"]
    assert breakdown["saved_ms"] == pytest.approx(80, abs=0.1)
    assert breakdown["intent_rag_ms"] == 0
    assert len(stage.rag.seen.started) == 1
    assert stage.observer.speculations == ["adopted"]


@staged
async def test_a_question_in_flight_is_adopted_too() -> None:
    stage = Stage(speculation="on")
    session = await stage.connect()
    stage.say(session, "What are admission requirements?", final=True)
    await asyncio.sleep(0.03)
    ended = stage.end(session)
    ready = await stage.link.until("response_ready")
    assert ready.at - ended == pytest.approx(0.050 + 0.100 + 0.015 + 0.075, abs=1e-3)
    assert ready.message["latency_breakdown"]["saved_ms"] == pytest.approx(30, abs=0.1)


@staged
async def test_another_text_is_dropped_and_asked_again() -> None:
    stage = Stage(speculation="on")
    session = await stage.connect()
    stage.say(session, "what are", final=False)
    await asyncio.sleep(0.3)
    stage.say(session, "what are admission requirements", final=False)
    ended = stage.end(session)
    ready = await stage.link.until("response_ready")
    assert ready.at - ended == pytest.approx(0.270, abs=1e-3)
    assert [text for _, text in stage.rag.seen.started] == ["what are", "what are admission requirements"]
    assert "saved_ms" not in ready.message["latency_breakdown"]
    assert stage.observer.speculations == ["dropped"]


@staged
async def test_a_failed_guess_is_asked_again() -> None:
    stage = Stage(speculation="on")
    stage.rag.delay_ms = 1000
    session = await stage.connect()
    stage.say(session, "what are admission requirements", final=False)
    await asyncio.sleep(0.5)
    stage.rag.delay_ms = 80
    stage.end(session)
    done = (await stage.link.until("turn_complete")).message
    assert done["degraded"] == []


@staged
async def test_only_one_question_is_in_flight() -> None:
    stage = Stage(speculation="on")
    stage.rag.delay_ms = stage.intent.delay_ms = 95
    session = await stage.connect()
    words = ["what", "are", "the", "admission", "requirements", "for", "students", "from", "abroad", "please"]
    for end in range(1, len(words) + 1):
        stage.say(session, " ".join(words[:end]), final=False)
        for _ in range(17):
            await asyncio.sleep(0.01)
            assert stage.rag.seen.open <= 1
    session.detach(stage.link)
    await asyncio.sleep(0.01)
    assert stage.rag.seen.open == 0


@staged
async def test_load_sheds_speculation_first() -> None:
    stage = Stage(speculation="on")
    stage.sessions.shed(True)
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("response_ready")
    assert stage.observer.speculations == ["shed"]
    assert len(stage.rag.seen.started) == 1


@staged
async def test_early_calls_have_keys_of_their_own() -> None:
    stage = Stage(speculation="on")
    session = await stage.connect()
    for text in ("what are", "what are admission", "what are admission requirements"):
        stage.say(session, text, final=False)
        await asyncio.sleep(0.3)
    stages = [call.stage for call in stage.rag.seen.calls]
    assert stages == ["rag-early-1", "rag-early-2", "rag-early-3"]


texts = st.sampled_from(["what", "what are", "what are admission", "What are admission?", "and", "for me please"])
steps = st.lists(st.tuples(texts, st.booleans(), st.sampled_from([0.0, 0.02, 0.07, 0.2])), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_no_result_ever_reaches_a_turn_with_another_text(path: list[tuple[str, bool, float]]) -> None:
    async def run() -> None:
        from orchestrator.core.transcript import normalise

        stage = Stage(speculation="on")
        session = await stage.connect()
        query = stage.rag.query

        async def echo(text, call):  # type: ignore[no-untyped-def]
            found = await query(text, call)
            return type(found)(found.answer, (f"about {text}",), found.confidence)

        stage.rag.query = echo  # type: ignore[method-assign]
        for text, final, pause in path:
            stage.say(session, text, final)
            await asyncio.sleep(pause)
        stage.end(session)
        await stage.link.until("response_ready")
        system, question = stage.llm.messages[-1][0]["content"], stage.llm.messages[-1][-1]["content"]
        about = system.rpartition("[1] about ")[2]
        assert normalise(about) == normalise(question)

    on_virtual_time(run)


def llm_stage() -> Stage:
    return Stage(speculation="llm")


@staged
async def test_with_llm_the_whole_answer_waits_for_the_end_of_speech() -> None:
    stage = llm_stage()
    session = await stage.connect()
    stage.say(session, "What are admission requirements?")
    await asyncio.sleep(1.0)
    assert stage.link.kinds == ["connected"]
    assert len(stage.tts.seen.started) == 1
    ended = stage.end(session)
    ready = await stage.link.until("response_ready")
    assert ready.at - ended < 0.001
    breakdown = ready.message["latency_breakdown"]
    assert breakdown["saved_ms"] == pytest.approx(270, abs=0.5)
    assert breakdown["total_ms"] == pytest.approx(0, abs=0.5)
    await stage.link.until("turn_complete")
    assert stage.link.audio_ms() == 3000
    assert stage.observer.speculations == ["adopted"]
    assert len(stage.llm.seen.started) == 1


@staged
async def test_with_llm_a_turn_under_way_is_adopted() -> None:
    stage = llm_stage()
    session = await stage.connect()
    stage.say(session, "What are admission requirements?")
    await asyncio.sleep(0.12)
    ended = stage.end(session)
    ready = await stage.link.until("response_ready")
    assert ready.at - ended == pytest.approx(0.150, abs=1e-3)
    assert ready.message["latency_breakdown"]["saved_ms"] == pytest.approx(120, abs=0.5)
    assert ready.message["latency_breakdown"]["overhead_ms"] == pytest.approx(0, abs=0.1)


@staged
async def test_with_llm_more_speech_cancels_the_guess() -> None:
    stage = llm_stage()
    session = await stage.connect()
    stage.say(session, "What are admission requirements?")
    await asyncio.sleep(0.2)
    stage.say(session, "For students from abroad.")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert stage.llm.seen.aborted == 1
    await asyncio.sleep(0.5)
    stage.end(session)
    await stage.link.until("response_ready")
    assert stage.llm.messages[-1][-1]["content"] == "What are admission requirements? For students from abroad."
    assert stage.observer.speculations == ["dropped", "adopted"]
    assert stage.link.messages("response_ready")[0]["turn_number"] == 1


@staged
async def test_with_llm_a_guess_that_failed_is_asked_again() -> None:
    stage = llm_stage()
    stage.llm.fails = Failure.STATUS
    session = await stage.connect()
    stage.say(session, "What are admission requirements?")
    await asyncio.sleep(0.5)
    stage.llm.fails = None
    stage.end(session)
    done = (await stage.link.until("turn_complete")).message
    assert done["degraded"] == []
    assert done["text"].startswith("You need a diploma.")


@staged
async def test_with_llm_a_disconnect_leaves_nothing_behind() -> None:
    for wait in (0.0, 0.05, 0.12, 0.2, 0.3, 1.0):
        stage = llm_stage()
        session = await stage.connect()
        stage.say(session, "What are admission requirements?")
        await asyncio.sleep(wait)
        session.detach(stage.link)
        await asyncio.sleep(0.01)
        for service in (stage.intent, stage.rag, stage.llm, stage.tts):
            assert service.seen.open == 0, (wait, service.service)
        await stage.sessions.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


@staged
async def test_with_llm_a_prepared_answer_is_not_held_for_ever() -> None:
    stage = llm_stage()
    session = await stage.connect()
    stage.say(session, "What are admission requirements?")
    await asyncio.sleep(5)
    assert stage.tts.seen.open == 0
    ended = stage.end(session)
    ready = await stage.link.until("response_ready")
    assert ready.at - ended == pytest.approx(0.100 + 0.015 + 0.075, abs=1e-3)
    assert len(stage.rag.seen.started) == 1


@staged
async def test_rag_retrieves_early_for_partials_and_is_asked_once_for_the_turn() -> None:
    stage = Stage(speculation="on", rag_incremental=True)
    session = await stage.connect()
    for text in ("what are", "what are admission requirements"):
        stage.say(session, text, final=False)
        await asyncio.sleep(0.3)
    assert stage.rag.early == ["what are", "what are admission requirements"]
    assert stage.rag.seen.started == []
    ended = stage.end(session)
    ready = await stage.link.until("response_ready")
    assert [text for _, text in stage.rag.seen.started] == ["what are admission requirements"]
    assert len(stage.intent.seen.started) == 2
    assert ready.at - ended == pytest.approx(0.270, abs=1e-3)
    assert "saved_ms" not in ready.message["latency_breakdown"]
    assert "Passages" in stage.llm.messages[0][0]["content"]


@staged
async def test_a_final_fragment_asks_rag_in_earnest_also_with_the_early_endpoint() -> None:
    stage = Stage(speculation="on", rag_incremental=True)
    session = await stage.connect()
    stage.say(session, "what are admission requirements", final=False)
    await asyncio.sleep(0.3)
    stage.say(session, "What are admission requirements?", final=True)
    await asyncio.sleep(0.1)
    ended = stage.end(session)
    ready = await stage.link.until("response_ready")
    assert ready.at - ended == pytest.approx(0.190, abs=1e-3)
    assert len(stage.rag.seen.started) == len(stage.intent.seen.started) == 1


@staged
async def test_without_an_llm_the_early_endpoint_streams_the_answer() -> None:
    stage = Stage(speculation="on", rag_incremental=True)
    stage.runtime.services = Services(stage.intent, stage.rag, None, None, stage.tts)
    session = await stage.connect()
    stage.say(session, "what are admission requirements", final=False)
    await asyncio.sleep(0.3)
    stage.end(session)
    await stage.link.until("turn_complete")
    assert stage.rag.early == ["what are admission requirements"]
    assert stage.rag.incremental == ["what are admission requirements"]
