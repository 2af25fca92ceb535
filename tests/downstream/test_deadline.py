"""Deadlines on virtual time: when they expire, what they count, and whose cancellation is whose."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.downstream.deadline import Deadline
from orchestrator.errors import DownstreamError, Failure
from tests.loops import virtual


def now() -> float:
    return asyncio.get_running_loop().time()


def a_deadline(timeout: float, stall: float = 0.0) -> Deadline:
    return Deadline(asyncio.get_running_loop(), "llm", timeout, stall)


async def never() -> None:
    await asyncio.get_running_loop().create_future()


@virtual
async def test_waiting_longer_than_the_timeout_becomes_a_timeout() -> None:
    deadline = a_deadline(0.3)
    began = now()
    with pytest.raises(DownstreamError) as caught, deadline:
        await never()
    deadline.close()
    assert caught.value.failure is Failure.TIMEOUT
    assert caught.value.service == "llm"
    assert now() - began == pytest.approx(0.3, abs=1e-3)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@virtual
async def test_an_answer_in_time_passes() -> None:
    deadline = a_deadline(0.3)
    with deadline:
        await asyncio.sleep(0.299)
    deadline.close()
    await asyncio.sleep(1)


@virtual
async def test_the_timeout_spans_several_waits() -> None:
    deadline = a_deadline(0.3)
    began = now()
    with pytest.raises(DownstreamError) as caught:
        for _ in range(10):
            with deadline:
                await asyncio.sleep(0.07)
    deadline.close()
    assert caught.value.failure is Failure.TIMEOUT
    assert now() - began == pytest.approx(0.3, abs=1e-3)


@virtual
async def test_after_progress_only_silence_counts() -> None:
    deadline = a_deadline(0.3, stall=1.0)
    for _ in range(5):
        with deadline:
            await asyncio.sleep(0.25 if deadline.remaining < 0.5 else 0.9)
        deadline.progress()
    began = now()
    with pytest.raises(DownstreamError) as caught, deadline:
        await never()
    deadline.close()
    assert caught.value.failure is Failure.STALLED
    assert now() - began == pytest.approx(1.0, abs=1e-3)


@virtual
async def test_a_stall_shorter_than_what_was_left_of_the_timeout() -> None:
    deadline = a_deadline(10.0, stall=0.2)
    with deadline:
        await asyncio.sleep(0.1)
    deadline.progress()
    began = now()
    with pytest.raises(DownstreamError) as caught, deadline:
        await never()
    deadline.close()
    assert caught.value.failure is Failure.STALLED
    assert now() - began == pytest.approx(0.2, abs=1e-3)


@virtual
async def test_waits_without_progress_share_one_stall_limit() -> None:
    deadline = a_deadline(1.0, stall=1.0)
    deadline.progress()
    began = now()
    with pytest.raises(DownstreamError) as caught:
        while True:
            with deadline:
                await asyncio.sleep(0.3)
    deadline.close()
    assert caught.value.failure is Failure.STALLED
    assert now() - began == pytest.approx(1.0, abs=1e-3)


@virtual
async def test_time_spent_by_the_consumer_expires_nothing() -> None:
    deadline = a_deadline(0.3, stall=0.2)
    with deadline:
        await asyncio.sleep(0.1)
    deadline.progress()
    await asyncio.sleep(60)
    with deadline:
        await asyncio.sleep(0.19)
    deadline.close()


@virtual
async def test_no_time_left_is_known_before_anything_is_sent() -> None:
    for timeout in (0.0, -1.0):
        deadline = a_deadline(timeout)
        with pytest.raises(DownstreamError) as caught, deadline:
            raise AssertionError("entered")
        deadline.close()
        assert caught.value.failure is Failure.TIMEOUT


@virtual
async def test_a_foreign_cancellation_passes_through() -> None:
    async def work() -> None:
        deadline = a_deadline(1.0)
        try:
            with deadline:
                await never()
        finally:
            deadline.close()

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@pytest.mark.parametrize("first", ["deadline", "foreign"])
def test_a_foreign_cancellation_in_the_same_moment_is_not_swallowed(first: str) -> None:
    @virtual
    async def run() -> None:
        async def work() -> None:
            deadline = a_deadline(1.0)
            try:
                with deadline:
                    await never()
            finally:
                deadline.close()

        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []
        if first == "foreign":
            loop.call_at(now() + 1.0, lambda: tasks[0].cancel())
        tasks.append(asyncio.ensure_future(work()))
        if first == "deadline":
            await asyncio.sleep(0)
            loop.call_at(now() + 1.0, lambda: tasks[0].cancel())
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    run()


@virtual
async def test_inside_a_timeout_of_asyncio_each_keeps_its_own() -> None:
    deadline = a_deadline(1.0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            with deadline:
                await never()
    deadline.close()
    deadline = a_deadline(0.5)
    with pytest.raises(DownstreamError):
        async with asyncio.timeout(1.0):
            with deadline:
                await never()
    deadline.close()


@virtual
async def test_nested_deadlines_blame_the_one_that_expired() -> None:
    outer, inner = a_deadline(0.2), Deadline(asyncio.get_running_loop(), "tts", 0.5)
    with pytest.raises(DownstreamError) as caught, outer, inner:
        await never()
    assert caught.value.service == "llm"
    outer.close()
    inner.close()


@virtual
async def test_an_error_on_the_way_out_of_an_expired_wait_is_the_timeout() -> None:
    deadline = a_deadline(0.2)
    with pytest.raises(DownstreamError) as caught, deadline:
        try:
            await never()
        except asyncio.CancelledError:
            raise OSError("closed while giving up") from None
    deadline.close()
    assert caught.value.failure is Failure.TIMEOUT
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@virtual
async def test_other_errors_pass_untouched() -> None:
    deadline = a_deadline(0.2)
    with pytest.raises(ZeroDivisionError), deadline:
        raise ZeroDivisionError
    deadline.close()


@virtual
async def test_an_answer_in_the_tick_of_the_expiry_leaves_the_task_uncancelled() -> None:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[None] = loop.create_future()
    loop.call_at(now() + 0.2, answer.set_result, None)
    deadline = a_deadline(0.2)
    with pytest.raises(DownstreamError), deadline:
        await answer
    deadline.close()
    await asyncio.sleep(1)


@virtual
async def test_a_whole_stream_arms_few_timers() -> None:
    loop = asyncio.get_running_loop()
    with mock.patch.object(loop, "call_at", wraps=loop.call_at) as armed:
        deadline = a_deadline(0.3, stall=1.0)
        for _ in range(40):
            answer: asyncio.Future[None] = loop.create_future()
            loop.call_soon(answer.set_result, None)
            with deadline:
                await answer
            deadline.progress()
        deadline.close()
    assert armed.call_count == 1


@virtual
async def test_close_leaves_no_timer() -> None:
    loop = asyncio.get_running_loop()
    deadline = a_deadline(5.0)
    with deadline:
        await asyncio.sleep(0)
    deadline.close()
    scheduled: list[asyncio.TimerHandle] = loop._scheduled  # type: ignore[attr-defined]
    assert [timer for timer in scheduled if not timer.cancelled()] == []


@given(
    timeout=st.integers(1, 50),
    stall=st.integers(1, 50),
    pieces=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8),
)
def test_any_stream_expires_when_the_rule_says(timeout: int, stall: int, pieces: list[tuple[int, int]]) -> None:
    """Pieces take (service, consumer) hundredths of a second each; equal times are left out, either may come first."""
    expected: tuple[int, Failure, int] | None = None
    at = 0
    for index, (service, consumer) in enumerate(pieces):
        limit = timeout if index == 0 else stall
        if service == limit:
            return
        if service > limit:
            expected = (index, Failure.TIMEOUT if index == 0 else Failure.STALLED, at + limit)
            break
        at += service + consumer

    @virtual
    async def run() -> None:
        began = now()
        deadline = a_deadline(timeout / 100, stall / 100)
        result: Any = None
        for index, (service, consumer) in enumerate(pieces):
            try:
                with deadline:
                    await asyncio.sleep(service / 100)
            except DownstreamError as error:
                result = (index, error.failure, round((now() - began) * 100))
                break
            deadline.progress()
            await asyncio.sleep(consumer / 100)
        deadline.close()
        assert result == expected

    run()
