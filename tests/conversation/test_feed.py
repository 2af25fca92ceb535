"""The feed between the answer and its speech: order, joining, and the end."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.conversation.feed import ClauseFeed
from tests.conversation.scripted import on_virtual_time


@given(st.lists(st.text("ab ", min_size=1, max_size=8), max_size=12), st.integers(0, 20), st.integers(0, 12))
def test_nothing_is_lost_doubled_or_reordered(clauses: list[str], limit: int, late: int) -> None:
    async def run() -> list[str]:
        feed = ClauseFeed(asyncio.get_running_loop())
        for clause in clauses[:late]:
            feed.put(clause)

        async def produce() -> None:
            for clause in clauses[late:]:
                await asyncio.sleep(0)
                feed.put(clause)
            feed.close()

        producing = asyncio.ensure_future(produce())
        taken: list[str] = []
        while await feed.filled():
            taken.append(feed.take(limit))
        await producing
        return taken

    taken = on_virtual_time(run)
    assert " ".join(taken) == " ".join(clauses)
    assert all(len(piece) <= limit or piece in clauses for piece in taken)


def test_a_consumer_that_waits_is_woken_by_the_end() -> None:
    async def run() -> bool:
        feed = ClauseFeed(asyncio.get_running_loop())
        waiting = asyncio.ensure_future(feed.filled())
        await asyncio.sleep(1)
        assert not waiting.done()
        feed.close()
        return await waiting

    assert on_virtual_time(run) is False
