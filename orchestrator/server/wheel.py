"""One timer wheel a worker, for the many deadlines that are nearly always moved or dropped before they pass.

An item stands in at most one bucket, so a connection costs one set entry whatever it waits for: it asks for the nearest
of its deadlines and looks, when woken, which of them is due.
"""

from __future__ import annotations

import logging
import math
from typing import Final, Protocol

log = logging.getLogger(__name__)

RESOLUTION_S: Final = 0.25
NOT_SCHEDULED: Final = -1


class Timed(Protocol):
    """What can stand in the wheel. `wheel_tick` belongs to the wheel and starts as NOT_SCHEDULED.

    An item must bear being woken early: it may have been moved by another item woken in the same tick.
    """

    wheel_tick: int

    def on_timer(self, now: float) -> None:
        """The asked-for time passed, by less than one resolution. `now` is the loop's time."""
        ...


class TimerWheel:
    """Buckets of RESOLUTION_S seconds; `advance` is called from the worker's one periodic timer."""

    __slots__ = ("_buckets", "_tick")

    def __init__(self, now: float) -> None:
        self._tick = int(now / RESOLUTION_S)
        self._buckets: dict[int, set[Timed]] = {}

    def schedule(self, item: Timed, at: float) -> None:
        """Wake `item` at loop time `at` or up to two resolutions later; this replaces its earlier wish."""
        tick = max(math.ceil(at / RESOLUTION_S), self._tick + 1)
        if item.wheel_tick == tick:
            return
        if item.wheel_tick != NOT_SCHEDULED:
            self.cancel(item)
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = set()
        bucket.add(item)
        item.wheel_tick = tick

    def cancel(self, item: Timed) -> None:
        """Do not wake `item`."""
        bucket = self._buckets.get(item.wheel_tick)
        if bucket is not None:
            bucket.discard(item)
            if not bucket:
                del self._buckets[item.wheel_tick]
        item.wheel_tick = NOT_SCHEDULED

    def advance(self, now: float) -> None:
        """Wake everything that is due by loop time `now`."""
        target = int(now / RESOLUTION_S)
        while self._tick < target:
            self._tick += 1
            bucket = self._buckets.pop(self._tick, None)
            if bucket is None:
                continue
            for item in bucket:
                item.wheel_tick = NOT_SCHEDULED
            for item in bucket:
                try:
                    item.on_timer(now)
                except Exception:
                    log.exception("a timer failed")

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self._buckets.values())
