"""Timers finer than an event loop's own.

libuv rounds timers to whole milliseconds and may fire up to one early; over the three stages of a turn that
is as large as the overhead being measured. On uvloop one kernel timer (timerfd, nanoseconds) serves a heap of
deadlines. On any other loop, a virtual-time one included, the loop's own `call_at` is used.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import itertools
import os
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK = 0o4000
_TFD_CLOEXEC = 0o2000000
_TFD_TIMER_ABSTIME = 1
_EARLY_S = 20e-6


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Handle(Protocol):
    """What `Timers.at` returns: something that can be cancelled, any number of times."""

    def cancel(self) -> None: ...


class Timers(Protocol):
    """Deadlines on one event loop, in seconds of that loop's clock."""

    def at(self, when: float, callback: Callable[..., object], *args: object) -> Handle: ...

    def close(self) -> None: ...


class LoopTimers:
    """The loop's own timers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def at(self, when: float, callback: Callable[..., Any], *args: object) -> Handle:
        return self._loop.call_at(when, callback, *args)

    def close(self) -> None:
        return None


class _Entry:
    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., Any], args: tuple[object, ...]) -> None:
        self.callback: Callable[..., Any] | None = callback
        self.args = args

    def cancel(self) -> None:
        self.callback = None
        self.args = ()


class KernelTimers:
    """A heap of deadlines behind one timerfd; late by tens of microseconds on an idle loop.

    The loop's clock must be CLOCK_MONOTONIC, as uvloop's and asyncio's are.
    Raises OSError where the kernel gives no timerfd.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._settime = libc.timerfd_settime
        self._spec = _Itimerspec()
        self._value = self._spec.value
        self._spec_ref = ctypes.byref(self._spec)
        self._heap: list[tuple[float, int, _Entry]] = []
        self._order = itertools.count()
        self._armed = 0.0
        self._firing = False
        self._loop = loop
        self._clock = clock
        loop.add_reader(self._fd, self._fire)

    def at(self, when: float, callback: Callable[..., Any], *args: object) -> Handle:
        entry = _Entry(callback, args)
        heapq.heappush(self._heap, (when, next(self._order), entry))
        if not self._firing and (self._armed == 0.0 or when < self._armed):
            self._arm(when)
        return entry

    def _arm(self, when: float) -> None:
        # Setting the timer also clears an expiry that was not read, so no read() is needed.
        self._armed = when
        whole = int(when)
        self._value.sec = whole
        self._value.nsec = int((when - whole) * 1e9)
        self._settime(self._fd, _TFD_TIMER_ABSTIME, self._spec_ref, None)

    def _fire(self) -> None:
        heap = self._heap
        self._firing = True
        try:
            while heap and heap[0][0] <= self._clock() + _EARLY_S:
                entry = heapq.heappop(heap)[2]
                callback = entry.callback
                if callback is not None:
                    callback(*entry.args)
        finally:
            self._firing = False
            while heap and heap[0][2].callback is None:
                heapq.heappop(heap)
            self._arm(heap[0][0] if heap else 0.0)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._heap.clear()


def timers_for(loop: asyncio.AbstractEventLoop) -> Timers:
    """The finest timers that this loop can have."""
    if type(loop).__module__.startswith("uvloop"):
        return KernelTimers(loop, monotonic)
    return LoopTimers(loop)


def clock_for(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """A clock that agrees with `timers_for(loop)`, in seconds.

    uvloop's own `time()` is the time at which its current iteration began, in whole milliseconds.
    """
    if type(loop).__module__.startswith("uvloop"):
        return monotonic
    return loop.time
