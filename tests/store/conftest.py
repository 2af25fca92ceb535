from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.store.embedded import EmbeddedValkey


class Valkey:
    """A real server that a test may stop, kill and freeze."""

    def __init__(self, directory: Path) -> None:
        self.server = EmbeddedValkey(directory)
        self.server.start()

    @property
    def url(self) -> str:
        return self.server.url

    def kill(self) -> None:
        """kill -9; what was written in the last second may be lost."""
        self.signal(signal.SIGKILL)
        while self.server.pid is not None:
            time.sleep(0.002)

    def restart(self) -> None:
        self.server.start()

    def signal(self, number: signal.Signals) -> None:
        assert self.server.pid is not None
        os.kill(self.server.pid, number)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path)
    yield server
    if server.server.pid is not None:
        server.signal(signal.SIGCONT)
    server.server.stop()
