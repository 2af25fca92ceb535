"""The pure policies, as tables of events and what must come of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.resilience import (
    Breaker,
    BreakerPolicy,
    ExtraBudget,
    Permit,
    RollingQuantile,
    hedge_after,
    may_retry,
)

POLICY = BreakerPolicy(consecutive=3, failures=4, share=0.5, window=10.0, pause=1.0, longest_pause=4.0)

# A row is a script of "what at when": + a success, - a failure, / a call without a verdict; then the state after it.
CLOSED_ROWS = [
    ("", "closed"),
    ("-0 -1", "closed"),
    ("-0 -1 -2", "open"),
    ("-0 -1 +2 -3", "closed"),
    ("-0 -1 +2 -3 -4", "open"),
    ("-0 -1 /2 -3", "open"),
    ("-0 -30 -60", "open"),
    ("-0 +1 -2 +3 -4 +5 -5.5", "open"),
    ("-0 +1 -2 +3 -4 +5 +5.2 +5.4 -5.5", "closed"),
    ("+0 +1 +2 +3 -4 -4.1 +4.2 -4.3 -4.4", "closed"),
    ("-0 +1 -2 +3 -4 +5 -40", "closed"),
    ("-0 +0 -0 +0 -0 +0 -11", "closed"),
    ("/0 /0 /0 /0", "closed"),
]


@pytest.mark.parametrize(("script", "state"), CLOSED_ROWS)
def test_when_a_closed_breaker_opens(script: str, state: str) -> None:
    breaker = Breaker(POLICY)
    for step in script.split():
        at = float(step[1:])
        permit = breaker.admit(at)
        assert permit is Permit.NORMAL
        report(breaker, step[0], permit, at)
    assert breaker.state.value == state


def report(breaker: Breaker, verdict: str, permit: Permit, at: float) -> None:
    if verdict == "+":
        breaker.succeed(permit, at)
    elif verdict == "-":
        breaker.fail(permit, at)
    else:
        breaker.release(permit)


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker(POLICY)
    for _ in range(3):
        breaker.fail(breaker.admit(at), at)
    assert breaker.state.name == "OPEN"
    return breaker


def test_an_open_breaker_refuses_until_its_pause_is_over_then_lets_one_through() -> None:
    breaker = opened()
    assert breaker.admit(0.999) is Permit.REFUSED
    assert breaker.admit(1.0) is Permit.PROBE
    assert breaker.state.name == "HALF_OPEN"
    assert breaker.admit(1.0) is Permit.REFUSED
    assert breaker.admit(100.0) is Permit.REFUSED


def test_a_good_probe_closes_and_forgets() -> None:
    breaker = opened()
    breaker.succeed(breaker.admit(1.0), 1.1)
    assert breaker.state.name == "CLOSED"
    for _ in range(2):
        breaker.fail(breaker.admit(1.2), 1.2)
    assert breaker.state.name == "CLOSED"


def test_bad_probes_double_the_pause_up_to_its_limit() -> None:
    breaker = opened()
    at = 1.0
    for pause in (2.0, 4.0, 4.0):
        breaker.fail(breaker.admit(at), at)
        assert breaker.admit(at + pause - 0.001) is Permit.REFUSED
        at += pause
    breaker.succeed(breaker.admit(at), at)
    for _ in range(3):
        breaker.fail(breaker.admit(at), at)
    assert breaker.admit(at + 1.0) is Permit.PROBE


def test_a_probe_without_a_verdict_leaves_its_place_to_the_next() -> None:
    breaker = opened()
    breaker.release(breaker.admit(1.0))
    assert breaker.state.name == "HALF_OPEN"
    assert breaker.admit(1.0) is Permit.PROBE


@pytest.mark.parametrize("verdict", ["+", "-", "/"])
def test_calls_from_before_the_opening_change_nothing(verdict: str) -> None:
    breaker = Breaker(POLICY)
    early = breaker.admit(0.0)
    for _ in range(3):
        breaker.fail(breaker.admit(0.0), 0.0)
    report(breaker, verdict, early, 0.5)
    assert breaker.state.name == "OPEN"
    assert breaker.admit(0.999) is Permit.REFUSED
    probe = breaker.admit(1.0)
    report(breaker, verdict, early, 1.0)
    assert breaker.state.name == "HALF_OPEN"
    assert breaker.admit(1.0) is Permit.REFUSED
    breaker.succeed(probe, 1.0)
    assert breaker.state.name == "CLOSED"


@given(st.lists(st.tuples(st.sampled_from("+-/"), st.floats(0.0, 3.0)), max_size=60))
def test_whatever_happens_a_breaker_lets_a_call_through_in_the_end(events: list[tuple[str, float]]) -> None:
    breaker = Breaker(POLICY)
    at = 0.0
    for verdict, later in events:
        at += later
        permit = breaker.admit(at)
        if permit is not Permit.REFUSED:
            report(breaker, verdict, permit, at)
    assert breaker.admit(at + POLICY.longest_pause) is not Permit.REFUSED


def test_a_quantile_is_unknown_until_there_are_enough_values() -> None:
    quantile = RollingQuantile(0.95, size=100, refresh=10, least=20)
    for value in range(19):
        quantile.add(float(value))
    assert quantile.value is None
    quantile.add(19.0)
    assert quantile.value == 19.0


def test_a_quantile_follows_the_last_values_only() -> None:
    quantile = RollingQuantile(0.95, size=100, refresh=10, least=20)
    for _ in range(100):
        quantile.add(1.0)
    for value in range(100):
        quantile.add(float(value))
    assert quantile.value == 95.0


@given(st.lists(st.floats(0, 10), min_size=40, max_size=400))
def test_a_quantile_is_one_of_its_values_with_the_right_share_below(values: list[float]) -> None:
    quantile = RollingQuantile(0.95, size=64, refresh=1, least=20)
    for value in values:
        quantile.add(value)
    kept = values[-64:]
    assert quantile.value in kept
    assert sum(value <= quantile.value for value in kept) >= 0.95 * len(kept)


def test_extra_requests_stay_within_their_share() -> None:
    budget = ExtraBudget(share=0.05, most=10.0, start=1.0)
    spent = 0
    for _ in range(10_000):
        budget.earn()
        spent += budget.spend()
    assert 495 <= spent <= 502


def test_saved_extra_requests_have_a_limit() -> None:
    budget = ExtraBudget(share=0.05, most=10.0, start=1.0)
    for _ in range(10_000):
        budget.earn()
    assert [budget.spend() for _ in range(11)] == [True] * 10 + [False]


@pytest.mark.parametrize(
    ("p95", "left", "after"),
    [
        (None, 0.1, None),
        (0.05, 0.1, 0.055),
        (0.06, 0.1, 0.066),
        (0.07, 0.1, None),
        (0.2, 0.1, None),
        (0.05, 0.0, None),
        (0.0, 0.1, 0.005),
        (0.001, 0.1, 0.005),
        (0.001, 0.005, None),
    ],
)
def test_when_a_second_request_is_worth_sending(p95: float | None, left: float, after: float | None) -> None:
    assert hedge_after(p95, left) == (after if after is None else pytest.approx(after))


@pytest.mark.parametrize(
    ("typical", "left", "may"),
    [(None, 0.01, True), (None, 0.0, False), (None, -1.0, False), (0.05, 0.06, True), (0.05, 0.05, False)],
)
def test_when_a_failed_request_may_be_repeated(typical: float | None, left: float, may: bool) -> None:
    assert may_retry(typical, left) is may
