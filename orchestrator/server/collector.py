"""When the garbage collector runs: little and often while conversations run, everything only when none does.

Turns leave no cycles behind, so reference counts free nearly all. A full collection of a worker that holds a thousand
sessions takes tens of milliseconds, so it is never left to chance: the young generations are collected by themselves,
and what survives is frozen (not looked at again). A collection looks at what was made since the last one, so its length
goes with load and interval: the interval follows, to keep a pause near `GOOD_PAUSE_SECONDS`. When the worker is idle,
everything is thawed and collected once.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

LONGEST_YOUNG_SECONDS = 0.15
"""Between two collections of the young generations while little happens."""

GOOD_PAUSE_SECONDS = 0.0025
"""A step of a turn under load waits that long anyway; the bound to keep is 5 ms."""

FULL_SECONDS = 60.0
"""The least time between two full collections."""


class Collector:
    """One a worker: `start()` after everything is built, `tick()` from the heartbeat, `stop()` at the end.

    `on_pause` is told how long each collection took (seconds).
    """

    def __init__(self, on_pause: Callable[[float], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_pause = on_pause
        self._clock = clock
        self._began = 0.0
        self._pause = 0.0
        self._young_every = LONGEST_YOUNG_SECONDS
        self._young_at = 0.0
        self._full_at = 0.0

    def start(self) -> None:
        """Take over from the automatic collector; what lives now is frozen."""
        gc.collect()
        gc.freeze()
        gc.disable()
        gc.callbacks.append(self._measure)
        self._young_at = self._full_at = self._clock()

    def stop(self) -> None:
        """Give it back."""
        if self._measure in gc.callbacks:
            gc.callbacks.remove(self._measure)
        gc.unfreeze()
        gc.enable()

    def tick(self, idle: bool) -> None:
        """Collect what is due. `idle` says that no conversation would notice a pause."""
        now = self._clock()
        if idle and now - self._full_at >= FULL_SECONDS:
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            self._full_at = self._young_at = self._clock()
        elif now - self._young_at >= self._young_every:
            gc.collect(1)
            gc.freeze()
            wanted = self._young_every * GOOD_PAUSE_SECONDS / max(self._pause, GOOD_PAUSE_SECONDS / 2)
            self._young_every = min(wanted, LONGEST_YOUNG_SECONDS)
            self._young_at = now

    def _measure(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self._pause = time.perf_counter() - self._began
            self._on_pause(self._pause)
