"""How much one client may send, and how long it may stay silent. All of it is per connection."""

from __future__ import annotations

from typing import Final

MESSAGES_PER_SECOND: Final = 200.0
MESSAGE_BURST: Final = 400.0

CONTROL_FRAMES_PER_SECOND: Final = 20.0
CONTROL_FRAME_BURST: Final = 100.0

MAX_FRAGMENTS: Final = 4096
"""Pieces of one message; MAX_MESSAGE_BYTES bounds their sum, this bounds a message of empty pieces."""

MAX_BAD_MESSAGES: Final = 10

PING_INTERVAL_S: Final = 10.0
PONG_TIMEOUT_S: Final = 20.0
CLOSING_TIMEOUT_S: Final = 2.0
"""From our close frame to the connection's end, whatever the client does."""

WRITE_HIGH_WATER: Final = 256 * 1024
WRITE_LOW_WATER: Final = 64 * 1024

MAX_QUEUED_BYTES: Final = 1 << 20
"""Kept for a client that does not read, beyond what the transport holds. Sessions stop long before."""


class TokenBucket:
    """Lets `rate` things a second pass, and `burst` at once."""

    __slots__ = ("_burst", "_rate", "_tokens", "_updated")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._updated = now

    def take(self, now: float) -> bool:
        """Whether one more may pass at `now` (seconds)."""
        tokens = self._tokens + (now - self._updated) * self._rate
        self._updated = now
        if tokens > self._burst:
            tokens = self._burst
        if tokens < 1.0:
            self._tokens = tokens
            return False
        self._tokens = tokens - 1.0
        return True
