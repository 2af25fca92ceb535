"""The audio of one turn on its way to the caller: paced, bounded, and accountable for what was heard.

Audio goes out at most `lead_ms` ahead of the caller's playback, so a barge-in throws away little and a slow reader
costs bounded memory. What was heard is what the client reports, else what the paced clock says: sent audio plays
without a gap from the moment it is sent, and the clock stands still while nothing sent is left to play.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.conversation.pacing import Due, PacingWheel

FRAME_MS = 200.0
"""The longest frame; one that starts a turn is sent as short as it comes."""

QUEUE_MS = 400.0
"""Audio kept ready beyond the lead: with it, twice the usual deadline of a first TTS chunk. Asked for no earlier, the
next clause can take along what else was written by then, and less is thrown away when the caller interrupts."""

SLOW_READER_SECONDS = 5.0
"""A client that takes no audio for this long is closed with 4408."""

MAX_CLIENT_LAG_SECONDS = 2.0
"""How far a client's reports may stretch a turn beyond its audio: more than any jitter buffer, yet an end."""

_BYTES_PER_SAMPLE = 2
_MS_PER_CHARACTER = 55.0
"""Speech runs at about 18 characters a second; used only while a clause's length is not known yet."""


class AudioSink(Protocol):
    """Where frames go; the session's connection, or nothing while it has none."""

    @property
    def writable(self) -> bool: ...

    def send_audio(self, pcm: bytes | memoryview) -> None: ...


@dataclass(slots=True)
class _Clause:
    index: int
    text: str
    start_ms: float
    queued_ms: float = 0.0
    complete: bool = False
    announced: bool = False


@dataclass(frozen=True, slots=True)
class Heard:
    """What the caller has heard of a turn."""

    text: str
    played_ms: float


@dataclass(slots=True)
class PlaybackHooks:
    """What the session wants to know: a clause's audio is about to start, all of it was played, nobody reads."""

    announce: Callable[[int, str], None]
    finished: Callable[[], None]
    reader_stuck: Callable[[], None]


@dataclass(slots=True)
class _Queue:
    """Audio not sent yet: chunks of clauses, in order."""

    chunks: deque[tuple[_Clause, memoryview]] = field(default_factory=deque)
    size: int = 0


class Playback:
    """Takes a turn's clauses and audio in, sends paced frames out. One per turn; all calls on the loop's thread."""

    __slots__ = (
        "_bytes_per_ms", "_clauses", "_due", "_ended", "_finishing", "_frame_bytes", "_hooks", "_loop", "_low_water",
        "_play_end", "_queue", "_reported", "_reported_end", "_room", "_sent_ms", "_sink", "_stuck_since", "_wheel",
        "sample_rate",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wheel: PacingWheel,
        sink: AudioSink,
        hooks: PlaybackHooks,
        sample_rate: int,
        lead_ms: float,
    ) -> None:
        self._loop = loop
        self._wheel = wheel
        self._sink = sink
        self._hooks = hooks
        frame_ms = min(FRAME_MS, lead_ms / 2.0)
        self._low_water = (lead_ms - frame_ms) / 1000.0 + 1e-6
        self.sample_rate = sample_rate
        self._bytes_per_ms = sample_rate * _BYTES_PER_SAMPLE / 1000.0
        self._frame_bytes = int(sample_rate * frame_ms / 1000.0) * _BYTES_PER_SAMPLE
        self._queue = _Queue()
        self._clauses: list[_Clause] = []
        self._sent_ms = 0.0
        self._play_end = 0.0
        self._reported_end: float | None = None
        self._reported: tuple[float, float] | None = None
        self._due: Due | None = None
        self._room: asyncio.Future[None] | None = None
        self._stuck_since: float | None = None
        self._finishing = False
        self._ended = False

    def begin_clause(self, index: int, text: str) -> None:
        """The audio pushed from now on speaks `text`."""
        start = self._sent_ms + self._queue.size / self._bytes_per_ms
        self._clauses.append(_Clause(index, text, start))

    def push(self, pcm: bytes) -> None:
        """Audio of the clause begun last; what the lead allows is sent within this call."""
        if self._ended or not pcm:
            return
        clause = self._clauses[-1]
        clause.queued_ms += len(pcm) / self._bytes_per_ms
        self._queue.chunks.append((clause, memoryview(pcm)))
        self._queue.size += len(pcm)
        if self._due is None:
            self._pump()

    def end_clause(self) -> None:
        """The clause begun last has all its audio."""
        self._clauses[-1].complete = True

    def finish(self) -> None:
        """No more audio comes: `finished` is called once what there is was played."""
        self._finishing = True
        if self._due is None and not self._ended:
            self._pump()

    async def room(self) -> None:
        """Returns once there is room for more audio."""
        if self._ended or self._queue.size < QUEUE_MS * self._bytes_per_ms:
            return
        if self._room is None:
            self._room = self._loop.create_future()
        await self._room

    def resume(self) -> None:
        """The connection takes data again."""
        if not self._ended and self._stuck_since is not None:
            self._cancel_due()
            self._pump()

    def report(self, played_ms: float, ended: bool) -> None:
        """The client's own word on what it has played; trusted as far as what was sent."""
        if self._ended:
            return
        now = self._loop.time()
        played = min(played_ms, self._sent_ms)
        if self._reported is None or played >= self._reported[0]:
            self._reported = (played, now)
            self._reported_end = now if ended else now + (self._sent_ms - played) / 1000.0
        if self._finishing and not self._queue.size:
            self._cancel_due()
            self._pump()

    def left_ms(self) -> float:
        """Milliseconds until the caller has heard all audio that is here."""
        ahead = max(0.0, self._play_end - self._loop.time())
        return ahead * 1000.0 + self._queue.size / self._bytes_per_ms

    def played_ms(self) -> float:
        """Milliseconds of this turn's audio that the caller has heard by now."""
        now = self._loop.time()
        by_clock = self._sent_ms - max(0.0, (self._play_end - now) * 1000.0)
        if self._reported is not None:
            played, at = self._reported
            return min(by_clock, played + (now - at) * 1000.0, self._sent_ms)
        return max(0.0, by_clock)

    def stop(self) -> Heard:
        """Drop what was not sent and say what was heard. Nothing is sent or called back any more."""
        played = self.played_ms()
        self._ended = True
        # They hold the turn, and the turn holds this: no work for the garbage collector.
        self._sink, self._hooks = _NOWHERE, _UNHEARD
        self._cancel_due()
        self._queue.chunks.clear()
        self._queue.size = 0
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        return Heard(self._heard_text(played), round(played, 1))

    def _heard_text(self, played_ms: float) -> str:
        heard: list[str] = []
        for clause in self._clauses:
            left = played_ms - clause.start_ms
            if left <= 0 or not clause.queued_ms:
                break
            length = clause.queued_ms
            if clause.complete and left >= length - 1.0:
                heard.append(clause.text)
                continue
            if not clause.complete:
                length = max(length, len(clause.text) * _MS_PER_CHARACTER)
            heard.append(_words_within(clause.text, left / length))
            break
        return " ".join(part for part in heard if part)

    def _pump(self) -> None:
        """Send what is due, then arm the next look."""
        self._due = None
        if self._ended:
            return
        now = self._loop.time()
        if not self._sink.writable and self._queue.size:
            self._wait_for_reader(now)
            return
        self._stuck_since = None
        while self._queue.size and self._play_end - now <= self._low_water:
            self._send_frame(now)
            if self._ended:
                return
        self._release_room()
        if self._queue.size:
            self._due = self._wheel.at(self._play_end - self._low_water, self._pump)
        elif self._finishing:
            heard_out = self._heard_out_at()
            if heard_out <= now + 1e-6:
                self._ended = True
                self._hooks.finished()
            else:
                self._due = self._wheel.at(heard_out, self._pump)

    def _heard_out_at(self) -> float:
        """When the caller will have heard all that was sent."""
        if self._reported_end is None:
            return self._play_end
        return min(self._reported_end, self._play_end + MAX_CLIENT_LAG_SECONDS)

    def _send_frame(self, now: float) -> None:
        clause, chunk = self._queue.chunks[0]
        if not clause.announced:
            clause.announced = True
            self._hooks.announce(clause.index, clause.text)
        frame = self._take_frame(clause, chunk)
        size = len(frame)
        self._queue.size -= size
        length_ms = size / self._bytes_per_ms
        self._sent_ms += length_ms
        self._play_end = max(self._play_end, now) + length_ms / 1000.0
        self._sink.send_audio(frame)

    def _take_frame(self, clause: _Clause, chunk: memoryview) -> bytes | memoryview:
        chunks = self._queue.chunks
        if len(chunk) > self._frame_bytes:
            chunks[0] = (clause, chunk[self._frame_bytes :])
            return chunk[: self._frame_bytes]
        chunks.popleft()
        if len(chunk) == self._frame_bytes or not chunks:
            return chunk
        parts, size = [chunk], len(chunk)
        while chunks and chunks[0][0] is clause and size + len(chunks[0][1]) <= self._frame_bytes:
            parts.append(chunks.popleft()[1])
            size += len(parts[-1])
        return chunk if len(parts) == 1 else b"".join(parts)

    def _wait_for_reader(self, now: float) -> None:
        if self._stuck_since is None:
            self._stuck_since = now
        give_up = self._stuck_since + SLOW_READER_SECONDS
        if now >= give_up:
            self._hooks.reader_stuck()
        else:
            self._due = self._wheel.at(give_up, self._pump)

    def _release_room(self) -> None:
        if self._room is not None and self._queue.size < QUEUE_MS * self._bytes_per_ms:
            if not self._room.done():
                self._room.set_result(None)
            self._room = None

    def _cancel_due(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


class _Nowhere:
    writable = False

    def send_audio(self, pcm: bytes | memoryview) -> None:
        return


_NOWHERE = _Nowhere()
_UNHEARD = PlaybackHooks(announce=lambda index, text: None, finished=lambda: None, reader_stuck=lambda: None)


def _words_within(text: str, share: float) -> str:
    """The whole words of `text` that end within its first `share` (0…1), counted in characters."""
    if share >= 1.0:
        return text
    limit = len(text) * share
    heard: list[str] = []
    end = 0
    for word in text.split():
        end += len(word) + (1 if heard else 0)
        if end > limit:
            break
        heard.append(word)
    return " ".join(heard)
