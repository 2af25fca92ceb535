"""Who has the floor: begins the session's turns, stops them, and tells the client and the memory how each one went."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from orchestrator.conversation.answer import Question
from orchestrator.conversation.speculation import Speculation
from orchestrator.conversation.turn import Deliver, Turn
from orchestrator.conversation.understanding import Understanding
from orchestrator.core.budget import MAX_STT_MS, Breakdown, Ledger
from orchestrator.core.fsm import Event, EventKind, Machine, State

if TYPE_CHECKING:
    from orchestrator.conversation.memory import Memory
    from orchestrator.conversation.outbox import Outbox
    from orchestrator.conversation.playback import Heard
    from orchestrator.conversation.runtime import Runtime

BREAKDOWNS_KEPT = 5

_STOP_OUTCOMES = {
    EventKind.CANCEL: "cancelled",
    EventKind.FAILED: "failed",
    EventKind.DISCONNECTED: "abandoned",
}


class TaskOwner(Protocol):
    """Who waits for tasks that are ending."""

    def own(self, task: asyncio.Task[None]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Stopped:
    turn: Turn
    heard: Heard
    breakdown: Breakdown


class TurnTaking:
    """A session's turn in progress, if any. The state machine decides; the methods here are its effects.

    Each takes the machine as it is after the transition, and the event that caused it.
    """

    __slots__ = (
        "_deliver", "_outbox", "_owner", "_runtime", "_session_id", "_speculation", "_stopped", "_stt_ms", "breakdowns",
        "memory", "turn",
    )  # fmt: skip

    def __init__(
        self, runtime: Runtime, session_id: str, memory: Memory, outbox: Outbox, deliver: Deliver, owner: TaskOwner
    ) -> None:
        self.memory = memory
        self.turn: Turn | None = None
        self.breakdowns: deque[Breakdown] | None = None
        self._runtime = runtime
        self._session_id = session_id
        self._outbox = outbox
        self._deliver = deliver
        self._owner = owner
        self._speculation: Speculation | None = None
        self._stopped: _Stopped | None = None
        self._stt_ms: float | None = None

    def note_stt_latency(self, timestamp: float | None) -> None:
        """What STT took for the fragment just received, if its `timestamp` (Unix s) makes that known and sane."""
        if timestamp is not None:
            late_ms = (self._runtime.wall() - timestamp) * 1000.0
            self._stt_ms = late_ms if 0.0 <= late_ms <= MAX_STT_MS else None

    def speculate(self, machine: Machine, event: Event) -> None:
        """Ask early about the utterance as it reads now."""
        if self._runtime.settings.speculation == "off":
            return
        if self._speculation is None:
            self._speculation = Speculation(self._runtime, self._session_id, self._begin_early, self._disown)
        self._speculation.consider(machine.transcript.text, machine.turn_number + 1, event.is_final)

    def drop_speculation(self) -> None:
        """Whatever was asked early is given up."""
        if self._speculation is not None:
            self._speculation.drop()

    def start_turn(self, machine: Machine, event: Event) -> None:
        """Answer the utterance."""
        text, speculation = machine.transcript.text, self._speculation
        stt_ms, self._stt_ms = self._stt_ms, None
        early = speculation.adopt_turn(text, machine.turn_number) if speculation is not None else None
        if early is not None:
            self.turn = early
            early.release(event.at, stt_ms)
        else:
            ledger = self._open_ledger(event.at, stt_ms)
            adopted = speculation.adopt(text) if speculation is not None else None
            if adopted is not None:
                over = max(adopted.finished_at.values(), default=event.at) if adopted.done else event.at
                ledger.saved_ms = max(0.0, (over - adopted.started) * 1000.0)
            self.turn = self._make_turn(text, machine.turn_number, ledger, adopted)
            self.turn.start()
        if "progress" in self._outbox.events:
            self._outbox.send("processing", stage="understanding", progress=0.0, details={"text": text})

    def _open_ledger(self, started: float, stt_ms: float | None) -> Ledger:
        settings = self._runtime.settings
        deadline_ms = (
            max(settings.intent_timeout_ms, settings.rag_timeout_ms)
            + settings.llm_timeout_ms * (2 if settings.llm_fallback_base_url else 1)
            + settings.tts_timeout_ms
        )
        return Ledger(started, settings.e2e_budget_ms, deadline_ms, stt_ms)

    def _make_turn(
        self, text: str, number: int, ledger: Ledger, adopted: Understanding | None, held: bool = False
    ) -> Turn:
        question = Question(self._session_id, number, text, self.memory.history())
        return Turn(self._runtime, question, ledger, self._deliver, self._is_writable, adopted, held)

    def _begin_early(self, text: str, number: int, understanding: Understanding) -> Turn:
        ledger = self._open_ledger(understanding.started, None)
        turn = self._make_turn(text, number, ledger, understanding, held=True)
        turn.start()
        return turn

    def _disown(self, turn: Turn) -> None:
        for task in turn.give_tasks():
            self._owner.own(task)

    def stop_turn(self, machine: Machine, event: Event) -> None:
        """Stop the turn. Unless the user is simply not done, history keeps the question and what was heard."""
        turn = self._take_turn()
        if turn is None:
            return
        heard = turn.stop()
        self._disown(turn)
        self._outbox.drop_audio()
        user_goes_on = machine.state in (State.LISTENING, State.THINKING)
        if not user_goes_on:
            self.memory.add_turn(turn.number, turn.question.text, heard.text)
        breakdown = self._close_books(turn, event, _STOP_OUTCOMES.get(event.kind, "interrupted"))
        self._stopped = _Stopped(turn, heard, breakdown)

    def announce_response(self, machine: Machine, event: Event) -> None:
        """`response_ready`, just before the first audio byte; `event.text` is the first clause."""
        turn = self.turn
        if turn is None:
            return
        breakdown = turn.breakdown(event.at)
        rate = turn.playback.sample_rate if turn.playback is not None else self._runtime.settings.tts_sample_rate
        self._outbox.send(
            "response_ready",
            turn_number=turn.number,
            text=event.text,
            is_partial=turn.more_follows,
            intent=turn.intent.name,
            confidence=turn.intent.confidence,
            thinking_ms=breakdown.get("thinking_ms", 0.0),
            audio=event.kind is EventKind.FIRST_AUDIO,
            audio_format=audio_format(rate),
            latency_breakdown=breakdown,
        )
        if "progress" in self._outbox.events:
            self._outbox.send("processing", stage="speaking", progress=1.0, details={})

    def announce_interrupted(self, machine: Machine, event: Event) -> None:
        """`interrupted`, written at once."""
        if self._stopped is None:
            return
        heard = self._stopped.heard
        took = self._runtime.clock() - event.at
        self._outbox.send(
            "interrupted",
            turn_number=self._stopped.turn.number,
            message="the caller spoke: the answer was stopped",
            heard_text=heard.text,
            played_ms=heard.played_ms,
            stop_latency_ms=round(took * 1000.0, 3),
        )
        self._outbox.flush()
        self._runtime.observer.barge_in_stopped(self._runtime.clock() - event.at)

    def complete_turn(self, machine: Machine, event: Event) -> None:
        """All was said and heard."""
        turn = self._take_turn()
        if turn is None:
            return
        turn.end()
        self._disown(turn)
        text = " ".join(turn.spoken)
        self.memory.add_turn(turn.number, turn.question.text, text)
        breakdown = self._close_books(turn, event, "truncated" if turn.truncated else "completed")
        self._send_turn_complete(machine, turn, text, breakdown, cancelled=False)

    def complete_cancelled(self, machine: Machine, event: Event) -> None:
        """`turn_complete` of a turn the client cancelled, written at once."""
        self._complete_stopped(machine, cancelled=True)
        self._outbox.flush()

    def complete_failed(self, machine: Machine, event: Event) -> None:
        """`turn_complete` of a turn that failed."""
        self._complete_stopped(machine, cancelled=False)

    def _complete_stopped(self, machine: Machine, cancelled: bool) -> None:
        if self._stopped is not None:
            stopped = self._stopped
            self._send_turn_complete(machine, stopped.turn, stopped.heard.text, stopped.breakdown, cancelled)

    def _send_turn_complete(
        self, machine: Machine, turn: Turn, heard: str, breakdown: Breakdown, cancelled: bool
    ) -> None:
        self._outbox.send(
            "turn_complete",
            turn_number=turn.number,
            state=machine.state.value,
            text=" ".join(turn.spoken),
            heard_text=heard,
            cancelled=cancelled,
            truncated=turn.truncated,
            degraded=turn.degraded,
            latency_breakdown=breakdown,
        )

    def _take_turn(self) -> Turn | None:
        turn, self.turn = self.turn, None
        return turn

    def _close_books(self, turn: Turn, event: Event, outcome: str) -> Breakdown:
        breakdown = turn.breakdown(event.at)
        if self.breakdowns is None:
            self.breakdowns = deque(maxlen=BREAKDOWNS_KEPT)
        self.breakdowns.append(breakdown)
        self._runtime.observer.turn_ended(outcome, breakdown)
        return breakdown

    def _is_writable(self) -> bool:
        return self._outbox.writable


def audio_format(sample_rate: int) -> dict[str, str | int]:
    """The protocol's description of the audio we send."""
    return {"encoding": "pcm_s16le", "sample_rate": sample_rate, "channels": 1}
