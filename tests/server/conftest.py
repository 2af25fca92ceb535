"""Pools for the tests of the server, and for end-to-end tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.server.pools import RunningPool, pools

FAKE_COMPOSE = "tests.server.fakes:build_sessions"


@pytest.fixture
def start_pool(tmp_path: Path) -> Iterator[Callable[..., RunningPool]]:
    """`start_pool(env, workers)`: the real pool with the real conversation layer, gone after the test."""
    with pools(tmp_path) as start:
        yield start


@pytest.fixture
def start_fake_pool(start_pool: Callable[..., RunningPool]) -> Callable[..., RunningPool]:
    """The real pool with the scripted conversation layer of `fakes`."""
    return partial(start_pool, compose=FAKE_COMPOSE)


@pytest.fixture(scope="module")
def fake_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    """One pool of two workers with the scripted conversation layer, shared by a module's tests."""
    with pools(tmp_path_factory.mktemp("pool")) as start:
        yield start(workers=2, compose=FAKE_COMPOSE)
