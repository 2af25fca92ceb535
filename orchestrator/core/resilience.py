"""Policies for services that are slow, failing or gone: circuit breaker, latency quantile, budget for extra requests.

Pure: time comes in as seconds on any clock that never goes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum


class BreakerState(StrEnum):
    """What a circuit breaker does with calls: pass them, pass one, refuse them."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


class Permit(Enum):
    """What `admit` decided. The holder of NORMAL or PROBE reports back once: succeed, fail or release."""

    NORMAL = "normal"
    PROBE = "probe"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens and how long it stays open.

    It opens after `consecutive` failures without a success between them, or when at least `failures` calls of the last
    `window` seconds failed and they are at least `share` (0…1) of all. The first pause is `pause` seconds; each failed
    probe doubles it up to `longest_pause`.
    """

    consecutive: int = 5
    failures: int = 10
    share: float = 0.5
    window: float = 10.0
    pause: float = 0.5
    longest_pause: float = 10.0


class Breaker:
    """A circuit breaker. Calls that began before it opened do not count when they end after."""

    __slots__ = ("_failed", "_in_a_row", "_open_until", "_pause", "_policy", "_probing", "_slice", "_succeeded",
                 "state")  # fmt: skip

    def __init__(self, policy: BreakerPolicy = BreakerPolicy()) -> None:
        self._policy = policy
        self.state = BreakerState.CLOSED
        self._pause = policy.pause
        self._open_until = 0.0
        self._probing = False
        self._forget()

    def admit(self, now: float) -> Permit:
        """Whether a call may be made at `now`."""
        if self.state is BreakerState.CLOSED:
            return Permit.NORMAL
        if self.state is BreakerState.OPEN:
            if now < self._open_until:
                return Permit.REFUSED
            self.state = BreakerState.HALF_OPEN
        if self._probing:
            return Permit.REFUSED
        self._probing = True
        return Permit.PROBE

    def succeed(self, permit: Permit, now: float) -> None:
        """A call gave a usable answer."""
        if permit is Permit.PROBE:
            self._probing = False
            self.state = BreakerState.CLOSED
            self._pause = self._policy.pause
            self._forget()
        elif self.state is BreakerState.CLOSED:
            self._in_a_row = 0
            self._roll(now)
            self._succeeded[1] += 1

    def fail(self, permit: Permit, now: float) -> None:
        """A call failed, by the service's fault."""
        policy = self._policy
        if permit is Permit.PROBE:
            self._probing = False
            self._pause = min(self._pause * 2, policy.longest_pause)
            self._open(now)
        elif self.state is BreakerState.CLOSED:
            self._in_a_row += 1
            self._roll(now)
            self._failed[1] += 1
            failed = sum(self._failed)
            many = failed >= policy.failures and failed >= policy.share * (failed + sum(self._succeeded))
            if many or self._in_a_row >= policy.consecutive:
                self._open(now)

    def release(self, permit: Permit) -> None:
        """A call ended without saying anything about the service."""
        if permit is Permit.PROBE:
            self._probing = False

    def _open(self, now: float) -> None:
        self.state = BreakerState.OPEN
        self._open_until = now + self._pause

    def _forget(self) -> None:
        self._in_a_row = 0
        self._slice = -2
        self._succeeded = [0, 0]
        self._failed = [0, 0]

    def _roll(self, now: float) -> None:
        """Counts are kept for the current and the previous half of the window."""
        current = int(now / (self._policy.window / 2))
        if current == self._slice:
            return
        adjacent = current == self._slice + 1
        self._succeeded = [self._succeeded[1] if adjacent else 0, 0]
        self._failed = [self._failed[1] if adjacent else 0, 0]
        self._slice = current


LEAST_HEDGE_SECONDS = 0.005
"""A service that is faster than this has no tail worth a second request."""


class RollingQuantile:
    """A quantile of the last `size` values, worked out anew after every `refresh`; None below `least` values."""

    __slots__ = ("_least", "_next", "_quantile", "_refresh", "_since", "_size", "_values", "value")

    def __init__(self, quantile: float, size: int = 256, refresh: int = 32, least: int = 20) -> None:
        self._quantile = quantile
        self._size = size
        self._refresh = refresh
        self._least = least
        self._values: list[float] = []
        self._next = 0
        self._since = 0
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Take one value in."""
        values = self._values
        if len(values) < self._size:
            values.append(value)
        else:
            values[self._next] = value
            self._next = (self._next + 1) % self._size
        self._since += 1
        count = len(values)
        if self._since >= self._refresh or count == self._least:
            self._since = 0
            if count >= self._least:
                self.value = sorted(values)[min(count - 1, int(self._quantile * count))]


class ExtraBudget:
    """A token bucket: each request earns `share` of an extra one, at most `most` are saved up."""

    __slots__ = ("_most", "_share", "_tokens")

    def __init__(self, share: float = 0.05, most: float = 10.0, start: float = 1.0) -> None:
        self._share = share
        self._most = most
        self._tokens = start

    def earn(self) -> None:
        """A request was made."""
        self._tokens = min(self._most, self._tokens + self._share)

    def spend(self) -> bool:
        """Take one extra request out, if there is one."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def hedge_after(p95: float | None, left: float) -> float | None:
    """Seconds after which a second request is worth sending, when `left` seconds remain for the answer.

    A tenth more than p95: a service with even latencies answers most of its slowest requests within that. None where
    nothing is known yet, or where a second request would hardly have time (half of p95 at least).
    """
    if p95 is None:
        return None
    delay = max(p95 * 1.1, LEAST_HEDGE_SECONDS)
    return delay if delay + p95 * 0.5 < left else None


def may_retry(typical: float | None, left: float) -> bool:
    """Whether a request that failed at once can still be answered, when `left` seconds remain and p95 is `typical`."""
    return left > (typical if typical is not None else 0.0) and left > 0.0
