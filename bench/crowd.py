"""Many clients at once: turns arrive as a Poisson process and are given to sessions that have nothing to do."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from bench.client import UTTERANCES, Session, Turn, Utterance
from bench.timers import Handle, Timers


class Crowd:
    """Many sessions against one server. Turns arrive as a Poisson process and are given to idle sessions.

    A session's think time is what remains between its turns. An arrival that finds no idle session waits for
    one, and its latency still counts from the time it was meant for.
    """

    def __init__(self, host: str, port: int, timers: Timers, seed: int = 1, prefix: str = "bench") -> None:
        self._address = (host, port)
        self._timers = timers
        self._prefix = prefix
        self._rng = random.Random(seed)
        self._idle: deque[Session] = deque()
        self._waiting: deque[tuple[Turn, Utterance, float | None]] = deque()
        self.sessions: dict[str, Session] = {}
        self.turns: list[Turn] = []
        self.lost: list[str] = []
        self.waited = 0
        self._count = 0

    async def connect(self, count: int, at_once: int = 64) -> list[dict[str, Any]]:
        """Opens `count` sessions more; returns their `connected` messages. ConnectionError if refused."""
        names = [f"{self._prefix}-{self._count + i}" for i in range(count)]
        self._count += count
        greetings: list[dict[str, Any]] = []
        for start in range(0, count, at_once):
            batch = names[start : start + at_once]
            greetings += await asyncio.gather(*(self._open(name) for name in batch))
        return greetings

    async def _open(self, name: str) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        session = Session(name, self._timers, self._on_idle, self._on_gone)
        await loop.create_connection(lambda: session, *self._address)
        async with asyncio.timeout(20):
            greeting = await session.connected
        self.sessions[name] = session
        self._idle.append(session)
        return greeting

    def close(self) -> None:
        for session in list(self.sessions.values()):
            session.close()

    def _on_gone(self, session: Session, why: str) -> None:
        if self.sessions.pop(session.session_id, None) is not None and not session.closing:
            self.lost.append(f"{session.session_id}: {why}")
        if session in self._idle:
            self._idle.remove(session)

    def _on_idle(self, session: Session) -> None:
        if self._waiting:
            turn, utterance, barge = self._waiting.popleft()
            session.play(turn, utterance, barge)
        else:
            self._idle.append(session)

    def begin(self, turn: Turn, utterance: Utterance, barge_after_s: float | None = None) -> None:
        """Gives a turn to the session that has been idle longest, or lets it wait for one."""
        self.turns.append(turn)
        if self._idle:
            self._idle.popleft().play(turn, utterance, barge_after_s)
        else:
            self.waited += 1
            self._waiting.append((turn, utterance, barge_after_s))

    def poisson(
        self,
        start: float,
        seconds: float,
        rate: float,
        *,
        partials: bool = False,
        barge: Callable[[random.Random], float | None] | None = None,
    ) -> list[Handle]:
        """Schedules arrivals at `rate` turns/s from `start` (monotonic s) for `seconds`."""
        handles: list[Handle] = []
        utterances = UTTERANCES[partials]
        when = start + self._rng.expovariate(rate)
        while when < start + seconds:
            barge_after_s = barge(self._rng) if barge else None
            handles.append(self.schedule(when, self._rng.choice(utterances), barge_after_s))
            when += self._rng.expovariate(rate)
        return handles

    def schedule(self, when: float, utterance: Utterance, barge_after_s: float | None = None) -> Handle:
        """One turn whose `vad_end` is meant for `when`."""
        return self._timers.at(when - utterance.lead_s, self.begin, Turn(when), utterance, barge_after_s)

    async def settle(self, timeout_s: float) -> None:
        """Waits until every turn begun is over; those that are not after `timeout_s` get an error."""
        give_up = monotonic() + timeout_s
        while self._waiting or any(session.turn is not None for session in self.sessions.values()):
            if monotonic() > give_up:
                break
            await asyncio.sleep(0.05)
        for session in self.sessions.values():
            if session.turn is not None:
                session.turn.error = session.turn.error or "did not end"
        for turn, _, _ in self._waiting:
            turn.error = "never began"
        self._waiting.clear()


def failures(turns: Sequence[Turn]) -> dict[str, int]:
    """How many turns failed, by reason."""
    counts: dict[str, int] = {}
    for turn in turns:
        if turn.error:
            counts[turn.error] = counts.get(turn.error, 0) + 1
    return counts
