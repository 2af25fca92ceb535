"""The ledger's arithmetic: overhead is what no downstream wait explains."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.budget import Ledger


def played(
    start: float,
    intent: float,
    rag: float,
    llm: float,
    clause: float,
    tts: float,
    own: float,
    stt_ms: float | None = None,
) -> Ledger:
    """A turn whose stages take the given seconds and that spends `own` seconds between each two of them."""
    ledger = Ledger(start, 445.0, 850.0, stt_ms)
    at = start + own
    ledger.begin("intent", at)
    ledger.begin("rag", at)
    ledger.end("intent", at + intent)
    ledger.end("rag", at + rag)
    at += max(intent, rag) + own
    ledger.begin("llm_first_token", at)
    ledger.begin("first_clause", at)
    ledger.end("llm_first_token", at + llm)
    at += llm + clause
    ledger.end("first_clause", at)
    ledger.answerable(at)
    at += own
    ledger.begin("tts_first_chunk", at)
    ledger.end("tts_first_chunk", at + tts)
    ledger.first_audio(at + tts + own)
    return ledger


def test_a_turn_at_the_stage_targets() -> None:
    breakdown = played(10.0, 0.05, 0.08, 0.1, 0.02, 0.075, 0.001).breakdown(99.0)
    assert breakdown["intent_ms"] == pytest.approx(50)
    assert breakdown["rag_ms"] == pytest.approx(80)
    assert breakdown["intent_rag_ms"] == pytest.approx(80)
    assert breakdown["llm_first_token_ms"] == pytest.approx(100)
    assert breakdown["first_clause_ms"] == pytest.approx(120)
    assert breakdown["tts_first_chunk_ms"] == pytest.approx(75)
    assert breakdown["overhead_ms"] == pytest.approx(4)
    assert breakdown["total_ms"] == pytest.approx(279)
    assert breakdown["within_budget"] is True
    assert "budget_broken_by" not in breakdown


@pytest.mark.parametrize(
    ("times", "stage"),
    [
        ((0.5, 0.08, 0.1, 0.0, 0.07, 0.001), "intent_rag"),
        ((0.05, 0.08, 0.5, 0.0, 0.07, 0.001), "first_clause"),
        ((0.05, 0.08, 0.1, 0.0, 0.5, 0.001), "tts_first_chunk"),
        ((0.05, 0.08, 0.1, 0.0, 0.07, 0.2), "overhead"),
    ],
)
def test_the_stage_that_broke_the_budget_is_named(times: tuple[float, ...], stage: str) -> None:
    breakdown = played(0.0, *times).breakdown(9.0)
    assert breakdown["within_budget"] is False
    assert breakdown["budget_broken_by"] == stage


def test_stt_counts_where_it_is_known() -> None:
    breakdown = played(0.0, 0.05, 0.08, 0.1, 0.0, 0.075, 0.0, stt_ms=300.0).breakdown(9.0)
    assert breakdown["stt_ms"] == 300.0
    assert breakdown["total_ms"] == pytest.approx(555)
    assert breakdown["budget_broken_by"] == "stt"


def test_what_was_waited_for_before_the_end_of_speech_is_free() -> None:
    ledger = Ledger(10.0, 445.0, 850.0)
    ledger.begin("intent", 9.9)
    ledger.end("intent", 9.95)
    ledger.begin("rag", 9.9)
    ledger.end("rag", 10.02)
    ledger.first_audio(10.03)
    breakdown = ledger.breakdown(11.0)
    assert breakdown["intent_ms"] == 0.0
    assert breakdown["intent_rag_ms"] == pytest.approx(20)
    assert breakdown["overhead_ms"] == pytest.approx(10)


def test_a_turn_that_never_got_anywhere() -> None:
    breakdown = Ledger(10.0, 445.0, 850.0).breakdown(10.5)
    assert breakdown["total_ms"] == pytest.approx(500)
    assert "intent_ms" not in breakdown


def test_the_deadline_is_spent_down() -> None:
    ledger = Ledger(10.0, 445.0, 650.0)
    assert ledger.left_ms(300.0, 10.1) == 300.0
    assert ledger.left_ms(300.0, 10.5) == pytest.approx(150.0)
    assert ledger.left_ms(300.0, 12.0) == 1.0


@pytest.mark.parametrize(("rag_answers", "stage"), [(False, "llm_first_token"), (True, "rag")])
def test_a_slow_writer_is_still_spoken(rag_answers: bool, stage: str) -> None:
    ledger = Ledger(10.0, 445.0, 650.0)
    ledger.rag_answers = rag_answers
    ledger.begin(stage, 10.1)
    ledger.end(stage, 10.35)
    ledger.answerable(10.95)
    ledger.answerable(11.5)
    assert ledger.left_ms(200.0, 10.95) == 200.0
    assert ledger.left_ms(500.0, 10.95) == pytest.approx(300.0)


seconds = st.floats(0.0, 2.0, allow_nan=False)


@given(seconds, seconds, seconds, seconds, seconds, seconds)
def test_overhead_is_our_own_time_whatever_the_stages_take(
    intent: float, rag: float, llm: float, clause: float, tts: float, own: float
) -> None:
    breakdown = played(100.0, intent, rag, llm, clause, tts, own).breakdown(1000.0)
    assert breakdown["overhead_ms"] == pytest.approx(own * 4000.0, abs=0.01)
    assert breakdown["total_ms"] == pytest.approx((max(intent, rag) + llm + clause + tts + own * 4) * 1000, abs=0.01)
