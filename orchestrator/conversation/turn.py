"""One turn: intent beside RAG, the answer's stream, its clauses, their speech, the paced audio.

Everything a turn brings forth leaves it through `deliver(turn_number, output)`, where the session drops what is stale.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.conversation.answer import AnswerStream, Question
from orchestrator.conversation.feed import ClauseFeed
from orchestrator.conversation.playback import Heard, Playback, PlaybackHooks
from orchestrator.conversation.understanding import Understanding
from orchestrator.core.budget import Breakdown, Ledger
from orchestrator.core.clauses import ClauseCutter
from orchestrator.downstream.types import UNKNOWN_INTENT, Call, Intent, TtsService
from orchestrator.errors import DownstreamError, Failure

if TYPE_CHECKING:
    from orchestrator.conversation.runtime import Runtime

MAX_ANSWER_CHARS = 16_384
"""Twenty minutes of speech; an answer that goes on is cut there and the turn is `truncated`."""

JOINED_CHARS = 160
"""Sentences behind the first clause that wait together are spoken as one request up to this length, some nine seconds
of speech: fewer requests, and the voice knows what comes next."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClauseSpoken:
    """The audio of clause `index` is about to start."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ClauseWritten:
    """Clause `index` will have no audio; its text is the answer."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class StageFailed:
    """The caller should know that a stage failed; the turn goes on."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class SpeechOver:
    """All was said, and played as far as can be known."""


@dataclass(frozen=True, slots=True)
class TurnBroken:
    """There will be no answer."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ReaderStuck:
    """The client takes no audio."""


Output = ClauseSpoken | ClauseWritten | StageFailed | SpeechOver | TurnBroken | ReaderStuck | bytes | memoryview
Deliver = Callable[[int, Output], None]


class Turn:
    """Runs from `start()` until it delivered SpeechOver or TurnBroken, or until `stop()`.

    A `held` turn is a guess at what will be asked: it prepares the answer up to its first audio, and delivers nothing
    before `release()`.
    """

    def __init__(
        self,
        runtime: Runtime,
        question: Question,
        ledger: Ledger,
        deliver: Deliver,
        writable: Callable[[], bool],
        adopted: Understanding | None = None,
        held: bool = False,
    ) -> None:
        self.question = question
        self.number = question.turn_number
        self.ledger = ledger
        self.spoken: list[str] = []
        self.playback: Playback | None = None
        self._runtime = runtime
        self._deliver = deliver
        self._writable = writable
        self._adopted = adopted
        self._understanding: Understanding | None = adopted
        self._answer = AnswerStream(runtime, question, ledger)
        self._clauses = ClauseFeed(runtime.loop)
        self._written = 0
        self._answer_complete = False
        self._speech_failed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._released: asyncio.Future[None] | None = runtime.loop.create_future() if held else None

    def start(self) -> None:
        """Begin; the turn owns its two tasks until they are over."""
        loop = self._runtime.loop
        self._tasks = [loop.create_task(self._think()), loop.create_task(self._speak())]
        for task in self._tasks:
            task.add_done_callback(self._task_over)

    def release(self, ended_at: float, stt_ms: float | None) -> None:
        """The speech that a held turn was begun for ended at `ended_at`: what is prepared goes out now."""
        self._note_intent()
        self.ledger.rebase(ended_at, stt_ms)
        if self._released is not None and not self._released.done():
            self._released.set_result(None)

    @property
    def broken(self) -> bool:
        """Whether a held turn came to its end without an answer: it is of no use then."""
        thinking, speaking = self._tasks
        failed = thinking.done() and (thinking.cancelled() or thinking.exception() is not None)
        return failed or speaking.done() or bool(self.degraded)

    def stop(self) -> Heard:
        """Abort every downstream call, drop all audio that was not sent, and say what was heard."""
        for task in self._tasks:
            task.cancel()
        if self._understanding is not None:
            self._understanding.cancel()
        return self.playback.stop() if self.playback is not None else Heard(" ".join(self._silent_text()), 0.0)

    def end(self) -> None:
        """All was said and heard: let go of what is left."""
        if self._understanding is not None:
            self._understanding.cancel()
        if self.playback is not None:
            self.playback.stop()

    def give_tasks(self) -> list[asyncio.Task[None]]:
        """The turn's tasks and its understanding's, which are the caller's to wait for: the turn is over.

        It keeps none, because a cancelled task holds its frames by the exception, and they hold the turn.
        """
        tasks, self._tasks = self._tasks, []
        return tasks + (self._understanding.give_tasks() if self._understanding is not None else [])

    @property
    def intent(self) -> Intent:
        return self._understanding.intent if self._understanding is not None else UNKNOWN_INTENT

    def breakdown(self, now: float) -> Breakdown:
        """The latency breakdown as far as the turn has come by `now` (loop seconds)."""
        self._note_intent()
        return self.ledger.breakdown(now)

    @property
    def degraded(self) -> list[str]:
        """The stages that failed, each once."""
        failures = self._understanding.failures if self._understanding is not None else []
        stages = [*failures, *self._answer.degraded, *(["tts"] if self._speech_failed else [])]
        return list(dict.fromkeys(stages))

    @property
    def truncated(self) -> bool:
        return self._answer.truncated

    @property
    def more_follows(self) -> bool:
        """Whether clauses follow the first one."""
        return self._written > 1 or not self._answer_complete

    @property
    def writable(self) -> bool:
        return self._writable()

    def send_audio(self, pcm: bytes | memoryview) -> None:
        """A frame that is due, from the playback."""
        self._deliver(self.number, pcm)

    async def _think(self) -> None:
        """Understand the question and cut the answer into clauses."""
        runtime, question, ledger = self._runtime, self.question, self.ledger
        understanding = self._adopted or Understanding(runtime, question.session_id, self.number, question.text)
        self._understanding = understanding
        ledger.rag_answers = runtime.services.llm is None
        if runtime.services.intent is not None:
            ledger.begin("intent", understanding.started)
        if not ledger.rag_answers:
            await self._settle(understanding)
        cutter = ClauseCutter()
        size = 0
        pieces = self._answer.pieces(understanding.intent, understanding.retrieval)
        async with aclosing(pieces) as deltas:
            async for delta in deltas:
                for clause in cutter.push(delta):
                    self._write(clause)
                size += len(delta)
                if size > MAX_ANSWER_CHARS:
                    self._answer.truncated = True
                    break
        self._answer_complete = True
        if rest := cutter.flush():
            self._write(rest)
        elif not self._written and runtime.settings.fallback_text:
            self._write(runtime.settings.fallback_text)
        self._clauses.close()

    async def _settle(self, understanding: Understanding) -> None:
        if self._runtime.services.rag is not None:
            self.ledger.begin("rag", understanding.started)
        await understanding.settled()
        if "rag" in understanding.finished_at:
            self.ledger.end("rag", understanding.finished_at["rag"])

    def _write(self, clause: str) -> None:
        if not self._written:
            now = self._runtime.clock()
            self.ledger.end("first_clause", now)
            self.ledger.answerable(now)
            self._answer.relax(clause)
        self._written += 1
        self._clauses.put(clause)

    async def _speak(self) -> None:
        """Say the clauses in order; what cannot be said is delivered as text."""
        tts = self._runtime.services.tts
        index = 0
        while await self._clauses.filled():
            speaking = tts is not None and not self._speech_failed
            if speaking and self.playback is not None:
                await self.playback.room()
            clause = self._clauses.take(JOINED_CHARS if speaking and index else 0)
            self.spoken.append(clause)
            if tts is None or self._speech_failed:
                await self._until_released()
                self._deliver(self.number, ClauseWritten(index, clause))
            else:
                await self._speak_clause(tts, index, clause)
            index += 1
        await self._until_released()
        if not index:
            self._deliver(self.number, TurnBroken(*self._answer.failure))
        elif self.playback is not None:
            self.playback.finish()
        else:
            self._deliver(self.number, SpeechOver())

    async def _speak_clause(self, tts: TtsService, index: int, clause: str) -> None:
        clock, ledger, settings = self._runtime.clock, self.ledger, self._runtime.settings
        timeout = settings.tts_timeout_ms
        if index == 0:
            timeout = ledger.left_ms(timeout, clock())
            ledger.begin("tts_first_chunk", clock())
        elif self.playback is not None:
            # The caller waits for it only when what is here has been heard.
            timeout += self.playback.left_ms()
        call = Call(self.question.session_id, self.number, f"tts-{index}", timeout, settings.stall_timeout_ms)
        begun = False
        try:
            async with aclosing(tts.synthesize(clause, call)) as chunks:
                async for pcm in chunks:
                    if not begun:
                        ledger.end("tts_first_chunk", clock())
                        await self._until_released()
                    playback = self.playback or self._open_playback(tts.sample_rate)
                    if not begun:
                        begun = True
                        playback.begin_clause(index, clause)
                    playback.push(pcm)
                    await playback.room()
            if not begun:
                raise DownstreamError("tts", Failure.BAD_ANSWER, "the stream ended without audio")
        except DownstreamError as error:
            ledger.end("tts_first_chunk", clock())
            self._speech_failed = True
            await self._until_released()
            if not begun:
                self._deliver(self.number, ClauseWritten(index, clause))
            self._deliver(self.number, StageFailed("tts_failed", str(error)))
        if begun and self.playback is not None:
            self.playback.end_clause()

    def _note_intent(self) -> None:
        if self._understanding is not None and "intent" in self._understanding.finished_at:
            self.ledger.end("intent", self._understanding.finished_at["intent"])

    async def _until_released(self) -> None:
        if self._released is not None:
            await self._released
            self._released = None

    def _open_playback(self, sample_rate: int) -> Playback:
        runtime, number, deliver = self._runtime, self.number, self._deliver
        hooks = PlaybackHooks(
            announce=lambda index, text: deliver(number, ClauseSpoken(index, text)),
            finished=lambda: deliver(number, SpeechOver()),
            reader_stuck=lambda: deliver(number, ReaderStuck()),
        )
        self.playback = Playback(runtime.loop, runtime.wheel, self, hooks, sample_rate, runtime.settings.audio_lead_ms)
        return self.playback

    def _silent_text(self) -> list[str]:
        """Without audio, what was delivered as text counts as heard."""
        return self.spoken if self._runtime.services.tts is None or self._speech_failed else []

    def _task_over(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("turn %d of session %s failed", self.number, self.question.session_id, exc_info=error)
        self._deliver(self.number, TurnBroken("internal_error", "the turn failed inside the orchestrator"))
