"""The slot table: what every process of the pool knows about every worker, in memory shared before the fork.

One row of eight 64-bit words a slot. The arbiter writes a row while no worker holds it (pid 0), the worker
afterwards, so a row has one writer at a time; a word is written by one aligned store and needs no lock. Beside each
row stands one SEQPACKET socket pair, through which connections are handed to that slot's worker: the arbiter keeps
both ends open, so what was handed over while a worker is being replaced waits for its successor.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

SLOTS: Final = 128
"""Rows in the table: twice the most workers, so that a reload may start all new workers before the old ones go."""

MAX_WORKERS: Final = SLOTS // 2

HEARTBEAT_NS: Final = 50_000_000
STALE_NS: Final = 2_000_000_000
"""A live slot that missed heartbeats for this long (a stopped or stuck worker) gets no new sessions."""

REFILL_NS: Final = 3_000_000_000
"""How long a slot without a running worker keeps its sessions while the arbiter starts the next one."""

MAX_FAILED_STARTS: Final = 3
"""A slot whose workers died this often in a row before they were ready owns nothing until one is."""

_ROW: Final = 8
_HEADER: Final = 8
_PID, _STATE, _BEAT, _ATTACHED, _REDIS, _RESTARTS, _SINCE, _FAILED_STARTS = range(8)
_STARTED_NS, _USED, _ANNOUNCED = range(3)
_QUEUE_BYTES: Final = 1 << 20


class SlotState(IntEnum):
    """Where a slot stands. Sessions are routed to live slots, and for a while to starting and restarting ones."""

    FREE = 0
    STARTING = 1
    LIVE = 2
    DRAINING = 3
    RESTARTING = 4


@dataclass(frozen=True, slots=True)
class SlotView:
    """One row as it was read. `heartbeat_ns` and `since_ns` are on the system's monotonic clock."""

    slot: int
    pid: int
    state: SlotState
    heartbeat_ns: int
    attached: int
    redis_connected: bool
    restarts: int
    since_ns: int


class SlotTable:
    """Made once in the arbiter, before the first fork; every method is safe in every process of the pool."""

    def __init__(self, now_ns: int) -> None:
        self._memory = mmap.mmap(-1, (_HEADER + SLOTS * _ROW) * 8)
        self._words = memoryview(self._memory).cast("q")
        self._words[_STARTED_NS] = now_ns
        self._senders: list[socket.socket] = []
        self._receivers: list[socket.socket | None] = []
        for _ in range(SLOTS):
            sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUE_BYTES)
            sender.setblocking(False)
            receiver.setblocking(False)
            self._senders.append(sender)
            self._receivers.append(receiver)

    @property
    def started_ns(self) -> int:
        """When the pool started."""
        return self._words[_STARTED_NS]

    # What the arbiter writes.

    def reserve(self, workers: int, now_ns: int) -> None:
        """Put the first `workers` slots on the ring before any of them runs, so that the first session lands right."""
        for slot in range(min(workers, SLOTS)):
            row = self._row(slot)
            if self._words[row + _STATE] == SlotState.FREE:
                self._words[row + _SINCE] = now_ns
                self._words[row + _STATE] = SlotState.STARTING
                self._grow(slot)

    def take(self, now_ns: int) -> int | None:
        """The slot for the next worker: the lowest that waits for one, else the lowest free; None without any."""
        waiting = self._lowest(SlotState.RESTARTING)
        if waiting is not None:
            self._words[self._row(waiting) + _RESTARTS] += 1
        else:
            waiting = self._lowest(SlotState.STARTING)
        slot = waiting if waiting is not None else self._lowest(SlotState.FREE)
        if slot is None:
            return None
        row = self._row(slot)
        self._words[row + _ATTACHED] = 0
        self._words[row + _BEAT] = now_ns
        self._words[row + _SINCE] = now_ns
        self._words[row + _PID] = -1
        self._words[row + _STATE] = SlotState.STARTING
        self._grow(slot)
        for other in range(self._words[_USED]):
            if self._words[self._row(other) + _PID] == 0 and self._state(other) == SlotState.STARTING:
                self._words[self._row(other) + _SINCE] = now_ns
        return slot

    def release(self, slot: int, now_ns: int) -> bool:
        """The slot's worker is gone. True when it went on purpose: the slot is free; else it waits for a refill."""
        row = self._row(slot)
        on_purpose = self._state(slot) == SlotState.DRAINING
        if self._state(slot) == SlotState.STARTING:
            self._words[row + _FAILED_STARTS] += 1
        self._words[row + _ATTACHED] = 0
        self._words[row + _REDIS] = 0
        self._words[row + _SINCE] = now_ns
        self._words[row + _STATE] = SlotState.FREE if on_purpose else SlotState.RESTARTING
        self._words[row + _PID] = 0
        return on_purpose

    # What the slot's worker writes.

    def start(self, slot: int, pid: int, now_ns: int) -> None:
        """The worker process runs; it is not ready yet."""
        self._words[self._row(slot) + _PID] = pid
        self.beat(slot, now_ns, redis_connected=False)

    def go_live(self, slot: int, now_ns: int) -> None:
        """The worker serves sessions."""
        row = self._row(slot)
        self._words[row + _SINCE] = now_ns
        self._words[row + _BEAT] = now_ns
        self._words[row + _FAILED_STARTS] = 0
        self._words[row + _STATE] = SlotState.LIVE

    def go_draining(self, slot: int, now_ns: int) -> None:
        """The worker takes no new sessions and will exit."""
        row = self._row(slot)
        self._words[row + _SINCE] = now_ns
        self._words[row + _STATE] = SlotState.DRAINING

    def beat(self, slot: int, now_ns: int, *, redis_connected: bool) -> None:
        """The worker's event loop runs."""
        row = self._row(slot)
        self._words[row + _BEAT] = now_ns
        self._words[row + _REDIS] = redis_connected

    def set_attached(self, slot: int, sessions: int) -> None:
        """How many sessions are connected to the slot's worker."""
        self._words[self._row(slot) + _ATTACHED] = sessions

    def claim_announcement(self) -> bool:
        """True for the first caller that finds no slot starting: it says that the pool is ready."""
        starting = any(self._state(slot) == SlotState.STARTING for slot in range(self._words[_USED]))
        if starting or self._words[_ANNOUNCED]:
            return False
        self._words[_ANNOUNCED] = 1
        return True

    # What everybody reads.

    def view(self, slot: int) -> SlotView:
        """One row."""
        row = self._row(slot)
        words = self._words
        return SlotView(
            slot, words[row + _PID], SlotState(words[row + _STATE]), words[row + _BEAT], words[row + _ATTACHED],
            bool(words[row + _REDIS]), words[row + _RESTARTS], words[row + _SINCE],
        )  # fmt: skip

    def ring(self, now_ns: int) -> list[int]:
        """The slots that own sessions now: live ones whose loop runs, and those whose next worker is being started."""
        slots = []
        words = self._words
        for slot in range(words[_USED]):
            row = _HEADER + slot * _ROW
            state = words[row + _STATE]
            if state == SlotState.LIVE:
                if now_ns - words[row + _BEAT] < STALE_NS:
                    slots.append(slot)
            elif (
                state in (SlotState.STARTING, SlotState.RESTARTING)
                and now_ns - words[row + _SINCE] < REFILL_NS
                and words[row + _FAILED_STARTS] < MAX_FAILED_STARTS
            ):
                slots.append(slot)
        return slots

    def live(self, now_ns: int) -> list[int]:
        """The slots whose worker runs and takes sessions."""
        return [
            slot
            for slot in range(self._words[_USED])
            if self._state(slot) == SlotState.LIVE and now_ns - self._words[self._row(slot) + _BEAT] < STALE_NS
        ]

    def total_attached(self) -> int:
        """Connected sessions of all workers."""
        return sum(self._words[self._row(slot) + _ATTACHED] for slot in range(self._words[_USED]))

    def redis_connected(self, now_ns: int) -> bool:
        """Whether every running worker reaches the store."""
        running = [
            self._row(slot)
            for slot in range(self._words[_USED])
            if self._state(slot) in (SlotState.LIVE, SlotState.DRAINING)
            and now_ns - self._words[self._row(slot) + _BEAT] < STALE_NS
        ]
        return bool(running) and all(self._words[row + _REDIS] for row in running)

    def draining(self, now_ns: int) -> bool:
        """Whether the whole pool is going: nobody takes sessions and somebody is draining."""
        if self.ring(now_ns):
            return False
        return any(self._state(slot) == SlotState.DRAINING for slot in range(self._words[_USED]))

    def restarts(self) -> int:
        """How many workers were replaced because they died."""
        return sum(self._words[self._row(slot) + _RESTARTS] for slot in range(self._words[_USED]))

    # The socket pairs.

    def sender(self, slot: int) -> socket.socket:
        """The end through which any worker hands connections to `slot`."""
        return self._senders[slot]

    def receiver(self, slot: int) -> socket.socket:
        """The end from which the worker of `slot` takes them. Raises ValueError where it was closed."""
        receiver = self._receivers[slot]
        if receiver is None:
            raise ValueError(f"slot {slot} is not this worker's own")
        return receiver

    def keep_only(self, slot: int) -> None:
        """In a worker, after the fork: close the other slots' receiving ends, which the arbiter holds for them."""
        for other, receiver in enumerate(self._receivers):
            if other != slot and receiver is not None:
                receiver.close()
                self._receivers[other] = None

    def close(self) -> None:
        """Close this process's copies of everything."""
        for sock in (*self._senders, *self._receivers):
            if sock is not None:
                sock.close()
        self._words.release()
        with contextlib.suppress(BufferError):
            self._memory.close()

    def _row(self, slot: int) -> int:
        return _HEADER + slot * _ROW

    def _state(self, slot: int) -> int:
        return self._words[_HEADER + slot * _ROW + _STATE]

    def _lowest(self, state: SlotState) -> int | None:
        for slot in range(SLOTS):
            if self._state(slot) == state and self._words[self._row(slot) + _PID] == 0:
                return slot
        return None

    def _grow(self, slot: int) -> None:
        self._words[_USED] = max(self._words[_USED], slot + 1)
