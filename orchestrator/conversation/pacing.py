"""One timer for all sessions of a worker: callbacks due in the same 5 ms share one wake-up of the loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

TICK_SECONDS = 0.005


class Due:
    """A callback on the wheel. `cancel()` may be called any number of times, also after it ran."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class PacingWheel:
    """Runs callbacks at or up to one tick after their time (seconds on the loop's clock), never before it."""

    __slots__ = ("_armed", "_armed_for", "_loop", "_running", "_slots")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: dict[int, list[Due]] = {}
        self._armed: asyncio.TimerHandle | None = None
        self._armed_for = 0
        self._running = False

    def at(self, when: float, callback: Callable[[], None]) -> Due:
        """Run `callback` at `when`."""
        due = Due(callback)
        tick = math.ceil(when / TICK_SECONDS)
        waiting = self._slots.get(tick)
        if waiting is not None:
            waiting.append(due)
            return due
        self._slots[tick] = [due]
        if not self._running and (self._armed is None or tick < self._armed_for):
            self._arm(tick)
        return due

    def close(self) -> None:
        """Forget everything that waits."""
        if self._armed is not None:
            self._armed.cancel()
            self._armed = None
        self._slots.clear()

    def _arm(self, tick: int) -> None:
        if self._armed is not None:
            self._armed.cancel()
        self._armed_for = tick
        self._armed = self._loop.call_at(tick * TICK_SECONDS, self._run)

    def _run(self) -> None:
        self._armed = None
        now = max(math.floor(self._loop.time() / TICK_SECONDS + 1e-6), self._armed_for)
        # Callbacks put new ones on the wheel: which of all is the next is known only behind the last of them.
        self._running = True
        try:
            for tick in sorted(tick for tick in self._slots if tick <= now):
                for due in self._slots.pop(tick):
                    callback, due.callback = due.callback, None
                    if callback is not None:
                        self._call(callback)
        finally:
            self._running = False
            if self._slots:
                self._arm(min(self._slots))

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:  # noqa: BLE001 one session's fault must not stop the others that are due
            self._loop.call_exception_handler({"message": "a paced callback failed", "exception": error})
