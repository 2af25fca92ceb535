from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.client import Turn
from bench.delays import Delay
from bench.fake_config import FakeConfig
from bench.gate import Side, compare, suspect
from bench.ideal import first_clause_tokens, ideal_ms, spoken_clauses, waits_ms
from bench.measure import Spread, encoded, histogram, quantile
from bench.pauses import Pauses


def test_fixed_delay_is_always_the_same() -> None:
    delay = Delay.parse("fixed:50")
    assert {delay.draw_s(random.Random(seed)) for seed in range(10)} == {0.05}
    assert Delay.parse("50") == delay


def test_lognormal_delay_has_the_quantiles_asked_for() -> None:
    delay = Delay.parse("lognormal:80,300")
    rng = random.Random(3)
    drawn = [delay.draw_s(rng) * 1000 for _ in range(20_000)]
    assert quantile(drawn, 0.5) == pytest.approx(80, rel=0.03)
    assert quantile(drawn, 0.99) == pytest.approx(300, rel=0.08)


@pytest.mark.parametrize("text", ["", "x", "fixed:", "fixed:1,2", "lognormal:80", "lognormal:300,80", "-1", "foo:3"])
def test_bad_delay_says_what_is_accepted(text: str) -> None:
    with pytest.raises(ValueError, match=r"accepted|needs 0 < p50 < p99"):
        Delay.parse(text)


def test_delay_reads_back_what_it_prints() -> None:
    for delay in (Delay.fixed(12.5), Delay.lognormal(80, 300)):
        assert Delay.parse(str(delay)) == delay


def test_default_answer_is_forty_tokens_in_four_sentences() -> None:
    config = FakeConfig()
    assert len(config.tokens) == 40
    assert [len(sentence.split()) for sentence in config.sentences] == [10, 10, 10, 10]
    assert "".join(config.tokens) == " ".join(config.sentences)


def test_ideal_is_the_slower_of_intent_and_rag_then_llm_then_tts() -> None:
    config = FakeConfig()
    early = spoken_clauses(config)[0]
    assert first_clause_tokens(config, early) == 8
    assert ideal_ms(config, early, speculated=False) == pytest.approx(80 + 100 + 7 * 5 + 75)
    assert ideal_ms(config, config.sentences[0], speculated=False) == pytest.approx(80 + 100 + 9 * 5 + 75)
    assert ideal_ms(config, early, speculated=True) == pytest.approx(100 + 7 * 5 + 75)


def _turn(first_audio: float) -> Turn:
    return Turn(10.0, first_audio=first_audio, first_clause=spoken_clauses(FakeConfig())[0])


def test_waits_are_the_critical_path_from_the_services_logs() -> None:
    rows = [
        ("intent", "s/1", 10.001, 10.051, 10.051),
        ("rag", "s/1", 10.001, 10.081, 10.081),
        ("llm", "s/1", 10.082, 10.182, 10.4),
        ("tts", "s/1", 10.218, 10.293, 10.294),
        ("tts", "s/1", 10.5, 10.575, 10.576),
    ]
    assert waits_ms(FakeConfig(), _turn(10.294), rows) == pytest.approx(80 + 135 + 75)


def test_waits_before_the_end_of_speech_and_of_losing_hedges_do_not_count() -> None:
    rows = [
        ("intent", "s/1", 9.8, 9.85, 9.85),
        ("rag", "s/1", 9.95, 10.03, 10.03),
        ("rag", "s/1", 10.0, 10.5, 10.5),
        ("llm", "s/1", 10.031, 10.131, 10.4),
        ("tts", "s/1", 10.166, 10.241, 10.3),
    ]
    # The hedge that lost runs on, but only until the LLM was asked.
    assert waits_ms(FakeConfig(), _turn(10.242), rows) == pytest.approx(31 + 135 + 75)


@given(st.lists(st.floats(0.001, 50_000), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_quantile_is_a_value_with_enough_values_at_or_under_it(values: list[float], q: float) -> None:
    found = quantile(values, q)
    assert found in values
    assert sum(value <= found for value in values) >= math.ceil(q * len(values))


def test_histogram_keeps_three_digits_beyond_a_hundred_milliseconds() -> None:
    values = [123.456, 234.567, 345.678]
    result = histogram(values)
    assert result.get_value_at_percentile(50) / 1000 == pytest.approx(234.567, rel=1e-3)
    assert encoded(values).startswith("HIST")


def test_spread_ignores_windows_without_a_figure_for_its_median() -> None:
    assert Spread((3.0, float("nan"), 1.0)).median == 2.0
    assert Spread((1.0, 2.0, 6.0)).text(1) == "2.0 [1.0–6.0]"
    assert Spread((float("nan"),)).text() == "–"


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.2] * 8, True),
        ([1.2] * 7 + [0.9], True),
        ([1.2] * 6 + [0.9] * 2, False),
        ([1.08] * 8, False),
        ([1.0] * 4 + [3.0] * 4, False),
        ([1.2, 1.2], False),
    ],
)
def test_only_a_shift_of_nearly_every_pair_is_suspect(ratios: list[float], expected: bool) -> None:
    assert suspect(ratios) is expected


def test_gate_interleaves_and_measures_a_suspect_again() -> None:
    rng = random.Random(5)
    asked: list[str] = []

    def measure(side: Side) -> dict[str, float]:
        asked.append(side.name)
        slow = 1.2 if side.name == "new" else 1.0
        return {"slower": 100 * slow * rng.uniform(1, 1.03), "same": 100 * rng.uniform(1, 1.03)}

    old, new = Side("old", Path()), Side("new", Path())
    verdicts = {verdict.figure: verdict for verdict in compare(measure, old, new, 6, "test")}
    assert asked[:4] == ["old", "new", "new", "old"]
    assert verdicts["slower"].failed
    assert verdicts["slower"].again
    assert not verdicts["same"].failed
    assert not verdicts["same"].again


def test_gate_forgives_what_it_cannot_see_twice() -> None:
    count = 0

    def measure(side: Side) -> dict[str, float]:
        nonlocal count
        count += 1
        unlucky = side.name == "new" and count <= 12
        return {"figure": 130.0 if unlucky else 100.0}

    verdict = compare(measure, Side("old", Path()), Side("new", Path()), 6, "test")[0]
    assert suspect(verdict.first)
    assert verdict.again
    assert not verdict.failed


def test_pauses_are_read_from_the_servers_own_histogram() -> None:
    page = """# HELP orchestrator_gc_pause_seconds How long
orchestrator_gc_pause_seconds_sum {sum}
orchestrator_gc_pause_seconds_bucket{{le="0.001"}} {one}
orchestrator_gc_pause_seconds_bucket{{le="0.005"}} {five}
orchestrator_gc_pause_seconds_bucket{{le="+Inf"}} {all}
orchestrator_gc_pause_seconds_count {all}
"""
    before = Pauses.parse(page.format(sum=0.02, one=3.0, five=4.0, all=5.0))
    seen = Pauses.parse(page.format(sum=0.03, one=9.0, five=12.0, all=13.0)).since(before)
    assert seen.counts == {1.0: 6, 5.0: 2, math.inf: 0}
    assert (seen.number, seen.longest_ms) == (8, 5.0)
    assert seen.total_ms == pytest.approx(10.0)
    assert before.longest_ms == math.inf
    with pytest.raises(ValueError, match="no histogram"):
        Pauses.parse("orchestrator_turns_total 3.0")
