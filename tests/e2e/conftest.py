"""End to end: the real pool on a real store, before scripted services on the wire or before the real local stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.fakes import FakeConfig, FakeProcess
from orchestrator.local.stack import LocalStack
from orchestrator.store.embedded import EmbeddedValkey
from tests.server.conftest import start_pool
from tests.server.pools import RunningPool, pools

__all__ = ["start_pool"]

PATIENT = {
    "INTENT_TIMEOUT_MS": "10000",
    "RAG_TIMEOUT_MS": "10000",
    "LLM_TIMEOUT_MS": "10000",
    "TTS_TIMEOUT_MS": "10000",
    "STALL_TIMEOUT_MS": "10000",
}
"""The real models share a busy machine with the tests; what is proven is what they say, not how fast."""


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """A real Valkey."""
    server = EmbeddedValkey(tmp_path_factory.mktemp("store"))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def fakes() -> Iterator[FakeProcess]:
    """Scripted services with the delays of the stage targets and short audio, in a process of their own."""
    with FakeProcess(FakeConfig(tts_ms_per_word=30.0)) as process:
        yield process


def _pool_before(
    factory: pytest.TempPathFactory, fakes: FakeProcess, store: EmbeddedValkey, **env: str
) -> Iterator[RunningPool]:
    with pools(factory.mktemp("pool")) as start:
        yield start({**fakes.env, "REDIS_URL": store.url, **env}, 1)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, fakes: FakeProcess, store: EmbeddedValkey) -> Iterator[RunningPool]:
    """One worker before the scripted services, for tests in which all goes well."""
    yield from _pool_before(tmp_path_factory, fakes, store, **PATIENT)


@pytest.fixture(scope="module")
def shaken_pool(
    tmp_path_factory: pytest.TempPathFactory, fakes: FakeProcess, store: EmbeddedValkey
) -> Iterator[RunningPool]:
    """One worker whose services are made to fail."""
    yield from _pool_before(tmp_path_factory, fakes, store)


@pytest.fixture(scope="module", params=["openai", "stream"])
def waiting_pool(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    fakes: FakeProcess,
    store: EmbeddedValkey,
) -> Iterator[RunningPool]:
    """One worker that waits as long as it takes and does not speculate, with either TTS protocol."""
    env = {**PATIENT, "TTS_PROTOCOL": request.param, "SPECULATION": "off"}
    yield from _pool_before(tmp_path_factory, fakes, store, **env)


@pytest.fixture(scope="module")
def real_pool(
    tmp_path_factory: pytest.TempPathFactory, local_stack: LocalStack, store: EmbeddedValkey
) -> Iterator[RunningPool]:
    """Two workers before the real local stack."""
    directory: Path = tmp_path_factory.mktemp("real-pool")
    with pools(directory) as start:
        yield start({**local_stack.urls, **PATIENT, "REDIS_URL": store.url}, 2)
