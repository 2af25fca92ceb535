"""A turn leaves nothing for the cyclic garbage collector, however it ends: reference counts free it all."""

from __future__ import annotations

import asyncio
import gc

import pytest

from orchestrator.conversation.session import Session
from orchestrator.errors import Failure
from orchestrator.wire.messages import Cancel
from tests.conversation.scripted import Stage, on_virtual_time

TURNS = 10


async def _completed(stage: Stage, session: Session) -> None:
    await asyncio.sleep(10)


async def _interrupted(stage: Stage, session: Session) -> None:
    await asyncio.sleep(1)
    stage.interrupt(session)
    stage.end(session)
    await asyncio.sleep(1)
    session.receive(Cancel())


async def _interrupted_early(stage: Stage, session: Session) -> None:
    await asyncio.sleep(0.05)
    stage.interrupt(session)
    stage.end(session)
    await asyncio.sleep(10)


async def _failed(stage: Stage, session: Session) -> None:
    stage.rag.fails = stage.llm.fails = Failure.STATUS
    await asyncio.sleep(10)


async def _silent(stage: Stage, session: Session) -> None:
    stage.tts.failure = Failure.TIMEOUT
    await asyncio.sleep(10)


@pytest.mark.parametrize("end", [_completed, _interrupted, _interrupted_early, _failed, _silent])
@pytest.mark.parametrize("speculation", ["off", "on", "llm"])
def test_no_cycles_are_left(end, speculation: str) -> None:  # type: ignore[no-untyped-def]
    async def run() -> int:
        stage = Stage(speculation=speculation)
        session = await stage.connect()

        async def turn(number: int) -> None:
            stage.say(session, f"What about question {number}?")
            await asyncio.sleep(0.3)
            stage.end(session)
            await end(stage, session)

        await turn(0)
        await asyncio.sleep(10)
        gc.collect()
        gc.disable()
        try:
            for number in range(1, TURNS + 1):
                await turn(number)
            return gc.collect()
        finally:
            gc.enable()

    assert on_virtual_time(run) < TURNS
