"""Clauses on their way from the answer's stream to speech."""

from __future__ import annotations

import asyncio
from collections import deque


class ClauseFeed:
    """What was cut and not taken yet. One producer, one consumer, both on the loop's thread."""

    __slots__ = ("_clauses", "_closed", "_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._clauses: deque[str] = deque()
        self._closed = False
        self._waiting: asyncio.Future[None] | None = None

    def put(self, clause: str) -> None:
        """One more clause."""
        self._clauses.append(clause)
        self._wake()

    def close(self) -> None:
        """No more clauses come."""
        self._closed = True
        self._wake()

    async def filled(self) -> bool:
        """Waits for a clause; False when none is left and none comes."""
        while not self._clauses:
            if self._closed:
                return False
            self._waiting = self._loop.create_future()
            await self._waiting
        return True

    def take(self, max_chars: int = 0) -> str:
        """The next clause, with those that wait behind it as long as all of it has `max_chars` at most."""
        taken = [self._clauses.popleft()]
        size = len(taken[0])
        while self._clauses and size + 1 + len(self._clauses[0]) <= max_chars:
            taken.append(self._clauses.popleft())
            size += 1 + len(taken[-1])
        return " ".join(taken)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
        self._waiting = None
