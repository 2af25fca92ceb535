"""The pacing wheel: every callback within one tick of its time, whatever the others do."""

from __future__ import annotations

import asyncio

import looptime
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.conversation.pacing import TICK_SECONDS, PacingWheel

MILLISECONDS = st.integers(1, 500)


def _run(seconds: float, loop: asyncio.AbstractEventLoop) -> None:
    loop.run_until_complete(asyncio.sleep(seconds))


@given(
    started=st.lists(st.tuples(MILLISECONDS, MILLISECONDS, st.integers(0, 5)), min_size=1, max_size=12),
)
def test_everyone_is_called_in_time_however_many_call_again(started: list[tuple[int, int, int]]) -> None:
    """Sessions of (first delay, spacing, calls after the first), in ms; each call puts the next one on the wheel."""
    loop = looptime.new_event_loop(start=1000.0)
    wheel = PacingWheel(loop)
    lateness: list[float] = []

    def begin(at: float, spacing: int, left: int) -> None:
        def called() -> None:
            lateness.append(loop.time() - at)
            if left:
                begin(at + spacing / 1000, spacing, left - 1)

        wheel.at(at, called)

    for first, spacing, more in started:
        begin(loop.time() + first / 1000, spacing, more)
    _run(5.0, loop)
    loop.close()
    assert len(lateness) == sum(more + 1 for _, _, more in started)
    assert min(lateness) >= -1e-6
    assert max(lateness) <= TICK_SECONDS + 1e-6


def test_a_callback_that_fails_stops_nobody_else() -> None:
    loop = looptime.new_event_loop(start=1000.0)
    told: list[str] = []
    loop.set_exception_handler(lambda _, context: told.append(context["message"]))
    wheel = PacingWheel(loop)
    called: list[str] = []

    def fails() -> None:
        raise ValueError

    wheel.at(1000.01, fails)
    wheel.at(1000.01, lambda: called.append("same tick"))
    wheel.at(1000.05, lambda: called.append("later"))
    _run(0.1, loop)
    loop.close()
    assert told == ["a paced callback failed"]
    assert called == ["same tick", "later"]


def test_what_was_cancelled_or_closed_is_not_called() -> None:
    loop = looptime.new_event_loop(start=1000.0)
    wheel = PacingWheel(loop)
    called: list[str] = []
    due = wheel.at(1000.01, lambda: called.append("cancelled"))
    due.cancel()
    due.cancel()
    wheel.at(1000.02, lambda: called.append("kept"))
    _run(0.03, loop)
    wheel.at(1000.05, lambda: called.append("closed"))
    wheel.close()
    _run(0.1, loop)
    loop.close()
    assert called == ["kept"]
