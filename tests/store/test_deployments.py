"""The store over TCP, behind a sentinel with a failover, and in a cluster: real servers each."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from orchestrator.store.embedded import server_binary
from orchestrator.store.redis_store import SessionStore
from orchestrator.store.stt_events import SttEvents
from tests.loops import live, until
from tests.store.test_redis_store import Seen, record, snapshot, storing

pytestmark = pytest.mark.server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Servers:
    """Valkey processes on ports of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, *options: str, sentinel: str | None = None) -> int:
        port = free_port()
        home = self.directory / str(port)
        home.mkdir()
        command = [str(server_binary())]
        if sentinel is not None:
            (home / "sentinel.conf").write_text(sentinel)
            command += [str(home / "sentinel.conf"), "--sentinel"]
        command += ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(home), *options]
        if sentinel is None:
            command += ["--save", ""]
        self.processes[port] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.wait(port)
        return port

    def wait(self, port: int) -> None:
        for _ in range(1000):
            assert self.processes[port].poll() is None, "the server ended at once"
            try:
                with Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:
                    client.ping()
                return
            except RedisError:
                time.sleep(0.005)
        raise AssertionError(f"no server on {port}")

    def kill(self, port: int) -> None:
        self.processes[port].kill()
        self.processes[port].wait()

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    running = Servers(tmp_path)
    yield running
    running.stop()


async def check(store: SessionStore, seen: Seen) -> None:
    """Writes, fences and reads many sessions."""
    await until(lambda: store.connected)
    for epoch in (2, 1):
        for index in range(100):
            store.mark_dirty(f"s{index}", snapshot(session_id=f"s{index}", epoch=epoch))
        await until(lambda: store.dirty == 0)
    assert seen.written == {"ok": 100, "fenced": 100}
    loaded = await asyncio.gather(*(store.load(f"s{index}") for index in range(100)))
    assert loaded == [record(f"s{index}", epoch=2) for index in range(100)]
    assert await store.load("nobody") is None


@live
async def test_over_tcp_with_a_password(servers: Servers) -> None:
    port = servers.start()
    with Redis(port=port) as admin:
        admin.config_set("requirepass", "secret")
    seen = Seen()
    async with storing(f"redis://:secret@127.0.0.1:{port}/2", seen) as store:
        await check(store, seen)
    async with storing(f"redis://:wrong@127.0.0.1:{port}/2") as store:
        await until(lambda: store.dirty == 0)
        assert not store.connected


@live
async def test_a_cluster(servers: Servers) -> None:
    port = servers.start("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with Redis(port=port) as admin:
        admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        await asyncio.sleep(0)
        for _ in range(1000):
            if b"cluster_state:ok" in admin.execute_command("CLUSTER", "INFO"):
                break
            await asyncio.sleep(0.005)
    seen = Seen()
    url = f"redis+cluster://127.0.0.1:{port}"
    async with storing(url, seen) as store:
        await check(store, seen)
        servers.kill(port)
        store.mark_dirty("s0", snapshot(session_id="s0", epoch=3))
        await until(lambda: not store.connected)
        assert store.dirty == 1


@live
async def test_events_in_a_cluster(servers: Servers) -> None:
    port = servers.start("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    delivered: list[tuple[str, object]] = []
    events = SttEvents(
        f"redis+cluster://127.0.0.1:{port}", "c", lambda text, is_final, timestamp: text,
        lambda session_id, event: delivered.append((session_id, event)),
    )  # fmt: skip
    await events.start()
    await until(lambda: events.subscribed)
    with Redis(port=port) as admin:
        admin.publish("c", '{"session_id":"a","text":"x"}')
    await until(lambda: delivered == [("a", "x")])
    await events.close()


@live
async def test_a_failover_behind_a_sentinel(servers: Servers) -> None:
    first = servers.start()
    second = servers.start("--replicaof", "127.0.0.1", str(first))
    sentinel = servers.start(
        sentinel=f"sentinel monitor main 127.0.0.1 {first} 1\n"
        "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 2000\n"
    )
    with Redis(port=sentinel) as admin:
        for _ in range(2000):
            if admin.execute_command("SENTINEL", "REPLICAS", "main"):
                break
            await asyncio.sleep(0.01)
    seen = Seen()
    async with storing(f"redis+sentinel://127.0.0.1:{sentinel}/main/1", seen) as store:
        await check(store, seen)
        with Redis(port=second, db=1) as admin:
            for _ in range(2000):
                if admin.dbsize() == 100:
                    break
                await asyncio.sleep(0.01)
        servers.kill(first)
        store.mark_dirty("s0", snapshot(session_id="s0", epoch=3))
        await until(lambda: not store.connected)
        await until(lambda: store.connected and store.dirty == 0, 20)
        assert await store.load("s0") == record("s0", epoch=3)
        assert await store.load("s1") == record("s1", epoch=2)
        with Redis(port=second, db=1) as admin:
            assert admin.dbsize() == 100
