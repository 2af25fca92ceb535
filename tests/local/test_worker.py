"""The one thread of a model."""

from __future__ import annotations

import asyncio
import threading

import pytest

from orchestrator.local.worker import InferenceWorker


def test_urgent_calls_go_first_and_cancelled_ones_never_run() -> None:
    order: list[str] = []
    gate = threading.Event()

    async def main() -> None:
        worker = InferenceWorker("test")
        first = asyncio.ensure_future(worker.run(lambda: gate.wait(10)))
        await asyncio.sleep(0)
        rest = [
            asyncio.ensure_future(worker.run(lambda name=name: order.append(name), priority))
            for name, priority in (("late", 1), ("dropped", 0), ("soon", 0), ("later", 1))
        ]
        await asyncio.sleep(0)
        rest[1].cancel()
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *rest, return_exceptions=True)
        worker.close()

    asyncio.run(main())
    assert order == ["soon", "late", "later"]


def test_an_error_is_raised_to_its_caller_alone() -> None:
    async def main() -> None:
        worker = InferenceWorker("test")
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 / 0)
        assert await worker.run(lambda: 7) == 7
        worker.close()

    asyncio.run(main())


def test_closing_cancels_what_waits() -> None:
    gate = threading.Event()

    async def main() -> None:
        worker = InferenceWorker("test")
        running = asyncio.ensure_future(worker.run(lambda: gate.wait(10)))
        waiting = asyncio.ensure_future(worker.run(lambda: None))
        await asyncio.sleep(0)
        gate.set()
        worker.close()
        await asyncio.gather(running, waiting, return_exceptions=True)
        assert running.result() is True
        assert waiting.cancelled()

    asyncio.run(main())
