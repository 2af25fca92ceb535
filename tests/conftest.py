"""What tests in several folders need: the local stack, started once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.local.stack import LocalPorts, LocalStack

FREE_PORTS = LocalPorts(stt=0, intent=0, rag=0, llm=0, tts=0)


@pytest.fixture(scope="session")
def local_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """All five services, healthy, on free ports; `local_stack.urls` says where.

    Runs on an event loop of its own that stands still between start and stop, so tests may use any loop.
    """
    stack = LocalStack(tmp_path_factory.mktemp("local-stack"), FREE_PORTS)
    with asyncio.Runner() as runner:
        runner.run(stack.start(lambda _line: None))
        try:
            yield stack
        finally:
            runner.run(stack.stop())


@pytest.fixture(scope="session")
def question_wav() -> bytes:
    """The sample question, spoken: 16 kHz mono PCM16."""
    return (Path(__file__).parents[1] / "orchestrator/local/samples/question.wav").read_bytes()
