"""Sessions in Redis: read once when a session arrives, written behind the conversation's back.

Nothing here but `load` is awaited, and that before the conversation begins. Writes are coalesced: the latest state of a
session wins, and all sessions that changed within about 20 ms go out together. Without Redis they wait, and are written
when it is back.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Protocol, cast

from redis.asyncio.cluster import RedisCluster
from redis.exceptions import NoScriptError

from orchestrator.errors import StoreUnavailable
from orchestrator.store.record import ForeignRecord, SessionRecord, decode_record, encode_record
from orchestrator.store.redis_client import CLUSTER_CONNECTIONS, REDIS_ERRORS, RedisClient, make_client

READ_TIMEOUT_SECONDS = 0.05
WRITE_TIMEOUT_SECONDS = 1.0
COALESCE_SECONDS = 0.02
MAX_DIRTY = 100_000
_BATCH = 64
_FIRST_PAUSE_SECONDS = 0.05
_LAST_PAUSE_SECONDS = 1.0
_PROBE_SECONDS = 1.0
_START_SECONDS = 0.25

# KEYS: sessions. ARGV: the TTL in seconds, then epoch and record for each key. Answers 1 (written) or 0 (refused) each.
# The epoch stands in the first bytes of a record, before any text of a user; a value without one is no record of ours.
_FENCED_WRITE = """
local answers = {}
for i, key in ipairs(KEYS) do
  local epoch = ARGV[2 * i]
  local head = redis.pcall('GETRANGE', key, 0, 255)
  local stored = type(head) == 'string' and tonumber(string.match(head, '"epoch":(%d+)'))
  if stored and stored > tonumber(epoch) then
    answers[i] = 0
  else
    redis.call('SET', key, ARGV[2 * i + 1], 'EX', ARGV[1])
    answers[i] = 1
  end
end
return answers
"""
_FENCED_WRITE_SHA = hashlib.sha1(_FENCED_WRITE.encode()).hexdigest()

Snapshot = Callable[[], SessionRecord]
log = logging.getLogger(__name__)


class StoreObserver(Protocol):
    """The part of the observer that the store reports to."""

    def store_written(self, result: str, count: int) -> None: ...

    def store_state(self, connected: bool, dirty: int) -> None: ...


def session_key(session_id: str) -> str:
    """The key of a session; the braces keep all keys of a session in one cluster slot."""
    return f"orchestrator:session:{{{session_id}}}"


class SessionStore:
    """The sessions of one worker in Redis. `ttl_seconds` is how long a session is kept after its last write.

    Construct it anywhere, `start()` and `close()` it in one loop. Raises SettingsError for a URL it cannot use.
    """

    def __init__(
        self,
        redis_url: str,
        observer: StoreObserver,
        ttl_seconds: int,
        *,
        read_timeout: float = READ_TIMEOUT_SECONDS,
        on_fenced: Callable[[str], None] | None = None,
    ) -> None:
        self._observer = observer
        self._ttl = ttl_seconds
        self._on_fenced = on_fenced
        self._read_timeout = read_timeout
        self._reads = make_client(redis_url, timeout=read_timeout)
        self._writes = make_client(redis_url, timeout=WRITE_TIMEOUT_SECONDS)
        self._dirty: dict[str, Snapshot] = {}
        self._writing: dict[str, Snapshot] = {}
        self._wanted: list[tuple[str, asyncio.Future[bytes | None]]] = []
        self._work = asyncio.Event()
        self._asked = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._connected = False
        self._spoken = asyncio.Event()
        self._reported: tuple[bool, int] | None = None

    @property
    def connected(self) -> bool:
        """Whether Redis answered when it was last spoken to, at most about a second ago."""
        return self._connected

    @property
    def dirty(self) -> int:
        """Sessions whose latest state is not in Redis."""
        return len(self._dirty.keys() | self._writing.keys()) if self._writing else len(self._dirty)

    def is_dirty(self, session_id: str) -> bool:
        """Whether the latest state of the session is not in Redis yet."""
        return session_id in self._dirty or session_id in self._writing

    async def start(self) -> None:
        """Begin to read and write in the background; Redis need not be there."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._write_loop()), loop.create_task(self._read_loop())]
        with suppress(TimeoutError):
            await asyncio.wait_for(self._spoken.wait(), _START_SECONDS)

    async def close(self, timeout: float = 2.0) -> None:
        """Write what waits, for at most `timeout` seconds, and disconnect."""
        self._closing = True
        self._work.set()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=timeout)
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        if self.dirty:
            log.warning("store: %d sessions were not written before the end", self.dirty)
        for _, answer in self._wanted:
            if not answer.done():
                answer.set_exception(StoreUnavailable("the store is closed"))
        for client in (self._reads, self._writes):
            await client.aclose()

    async def load(self, session_id: str) -> SessionRecord | None:
        """The stored session, or None if there is none that can be used. Raises StoreUnavailable."""
        snapshot = self._dirty.get(session_id) or self._writing.get(session_id)
        if snapshot is not None:
            return snapshot()
        if self._closing:
            raise StoreUnavailable("the store is closed")
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._wanted.append((session_id, answer))
        self._asked.set()
        value = await answer
        if value is None:
            return None
        try:
            return decode_record(session_id, value)
        except ForeignRecord as error:
            log.warning("store: the value of session %s was ignored: %.200r", session_id, str(error))
            return None

    def mark_dirty(self, session_id: str, snapshot: Snapshot) -> None:
        """Write what `snapshot()` gives, soon; the latest call for a session wins. Never blocks."""
        dirty = self._dirty
        dirty.pop(session_id, None)
        dirty[session_id] = snapshot
        if len(dirty) > MAX_DIRTY:
            del dirty[next(iter(dirty))]
            self._observer.store_written("failed", 1)
        self._work.set()

    async def _read_loop(self) -> None:
        """Answers all loads that came in while the last ones were answered with one command."""
        while not self._closing:
            await self._asked.wait()
            self._asked.clear()
            while self._wanted:
                batch, self._wanted = self._wanted[:_BATCH], self._wanted[_BATCH:]
                await self._answer(batch)

    async def _answer(self, batch: Sequence[tuple[str, asyncio.Future[bytes | None]]]) -> None:
        try:
            values = await self._get([session_key(session_id) for session_id, _ in batch])
        except REDIS_ERRORS as error:
            log.debug("store: not read: %r", error)
            self._set_connected(False)
            self._work.set()
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(StoreUnavailable(f"the session store does not answer: {error}"))
            return
        except asyncio.CancelledError:
            for _, answer in batch:
                answer.cancel()
            raise
        for (_, answer), value in zip(batch, values, strict=True):
            if not answer.done():
                answer.set_result(value)

    async def _get(self, keys: list[str]) -> list[bytes | None]:
        client = self._reads
        if isinstance(client, RedisCluster):
            pipeline = client.pipeline()
            for key in keys:
                pipeline.get(key)
            return cast(list[bytes | None], await pipeline.execute())
        return cast(list[bytes | None], await client.mget(keys))

    async def _write_loop(self) -> None:
        """Writes what is dirty, else asks whether Redis is there; waits longer the longer it is not."""
        pause = _FIRST_PAUSE_SECONDS
        while not (self._closing and not self._dirty):
            usable = (self._dirty and self._connected) or await self._answers()
            if usable and self._dirty:
                usable = await self._flush()
            self._set_connected(bool(usable))
            if usable:
                pause = _FIRST_PAUSE_SECONDS
                await self._wait_for_work()
            elif self._closing:
                return
            else:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LAST_PAUSE_SECONDS)

    async def _wait_for_work(self) -> None:
        """Until something is dirty and has had time to gather, or until it is time to look whether Redis is there."""
        if self._closing:
            return
        if not self._dirty:
            self._work.clear()
            try:
                await asyncio.wait_for(self._work.wait(), _PROBE_SECONDS)
            except TimeoutError:
                return
        if self._connected and not self._closing:
            await asyncio.sleep(COALESCE_SECONDS)

    async def _answers(self) -> bool:
        """Whether Redis answers now."""
        try:
            await self._writes.ping()
        except REDIS_ERRORS as error:
            log.debug("store: no answer: %r", error)
            return False
        return True

    async def _flush(self) -> bool:
        """Write all that is dirty now, in batches; False when Redis fails."""
        while self._dirty:
            batch = {session_id: self._dirty.pop(session_id) for session_id in list(islice(self._dirty, _BATCH))}
            self._writing = batch
            written = False
            try:
                await self._write(batch)
                written = True
            except REDIS_ERRORS as error:
                log.debug("store: not written: %r", error)
                self._observer.store_written("failed", len(batch))
                return False
            finally:
                self._writing = {}
                if not written:
                    self._dirty = {**batch, **self._dirty}
        return True

    async def _write(self, batch: dict[str, Snapshot]) -> None:
        records = {session_id: self._record(session_id, snapshot) for session_id, snapshot in batch.items()}
        rows = [(session_id, record) for session_id, record in records.items() if record is not None]
        if not rows:
            return
        answers = await self._write_rows(rows)
        refused = [session_id for (session_id, _), answer in zip(rows, answers, strict=True) if not answer]
        if len(refused) < len(rows):
            self._observer.store_written("ok", len(rows) - len(refused))
        if refused:
            self._observer.store_written("fenced", len(refused))
            log.warning("store: %d sessions have a newer owner and were not written: %s …", len(refused), refused[0])
            if self._on_fenced is not None:
                for session_id in refused:
                    self._on_fenced(session_id)

    def _record(self, session_id: str, snapshot: Snapshot) -> tuple[int, bytes] | None:
        """Epoch and JSON. One session whose state cannot be written must not keep the others from it."""
        try:
            record = snapshot()
            return record.epoch, encode_record(record)
        except Exception:
            log.exception("store: the state of session %s cannot be written", session_id)
            self._observer.store_written("failed", 1)
            return None

    async def _write_rows(self, rows: list[tuple[str, tuple[int, bytes]]]) -> list[int]:
        client = self._writes
        if not isinstance(client, RedisCluster):
            return await self._run_script(client, rows)
        answers: list[int] = []
        for start in range(0, len(rows), CLUSTER_CONNECTIONS):
            group = rows[start : start + CLUSTER_CONNECTIONS]
            for answer in await asyncio.gather(*(self._run_script(client, [row]) for row in group)):
                answers += answer
        return answers

    async def _run_script(self, client: RedisClient, rows: list[tuple[str, tuple[int, bytes]]]) -> list[int]:
        arguments: list[str | bytes | int] = [session_key(session_id) for session_id, _ in rows]
        arguments.append(self._ttl)
        for _, (epoch, record) in rows:
            arguments.append(epoch)
            arguments.append(record)
        try:
            answer = await client.evalsha(_FENCED_WRITE_SHA, len(rows), *arguments)
        except NoScriptError:
            answer = await client.eval(_FENCED_WRITE, len(rows), *arguments)
        return cast(list[int], answer)

    def _set_connected(self, connected: bool) -> None:
        first = not self._spoken.is_set()
        if connected is not self._connected or first:
            self._connected = connected
            self._spoken.set()
            if connected:
                log.info("store: connected; %d sessions wait to be written", self.dirty)
            else:
                log.warning("store: not reachable; sessions go on from memory")
        self._report()

    def _report(self) -> None:
        state = (self._connected, self.dirty)
        if state != self._reported:
            self._reported = state
            self._observer.store_state(*state)
