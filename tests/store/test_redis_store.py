"""The session store against a real Valkey that is there, gone, killed, restarted, frozen and full of rubbish."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from orchestrator.errors import SettingsError, StoreUnavailable
from orchestrator.store import redis_store
from orchestrator.store.record import HistoryEntry, SessionRecord
from orchestrator.store.redis_store import SessionStore, session_key
from tests.loops import live, until
from tests.store.conftest import Valkey


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.written: Counter[str] = Counter()
        self.states: list[tuple[bool, int]] = []

    def store_written(self, result: str, count: int) -> None:
        self.written[result] += count

    def store_state(self, connected: bool, dirty: int) -> None:
        self.states.append((connected, dirty))


def record(session_id: str = "test_001", turn: int = 1, epoch: int = 1, text: str = "hello") -> SessionRecord:
    return SessionRecord(
        session_id=session_id,
        epoch=epoch,
        state="LISTENING",
        turn_number=turn,
        seq=7,
        created_at=1.5,
        updated_at=2.5,
        utterance=["what are"],
        partial="adm",
        history=[HistoryEntry("user", text, turn), HistoryEntry("assistant", '¡sí! "epoch":99', turn)],
    )


def snapshot(**fields: object) -> Callable[[], SessionRecord]:
    return lambda: record(**fields)  # type: ignore[arg-type]


@asynccontextmanager
async def storing(url: str, seen: Seen | None = None, ttl: int = 60, **options: object) -> AsyncIterator[SessionStore]:
    store = SessionStore(url, seen or Seen(), ttl, **options)  # type: ignore[arg-type]
    await store.start()
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def raw(url: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(url)
    try:
        yield client
    finally:
        await client.aclose()


@live
async def test_what_was_written_is_read_by_the_next_worker(valkey: Valkey) -> None:
    seen = Seen()
    async with storing(valkey.url, seen) as store:
        assert store.connected
        assert await store.load("test_001") is None
        store.mark_dirty("test_001", snapshot())
        assert (store.dirty, store.is_dirty("test_001")) == (1, True)
        await until(lambda: store.dirty == 0)
        assert not store.is_dirty("test_001")
        assert seen.written == {"ok": 1}
    async with storing(valkey.url) as store, raw(valkey.url) as redis:
        assert await store.load("test_001") == record()
        assert await redis.keys() == [b"orchestrator:session:{test_001}"]
        assert 50 <= await redis.ttl(session_key("test_001")) <= 60


@live
async def test_a_session_not_written_yet_is_read_as_it_is(valkey: Valkey) -> None:
    async with storing(valkey.url) as store:
        store.mark_dirty("test_001", snapshot(turn=4))
        loaded = await store.load("test_001")
        assert loaded is not None
        assert loaded.turn_number == 4


@live
async def test_the_latest_state_wins_and_many_go_out_together(valkey: Valkey) -> None:
    seen = Seen()
    taken: Counter[str] = Counter()

    def counted(session_id: str, turn: int) -> Callable[[], SessionRecord]:
        def take() -> SessionRecord:
            taken[session_id] += 1
            return record(session_id, turn)

        return take

    async with storing(valkey.url, seen) as store, raw(valkey.url) as redis:
        before = (await redis.info("commandstats")).get("cmdstat_evalsha", {"calls": 0})["calls"]
        for turn in range(10):
            for index in range(60):
                store.mark_dirty(f"s{index}", counted(f"s{index}", turn))
        await until(lambda: store.dirty == 0)
        after = (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
        assert after - before == 1
        assert seen.written == {"ok": 60}
        assert set(taken.values()) == {1}
        loaded = await asyncio.gather(*(store.load(f"s{index}") for index in range(60)))
        assert [entry.turn_number for entry in loaded if entry is not None] == [9] * 60


@live
async def test_loads_that_come_together_share_a_command(valkey: Valkey) -> None:
    async with storing(valkey.url) as store, raw(valkey.url) as redis:
        await asyncio.gather(*(store.load(f"s{index}") for index in range(60)))
        stats = await redis.info("commandstats")
        assert stats["cmdstat_mget"]["calls"] <= 2


@live
async def test_an_older_owner_is_refused(valkey: Valkey) -> None:
    seen, refused = Seen(), list[str]()
    async with storing(valkey.url, seen, on_fenced=refused.append) as store:
        for epoch, turn in ((5, 1), (4, 2), (5, 3), (6, 4), (5, 5)):
            store.mark_dirty("test_001", snapshot(epoch=epoch, turn=turn))
            store.mark_dirty("other", snapshot(session_id="other", turn=turn))
            await until(lambda: store.dirty == 0)
        assert seen.written == {"ok": 8, "fenced": 2}
        assert refused == ["test_001", "test_001"]
        loaded = await store.load("test_001")
        assert loaded is not None
        assert (loaded.epoch, loaded.turn_number) == (6, 4)


@live
async def test_a_text_cannot_pass_for_an_epoch(valkey: Valkey) -> None:
    async with storing(valkey.url) as store:
        for turn in (1, 2):
            store.mark_dirty("test_001", snapshot(epoch=2, turn=turn, text='","epoch":99999,"x":"'))
            await until(lambda: store.dirty == 0)
        loaded = await store.load("test_001")
        assert loaded is not None
        assert loaded.turn_number == 2


@pytest.mark.parametrize("session_id", ["x" * 128, "a:b.c_d-e", "0"])
def test_any_legal_session_id_is_fenced(valkey: Valkey, session_id: str) -> None:
    @live
    async def run() -> None:
        seen = Seen()
        async with storing(valkey.url, seen) as store:
            for epoch in (2**52, 3):
                store.mark_dirty(session_id, snapshot(session_id=session_id, epoch=epoch))
                await until(lambda: store.dirty == 0)
            assert seen.written == {"ok": 1, "fenced": 1}

    run()


RUBBISH = [
    b"", b"null", b"{}", b"[]", b"\xff\xfe", b"hello", b'{"session_id":"test_001"', b"[" * 100_000,
    b'{"version":2,"session_id":"test_001"}', b'{"version":1,"session_id":"another"}',
    b'{"session_id":"test_001","history":[7]}', b'{"session_id":"test_001","turn_number":"x"}',
]  # fmt: skip


@live
async def test_a_value_that_is_no_record_counts_as_none_and_is_written_over(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    async with storing(valkey.url) as store, raw(valkey.url) as redis:
        for rubbish in RUBBISH:
            await redis.set(session_key("test_001"), rubbish)
            with caplog.at_level(logging.WARNING):
                caplog.clear()
                assert await store.load("test_001") is None
            assert [line.levelname for line in caplog.records] == ["WARNING"]
            assert caplog.text.strip().isprintable()
            store.mark_dirty("test_001", snapshot())
            await until(lambda: store.dirty == 0)
            assert await store.load("test_001") == record()


@live
async def test_a_key_of_another_type_counts_as_none_and_is_written_over(valkey: Valkey) -> None:
    seen = Seen()
    async with storing(valkey.url, seen) as store, raw(valkey.url) as redis:
        await redis.hset(session_key("test_001"), "a", "b")
        assert await store.load("test_001") is None
        store.mark_dirty("test_001", snapshot())
        await until(lambda: store.dirty == 0)
        assert seen.written == {"ok": 1}
        assert await store.load("test_001") == record()


@live
async def test_a_key_that_vanished_is_written_again(valkey: Valkey) -> None:
    async with storing(valkey.url) as store, raw(valkey.url) as redis:
        for turn in (1, 2):
            store.mark_dirty("test_001", snapshot(turn=turn))
            await until(lambda: store.dirty == 0)
            assert await redis.delete(session_key("test_001")) == 1
            await redis.script_flush()
        store.mark_dirty("test_001", snapshot(turn=3))
        await until(lambda: store.dirty == 0)
        assert await redis.exists(session_key("test_001")) == 1


@live
async def test_a_killed_server_is_survived_and_dirty_sessions_are_written_when_it_is_back(valkey: Valkey) -> None:
    seen = Seen()
    async with storing(valkey.url, seen) as store:
        store.mark_dirty("a", snapshot(session_id="a"))
        await until(lambda: store.dirty == 0)
        valkey.kill()
        for turn in range(20):
            for name in ("a", "b", "c"):
                store.mark_dirty(name, snapshot(session_id=name, turn=turn))
            await asyncio.sleep(0.005)
        await until(lambda: not store.connected)
        assert store.dirty == 3
        with pytest.raises(StoreUnavailable):
            await store.load("d")
        loaded = await store.load("b")
        assert loaded is not None
        assert loaded.turn_number == 19
        valkey.restart()
        await until(lambda: store.connected and store.dirty == 0)
        assert seen.states[0] == (True, 0)
        assert (False, 3) in seen.states
        assert seen.states[-1] == (True, 0)
        for name in ("a", "b", "c"):
            loaded = await store.load(name)
            assert loaded is not None
            assert loaded.turn_number == 19


@live
async def test_losing_an_idle_server_is_noticed(valkey: Valkey) -> None:
    async with storing(valkey.url) as store:
        assert store.connected
        valkey.kill()
        await until(lambda: not store.connected)
        valkey.restart()
        await until(lambda: store.connected)


@live
async def test_a_server_that_is_not_there_at_start(tmp_path: Path) -> None:
    seen = Seen()
    async with storing(f"unix://{tmp_path}/none.sock", seen) as store:
        assert not store.connected
        with pytest.raises(StoreUnavailable) as caught:
            await store.load("test_001")
        assert str(caught.value).count("\n") == 0
        store.mark_dirty("test_001", snapshot())
        await asyncio.sleep(0.1)
        assert store.dirty == 1
        assert not store.connected
    assert seen.states[0][0] is False


@live
async def test_a_frozen_server_does_not_hold_up_a_load(valkey: Valkey) -> None:
    async with storing(valkey.url) as store:
        await store.load("test_001")
        valkey.signal(signal.SIGSTOP)
        with pytest.raises(StoreUnavailable):
            await store.load("test_001")
        store.mark_dirty("test_001", snapshot())
        valkey.signal(signal.SIGCONT)
        await until(lambda: store.connected and store.dirty == 0)
        assert await store.load("test_001") == record()


@live
async def test_a_newer_state_is_not_lost_to_an_older_write_that_failed(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "WRITE_TIMEOUT_SECONDS", 0.1)
    seen = Seen()
    async with storing(valkey.url, seen) as store:
        await until(lambda: store.connected)
        taken = asyncio.Event()

        def older() -> SessionRecord:
            taken.set()
            return record(turn=1)

        valkey.signal(signal.SIGSTOP)
        store.mark_dirty("test_001", older)
        await taken.wait()
        store.mark_dirty("test_001", snapshot(turn=2))
        assert store.dirty == 1
        await until(lambda: seen.written["failed"] > 0)
        assert store.dirty == 1
        valkey.signal(signal.SIGCONT)
        await until(lambda: store.connected and store.dirty == 0)
        loaded = await store.load("test_001")
        assert loaded is not None
        assert loaded.turn_number == 2


@live
async def test_writes_that_are_refused_are_kept_without_a_busy_loop(valkey: Valkey) -> None:
    seen = Seen()
    async with storing(valkey.url, seen) as store, raw(valkey.url) as redis:
        await redis.config_set("maxmemory", "1")
        await redis.config_set("maxmemory-policy", "noeviction")
        store.mark_dirty("test_001", snapshot())
        await until(lambda: not store.connected)
        await asyncio.sleep(0.4)
        assert store.dirty == 1
        assert 1 <= seen.written["failed"] <= 6
        await redis.config_set("maxmemory", "0")
        await until(lambda: store.connected and store.dirty == 0)


@live
async def test_only_the_newest_sessions_are_kept_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "MAX_DIRTY", 5)
    seen = Seen()
    async with storing(f"unix://{tmp_path}/none.sock", seen) as store:
        for index in range(8):
            store.mark_dirty(f"s{index}", snapshot(session_id=f"s{index}"))
        store.mark_dirty("s3", snapshot(session_id="s3"))
        store.mark_dirty("s9", snapshot(session_id="s9"))
        assert [store.is_dirty(f"s{index}") for index in range(10)] == [
            False, False, False, True, False, True, True, True, False, True,
        ]  # fmt: skip
        assert store.dirty == 5
        assert seen.written["failed"] >= 4


@live
async def test_a_state_that_cannot_be_written_does_not_stop_the_others(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> SessionRecord:
        raise KeyError("a bug in a session")

    seen = Seen()
    async with storing(valkey.url, seen) as store:
        store.mark_dirty("bad", broken)
        store.mark_dirty("good", snapshot(session_id="good"))
        await until(lambda: store.dirty == 0)
        assert await store.load("good") == record("good")
        assert seen.written == {"failed": 1, "ok": 1}
        assert "a bug in a session" in caplog.text


@live
async def test_closing_writes_what_waits(valkey: Valkey) -> None:
    store = SessionStore(valkey.url, Seen(), 60)
    await store.start()
    for index in range(500):
        store.mark_dirty(f"s{index}", snapshot(session_id=f"s{index}"))
    await store.close()
    assert store.dirty == 0
    async with raw(valkey.url) as redis:
        assert await redis.dbsize() == 500


@live
async def test_closing_does_not_wait_for_a_server_that_is_gone(valkey: Valkey) -> None:
    store = SessionStore(valkey.url, Seen(), 60)
    await store.start()
    valkey.signal(signal.SIGSTOP)
    store.mark_dirty("test_001", snapshot())
    waiting = asyncio.ensure_future(store.load("other"))
    await asyncio.sleep(0)
    await store.close(timeout=0.2)
    assert store.dirty == 1
    with pytest.raises((StoreUnavailable, asyncio.CancelledError)):
        await waiting
    with pytest.raises(StoreUnavailable):
        await store.load("other")


@live
async def test_a_cancelled_load_harms_no_other(valkey: Valkey) -> None:
    async with storing(valkey.url) as store:
        store.mark_dirty("test_001", snapshot())
        await until(lambda: store.dirty == 0)
        for steps in range(30):
            first = asyncio.ensure_future(store.load("test_001"))
            second = asyncio.ensure_future(store.load("test_001"))
            for _ in range(steps):
                await asyncio.sleep(0)
            first.cancel()
            assert await second == record()
            await asyncio.wait((first,))
            assert first.cancelled() or first.result() == record()


@pytest.mark.parametrize(
    "url", ["redis+sentinel://host", "redis+sentinel://host/", "redis+sentinel://host:0/x", "redis+sentinel:///x",
            "redis+sentinel://a:1,:2/x", "redis+sentinel://a:x/x", "redis+sentinel://a/x/y", "redis+cluster://a/3"]
)  # fmt: skip
def test_a_url_that_cannot_be_used_is_one_line(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        SessionStore(url, Seen(), 60)
    assert str(caught.value).startswith("REDIS_URL is not accepted")
    assert "\n" not in str(caught.value)
