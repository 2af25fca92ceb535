"""The pool as processes: who serves which session, and what deaths, signals and mistakes do to it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from orchestrator.core.ring import owner
from tests.server.pools import ROOT, RunningPool, is_child_of_a_pool, until

pytestmark = pytest.mark.server

StartPool = Callable[..., RunningPool]
Open = dict[str, tuple[ClientConnection, dict[str, Any]]]


async def open_one(pool: RunningPool, session_id: str) -> tuple[ClientConnection, dict[str, Any]]:
    client = await connect(f"{pool.url}?session_id={session_id}", open_timeout=20, ping_interval=None)
    return client, json.loads(await client.recv())


@contextlib.asynccontextmanager
async def opened(pool: RunningPool, session_ids: Iterable[str], at_once: int = 25) -> AsyncIterator[Open]:
    """Connections for all `session_ids`, by session, with the first message of each."""
    gate = asyncio.Semaphore(at_once)

    async def enter(session_id: str) -> tuple[ClientConnection, dict[str, Any]]:
        async with gate:
            return await open_one(pool, session_id)

    names = list(session_ids)
    clients = dict(zip(names, await asyncio.gather(*map(enter, names)), strict=True))
    try:
        yield clients
    finally:
        await asyncio.gather(*(client.close() for client, _ in clients.values()))


def health(pool: RunningPool) -> dict[str, Any]:
    return json.loads(pool.ask("/health")[2])


def owned_by(slot: int, slots: int, prefix: str) -> str:
    """A session id that the ring gives to `slot` of `slots`."""
    return next(name for number in itertools.count() if owner(name := f"{prefix}{number}", range(slots)) == slot)


def test_four_workers_and_two_hundred_sessions(start_fake_pool: StartPool):
    """Every session is served by the slot that the ring names; a reconnect, and a refilled slot, change nothing."""
    pool = start_fake_pool(workers=4)
    names = [f"call-{number}" for number in range(200)]
    owners = {name: owner(name, range(4)) for name in names}

    async def scenario() -> None:
        async with opened(pool, names) as clients:
            assert {name: first["slot"] for name, (_, first) in clients.items()} == owners
            assert collections.Counter(owners.values()).keys() == {0, 1, 2, 3}
            assert health(pool)["active_sessions"] == 200
        async with opened(pool, names) as clients:
            assert all(first["resumed"] for _, first in clients.values())
            assert {name: first["slot"] for name, (_, first) in clients.items()} == owners
            await kill_one(clients)

    async def kill_one(clients: Open) -> None:
        pids = {first["slot"]: first["pid"] for _, first in clients.values()}
        os.kill(pids[2], signal.SIGKILL)
        lost = [name for name in names if owners[name] == 2]
        with pytest.raises(ConnectionClosed):
            await clients[lost[0]][0].recv()
        # At once: these wait in the dead slot's socket for the worker that is being started.
        async with opened(pool, lost, at_once=len(lost)) as again:
            assert {first["slot"] for _, first in again.values()} == {2}
            assert pids[2] not in {first["pid"] for _, first in again.values()}
        for name in set(names) - set(lost):
            client = clients[name][0]
            await client.send('{"type":"ping","id":1}')
            assert json.loads(await client.recv())["type"] == "pong"
        assert health(pool)["workers"] == 4

    asyncio.run(scenario())
    assert b"orchestrator_worker_restarts_total 1.0" in pool.ask("/metrics")[2]


def test_a_stopped_worker_gets_no_new_sessions(start_fake_pool: StartPool):
    pool = start_fake_pool(workers=3)
    frozen = json.loads(pool.ask("/sessions/everything")[2])["pid"]
    slot = owner("everything", range(3))
    os.kill(frozen, signal.SIGSTOP)
    try:
        until(lambda: health(pool)["workers"] == 2, 10, "the stopped worker is still on the ring")

        async def scenario() -> None:
            async with opened(pool, [f"s{number}" for number in range(30)]) as clients:
                others = [other for other in range(3) if other != slot]
                for name, (_, first) in clients.items():
                    assert first["slot"] == owner(name, others)

        asyncio.run(scenario())
    finally:
        os.kill(frozen, signal.SIGCONT)
    until(lambda: health(pool)["workers"] == 3, 10, "the continued worker is not back")


def test_sigterm_drains(start_fake_pool: StartPool):
    """Idle sessions go at once, busy ones when they are ready; meanwhile the pool says 503."""
    pool = start_fake_pool({"DRAIN_TIMEOUT_SECONDS": "20"}, workers=2)
    busy = [owned_by(slot, 2, "busy-") for slot in range(2)]
    idle = [owned_by(slot, 2, "idle-") for slot in range(2)]

    async def scenario() -> None:
        async with opened(pool, [*busy, *idle]) as clients:
            pool.process.terminate()
            for name in (*busy, *idle):
                message = json.loads(await clients[name][0].recv())
                assert message["type"] == "draining"
                assert message["reconnect_after_ms"] > 0
            for name in idle:
                with pytest.raises(ConnectionClosed) as closed:
                    await clients[name][0].recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1012
            status, _, body = pool.ask("/health")
            assert (status, json.loads(body)["draining"]) == (503, True)
            assert pool.ask("/readyz")[0] == 503
            with pytest.raises(InvalidStatus) as refused:
                await open_one(pool, "late")
            assert refused.value.response.status_code == 503
            assert "Retry-After" in refused.value.response.headers
            # gunicorn repeats its SIGTERM; a second one must not cut the drain short.
            for pid in pool.workers():
                os.kill(pid, signal.SIGTERM)
            for name in busy:
                client = clients[name][0]
                await client.send('{"type":"ping","id":1}')
                assert json.loads(await client.recv())["type"] == "pong"
        assert await asyncio.to_thread(pool.process.wait, 10) == 0

    asyncio.run(scenario())


def test_the_drain_has_an_end(start_fake_pool: StartPool):
    pool = start_fake_pool({"DRAIN_TIMEOUT_SECONDS": "0.5"}, workers=2)

    async def scenario() -> None:
        async with opened(pool, [owned_by(slot, 2, "busy-") for slot in range(2)]) as clients:
            pool.process.terminate()
            for client, _ in clients.values():
                assert json.loads(await client.recv())["type"] == "draining"
                with pytest.raises(ConnectionClosed, match="1012"):
                    await client.recv()
        assert await asyncio.to_thread(pool.process.wait, 10) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_an_interrupt_ends_at_once(start_fake_pool: StartPool, number):
    pool = start_fake_pool({"DRAIN_TIMEOUT_SECONDS": "600"}, workers=2)

    async def scenario() -> None:
        async with opened(pool, ["busy-1", "busy-2"]):
            workers = pool.workers()
            os.killpg(pool.process.pid, number)
            assert await asyncio.to_thread(pool.process.wait, 10) == 0
            assert not any(map(is_child_of_a_pool, workers))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("compose", "number"),
    [("build_stubborn_sessions", signal.SIGQUIT), ("build_threaded_sessions", signal.SIGTERM)],
)
def test_what_hangs_does_not_keep_a_worker_alive(start_pool: StartPool, compose, number):
    """Long before gunicorn would lose its patience, which is after DRAIN_TIMEOUT_SECONDS and more."""
    pool = start_pool({"DRAIN_TIMEOUT_SECONDS": "600"}, 2, compose=f"tests.server.fakes:{compose}")
    pool.process.send_signal(number)
    assert pool.process.wait(15) == 0
    assert pool.log.count("does not end") == 2


def test_no_worker_survives_the_arbiter(start_fake_pool: StartPool):
    pool = start_fake_pool({"DRAIN_TIMEOUT_SECONDS": "600"}, workers=3)
    metrics = json.loads(pool.ask("/sessions/everything")[2])["metrics"]
    assert Path(metrics).is_dir()

    async def scenario() -> None:
        async with opened(pool, ["busy-1", "busy-2", "idle-1"]):
            workers = pool.workers()
            assert len(workers) == 3
            pool.process.kill()
            await asyncio.to_thread(pool.process.wait, 5)
            await asyncio.to_thread(
                until, lambda: not any(map(is_child_of_a_pool, workers)), 10, f"a worker survived:\n{pool.log}"
            )

    asyncio.run(scenario())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", pool.port), timeout=1)
    assert not Path(metrics).exists()


def test_workers_come_and_go(start_fake_pool: StartPool):
    """TTIN and TTOU: a slot that is given up is free for the next, and sessions follow the ring."""
    pool = start_fake_pool(workers=2)
    pool.process.send_signal(signal.SIGTTIN)
    until(lambda: health(pool)["workers"] == 3, 10, "no third worker")
    pool.process.send_signal(signal.SIGTTOU)
    until(lambda: health(pool)["workers"] == 2, 10, "the third worker stays")
    # The oldest went: slot 0 is the hole.
    asyncio.run(check_slots(pool, [1, 2]))
    pool.process.send_signal(signal.SIGTTIN)
    until(lambda: health(pool)["workers"] == 3, 10, "the hole is not filled")
    asyncio.run(check_slots(pool, [0, 1, 2]))


async def check_slots(pool: RunningPool, slots: list[int]) -> None:
    async with opened(pool, [f"s{number}" for number in range(30)]) as clients:
        for name, (_, first) in clients.items():
            assert first["slot"] == owner(name, slots)


def test_a_reload_replaces_all_workers_and_drains_the_old(start_fake_pool: StartPool):
    pool = start_fake_pool(workers=2)
    before = set(pool.workers())

    async def scenario() -> None:
        async with opened(pool, ["idle-1", "idle-2"]) as clients:
            pool.process.send_signal(signal.SIGHUP)
            for client, _ in clients.values():
                assert json.loads(await client.recv())["type"] == "draining"
        await asyncio.to_thread(
            until, lambda: len(pool.workers()) == 2 and not before & set(pool.workers()), 15, "not replaced"
        )
        async with opened(pool, ["idle-1", "idle-2"]):
            assert health(pool)["workers"] == 2

    asyncio.run(scenario())


def test_nothing_leaks(start_fake_pool: StartPool):
    """After 500 short connections of every kind, tasks and descriptors are what they were."""
    pool = start_fake_pool(workers=2)
    census = [f"/sessions/everything?{number}" for number in range(40)]

    async def short(number: int) -> None:
        name = f"short-{number}"
        kind = number % 5
        if kind == 0:
            async with connect(f"{pool.url}?session_id={name}") as client:
                await client.recv()
        elif kind == 1:
            reader, writer = await asyncio.open_connection("127.0.0.1", pool.port)
            writer.write(b"GET /orchestrate?session_id=" + name.encode())
            await writer.drain()
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await reader.read()
        elif kind == 2:
            client = await connect(f"{pool.url}?session_id=slow-{name}")
            client.transport.abort()
            await client.wait_closed()
        elif kind == 3:
            with pytest.raises(InvalidStatus):
                await connect(f"{pool.url}?session_id=")
        else:
            async with connect(f"{pool.url}?session_id={name}") as client:
                await client.send("{")
                await client.send('{"type":"vad_end"}')
                await client.recv()

    def count() -> set[tuple[int, int]]:
        answers = [json.loads(pool.ask(path)[2]) for path in census]
        return {(answer["tasks"], answer["descriptors"]) for answer in answers}

    async def scenario() -> None:
        for start in range(0, 500, 50):
            await asyncio.gather(*(short(number) for number in range(start, start + 50)))

    pool.ask("/metrics")
    before = count()
    asyncio.run(scenario())
    until(lambda: count() == before, 10, lambda: f"before {before}, after {count()}")
    assert health(pool)["active_sessions"] == 0


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"PORT": "eighty"}, "PORT='eighty'"),
        ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY='0'"),
        ({"REDIS_URL": "http://redis"}, "REDIS_URL='http://redis'"),
        ({"LOG_LEVEL": "loud\nINFO forged"}, "LOG_LEVEL='loud\\nINFO forged'"),
        ({"RAG_SERVICE_URL": ""}, "RAG_SERVICE_URL=''"),
        ({"AUTH_JWKS_FILE": "/nowhere.json"}, "AUTH_JWKS_FILE"),
        ({"HOST": "no.such.host.invalid"}, "HOST='no.such.host.invalid'"),
    ],
)
@pytest.mark.parametrize("how", ["gunicorn", "run"])
def test_a_wrong_setting_is_one_line(environ, named, how):
    ended = run_to_its_end({"HOST": "127.0.0.1", "PORT": "0", **environ}, how)
    assert ended.returncode in (1, 2)
    errors = [line for line in ended.stderr.splitlines() if " INFO " not in line]
    assert len(errors) == 1, ended.stderr
    assert errors[0].startswith(named)


@pytest.mark.parametrize("how", ["gunicorn", "run"])
def test_a_port_that_is_taken_is_one_line(how):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run_to_its_end({"HOST": "127.0.0.1", "PORT": port}, how)
    assert ended.returncode == 1
    errors = [line for line in ended.stderr.splitlines() if " INFO " not in line]
    assert len(errors) == 1, ended.stderr
    assert f"PORT={port}" in errors[0]
    assert "already in use" in errors[0]


def run_to_its_end(environ: dict[str, str], how: str) -> subprocess.CompletedProcess[str]:
    run = (
        "import os; from orchestrator.server.pool import run; "
        "from tests.server.fakes import build_sessions; run(os.environ, build_sessions)"
    )
    gunicorn = str(Path(sys.executable).parent / "gunicorn")
    command = [gunicorn, "-c", "gunicorn.conf.py"] if how == "gunicorn" else [sys.executable, "-c", run]
    environment = {"PATH": os.environ["PATH"], "LOG_FORMAT": "console", **environ}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=False)


def test_a_wrong_setting_at_a_reload_is_refused_and_the_pool_goes_on(tmp_path: Path, start_fake_pool: StartPool):
    pool = start_fake_pool(workers=1)
    config = next(tmp_path.glob("*.conf.py"))
    config.write_text(config.read_text().replace("os.environ", "{'PORT': 'eighty'}"))
    pool.process.send_signal(signal.SIGHUP)
    until(lambda: "the new settings are refused" in pool.log, 10, lambda: pool.log)
    until(lambda: len(pool.workers()) == 1, 10, "not one worker")
    assert health(pool)["workers"] == 1


def test_a_setting_without_effect_is_said_aloud(start_fake_pool: StartPool):
    pool = start_fake_pool({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, workers=1)
    assert "OTEL_EXPORTER_OTLP_ENDPOINT='http://collector:4318' has no effect" in pool.log
    assert "exports no traces" in pool.log


def test_a_worker_that_cannot_start_does_not_stop_the_others(start_pool: StartPool):
    pool = start_pool(workers=2, compose="tests.server.fakes:build_sessions_except_once", wait=False)
    pool.wait_ready()
    assert health(pool)["workers"] == 2
    assert "told to fail" in pool.log


def test_the_cli_of_gunicorn_still_counts(start_fake_pool: StartPool):
    pool = start_fake_pool(workers=1, arguments=("--workers", "3"))
    assert health(pool)["workers"] == 3


def test_a_stopped_pool_leaves_no_files(start_fake_pool: StartPool):
    pool = start_fake_pool(workers=2)
    metrics = json.loads(pool.ask("/sessions/everything")[2])["metrics"]
    assert pool.stop() == 0
    assert not Path(metrics).exists()


def test_run_serves_in_this_process(tmp_path: Path):
    run = (
        "import os; from orchestrator.server.pool import run; "
        "from tests.server.fakes import build_sessions; run(os.environ, build_sessions)"
    )
    log_file = tmp_path / "run.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", run], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            env={"PATH": os.environ["PATH"], "HOST": "127.0.0.1", "PORT": "0", "WEB_CONCURRENCY": "2"},
        )  # fmt: skip
    pool = RunningPool(process, log_file)
    try:
        pool.wait_ready()
        assert health(pool)["workers"] == 2
    finally:
        assert pool.stop() == 0
