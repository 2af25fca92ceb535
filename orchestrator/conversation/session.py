"""A conversation: takes what the caller's side sends, steps the state machine, runs its effects.

Everything here runs on the loop's thread and without an await, so a barge-in is answered within the call that
brings it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.conversation.memory import Memory
from orchestrator.conversation.outbox import Link, Outbox
from orchestrator.conversation.turn import (
    ClauseSpoken,
    ClauseWritten,
    Output,
    ReaderStuck,
    SpeechOver,
    StageFailed,
    Turn,
    TurnBroken,
)
from orchestrator.conversation.turn_taking import TurnTaking, audio_format
from orchestrator.core.fsm import Effect, Event, EventKind, Machine, State, step
from orchestrator.core.transcript import Transcript
from orchestrator.downstream.stt import SttEvent, SttFragmentEvent, SttUserSpeaking, SttVadEnd
from orchestrator.wire.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Inbound,
    Ping,
    PlaybackReport,
    SttFragment,
    UserSpeaking,
    VadEnd,
)

if TYPE_CHECKING:
    from orchestrator.conversation.runtime import MicrophoneRelay, Runtime
    from orchestrator.errors import DownstreamError
    from orchestrator.store.record import SessionRecord

CLOSE_GOING_AWAY = 1012
CLOSE_SLOW_READER = 4408


class Host(Protocol):
    """Who keeps the sessions of a worker."""

    def own(self, task: asyncio.Task[None]) -> None:
        """Await a task that is ending."""
        ...

    def count_attached(self, change: int) -> None:
        """A session got (+1) or lost (-1) its connection."""
        ...

    def count_busy(self, change: int) -> None:
        """A session left (+1) or entered (-1) IDLE."""
        ...


class Session:
    """One conversation. Outlives its connections; `link` is the live one, or None."""

    __slots__ = (
        "__weakref__", "_draining", "_from_stt", "_host", "_outbox", "_relay", "_runtime", "_state_since", "_turns",
        "last_active", "machine", "session_id",
    )  # fmt: skip

    def __init__(self, runtime: Runtime, session_id: str, host: Host) -> None:
        self.session_id = session_id
        self.machine = Machine()
        self.last_active = runtime.clock()
        self._runtime = runtime
        self._host = host
        self._outbox = Outbox(session_id, runtime.wall)
        memory = Memory(runtime.wall(), runtime.settings.history_turns)
        self._turns = TurnTaking(runtime, session_id, memory, self._outbox, self._deliver, host)
        self._relay: MicrophoneRelay | None = None
        self._state_since = runtime.clock()
        self._draining = False
        self._from_stt = False

    @property
    def link(self) -> Link | None:
        """The live connection."""
        return self._outbox.link

    def restore(self, record: SessionRecord) -> None:
        """Go on from what the store has. Sequence numbers leap, since some may have been sent after the last write."""
        transcript = Transcript()
        if record.state in (State.IDLE, State.LISTENING):
            transcript = Transcript(tuple(record.utterance), (record.partial,) if record.partial else ())
        self.machine = Machine(State.IDLE, record.turn_number, transcript)
        self._turns.memory = Memory.restored(record, self._runtime.settings.history_turns)
        self._outbox.seq = record.seq + 1000

    def record(self) -> SessionRecord:
        """What the store keeps."""
        machine = self.machine
        return self._turns.memory.record(
            self.session_id,
            machine.state.value,
            machine.turn_number,
            machine.transcript,
            self._outbox.seq,
            self._runtime.wall(),
        )

    def attach(self, link: Link, events: frozenset[str], last_seq: int | None, resumed: bool) -> None:
        """`link` is the session's connection from now on: greet it and send the control messages it missed."""
        missed = [] if last_seq is None else self._outbox.missed_since(last_seq)
        self._outbox.link = link
        self._host.count_attached(1)
        self._outbox.events = events
        self._draining = False
        self.last_active = self._runtime.clock()
        self._apply(Event(EventKind.ATTACHED, self.last_active), silent=True)
        self._runtime.observer.session_state(self.machine.state.value, 1)
        settings, tts = self._runtime.settings, self._runtime.services.tts
        self._outbox.send(
            "connected",
            state=self.machine.state.value,
            turn_number=self.machine.turn_number,
            resumed=resumed,
            node=self._runtime.node,
            slot=self._runtime.slot,
            protocol=PROTOCOL_VERSION,
            budget_ms=settings.e2e_budget_ms,
            audio_format=audio_format(tts.sample_rate if tts is not None else settings.tts_sample_rate),
            max_message_bytes=settings.max_message_bytes,
        )
        for payload in missed:
            link.send_text(payload)

    def detach(self, link: Link) -> None:
        """The connection is gone; the conversation stays. Ignored if `link` is no longer the live one."""
        if link is not self.link:
            return
        self._apply(Event(EventKind.DISCONNECTED, self._runtime.clock()), silent=True)
        self._runtime.observer.session_state(self.machine.state.value, -1)
        self._outbox.link = None
        self._host.count_attached(-1)
        self.last_active = self._runtime.clock()
        self._turns.drop_speculation()
        if self._relay is not None:
            self._host.own(self._runtime.loop.create_task(_close_relay(self._relay)))
            self._relay = None
        if self._runtime.services.tts is not None:
            self._runtime.services.tts.release(self.session_id)

    def drain(self, reconnect_after_ms: int) -> None:
        """The worker is going: say so, and close at the next IDLE."""
        if self.link is None or self._draining:
            return
        self._draining = True
        self._outbox.send("draining", reconnect_after_ms=reconnect_after_ms)
        self._close_if_drained()

    def receive(self, message: Inbound) -> None:
        """A message from the client."""
        now = self._runtime.clock()
        self.last_active = now
        if type(message) is SttFragment:
            self._turns.note_stt_latency(message.timestamp)
            self._apply(Event(EventKind.FRAGMENT, now, message.text, message.is_final, message.mode))
        elif type(message) is VadEnd:
            self._apply(Event(EventKind.VAD_END, now, confidence=message.confidence))
        elif type(message) is UserSpeaking:
            self._apply(Event(EventKind.USER_SPEAKING, now, confidence=message.confidence))
        elif type(message) is PlaybackReport:
            self._take_playback_report(message)
        elif type(message) is Cancel:
            self._apply(Event(EventKind.CANCEL, now))
        elif type(message) is Ping:
            self._outbox.send("pong", id=message.id)

    def receive_audio(self, pcm: bytes) -> None:
        """Microphone audio, PCM16 mono 16 kHz: on to STT."""
        self.last_active = self._runtime.clock()
        if self._relay is None:
            factory = self._runtime.services.stt_relay
            if factory is None:
                return
            self._relay = factory(self.session_id, self.receive_stt, self._stt_failed)
        self._relay.feed(pcm)

    def receive_stt(self, event: SttEvent) -> None:
        """What STT heard on this session's line."""
        if self.link is None:
            return
        now = self._runtime.clock()
        self._from_stt = True
        try:
            if isinstance(event, SttFragmentEvent):
                self._turns.note_stt_latency(event.timestamp)
                self._apply(Event(EventKind.FRAGMENT, now, event.text, event.is_final))
            elif isinstance(event, SttVadEnd):
                self._apply(Event(EventKind.VAD_END, now, confidence=event.confidence))
            elif isinstance(event, SttUserSpeaking):
                self._apply(Event(EventKind.USER_SPEAKING, now, confidence=event.confidence))
        finally:
            self._from_stt = False

    def reject(self, code: str, message: str) -> None:
        """Tell the client that something it sent was not taken."""
        self._outbox.error(code, message, retryable=False)

    def resume_writing(self) -> None:
        """The connection takes data again."""
        turn = self._turns.turn
        if turn is not None and turn.playback is not None:
            turn.playback.resume()

    def describe(self) -> dict[str, Any]:
        """For `GET /sessions/<id>`."""
        return {
            "session_id": self.session_id,
            "state": self.machine.state.value,
            "turn_number": self.machine.turn_number,
            "connected": self.link is not None,
            "node": self._runtime.node,
            "slot": self._runtime.slot,
            "text_buffer": self.machine.transcript.pieces,
            "history": self._turns.memory.as_dicts(),
            "latency_breakdowns": list(self._turns.breakdowns or ()),
        }

    def _deliver(self, turn_number: int, output: Output) -> None:
        """The one gate for stale work: what comes from a turn that is over goes no further."""
        turn = self._turns.turn
        if turn is None or not self.machine.is_current(turn_number):
            return
        if isinstance(output, (bytes, memoryview)):
            self._outbox.send_audio(output)
        else:
            self._take_output(turn, output)

    def _take_output(self, turn: Turn, output: Output) -> None:
        now = self._runtime.clock()
        if isinstance(output, (ClauseSpoken, ClauseWritten)):
            if output.index == 0:
                turn.ledger.first_audio(now)
                spoken = isinstance(output, ClauseSpoken)
                self._apply(Event(EventKind.FIRST_AUDIO if spoken else EventKind.TEXT_ANSWER, now, output.text))
            else:
                self._outbox.send("response_text", turn_number=turn.number, index=output.index, text=output.text)
        elif isinstance(output, SpeechOver):
            self._apply(Event(EventKind.SPEECH_FINISHED, now))
        elif isinstance(output, StageFailed):
            self._outbox.error(output.code, output.message, retryable=True, turn_number=turn.number)
        elif isinstance(output, TurnBroken):
            self._outbox.error(output.code, output.message, retryable=True, turn_number=turn.number)
            self._apply(Event(EventKind.FAILED, now))
        elif isinstance(output, ReaderStuck):
            self._outbox.close(CLOSE_SLOW_READER, "the client does not read: over 5 s of audio unsent")

    def _apply(self, event: Event, silent: bool = False) -> None:
        before = self.machine
        taken = step(before, event, self._runtime.policy)
        if taken.row is None:
            if not silent:
                self._note_illegal(event)
            return
        self.machine = taken.machine
        if taken.machine.state is not before.state:
            self._note_state_change(before.state, event)
        for effect in taken.row.effects:
            _EFFECTS[effect](self, event)
        if taken.machine.state is State.INTERRUPT:
            self._apply(Event(EventKind.INTERRUPTED, event.at))
        elif self._draining:
            self._close_if_drained()

    def _send_state_update(self, event: Event) -> None:
        if not event.is_final or "state" in self._outbox.events:
            machine = self.machine
            state = State.LISTENING if machine.state is State.INTERRUPT else machine.state
            self._outbox.send("state_update", state=state.value, text_buffer=machine.transcript.pieces)

    def _note_nothing_heard(self, event: Event) -> None:
        self._outbox.notice("nothing_heard", "the user's turn ended without a word")

    def _note_ignored(self, event: Event) -> None:
        if self._from_stt:
            return
        if event.kind is EventKind.FRAGMENT:
            self._outbox.notice("fragment_ignored", "the fragment adds no speech")
        else:
            message = (
                f"confidence {event.confidence:g} is below BARGE_IN_CONFIDENCE={self._runtime.policy.confidence:g}"
            )
            self._outbox.notice("speech_ignored", message)

    def _persist(self, event: Event) -> None:
        self._runtime.store.mark_dirty(self.session_id, self.record)

    def _note_illegal(self, event: Event) -> None:
        if not self._from_stt:
            self._outbox.error(
                "illegal_event",
                f"{event.kind.value} means nothing in state {self.machine.state.value}",
                retryable=False,
            )

    def _note_state_change(self, before: State, event: Event) -> None:
        now = self._runtime.clock()
        after = self.machine.state
        if self.link is not None:
            self._runtime.observer.session_state(before.value, -1)
            self._runtime.observer.session_state(after.value, 1)
            if "state" in self._outbox.events:
                latency = round((now - self._state_since) * 1000.0, 3)
                fields = {"from": before.value, "to": after.value, "trigger": event.kind.value, "latency_ms": latency}
                self._outbox.send("state_change", **fields)
        self._state_since = now
        if before is State.IDLE or after is State.IDLE:
            self._host.count_busy(-1 if after is State.IDLE else 1)
        tts = self._runtime.services.tts
        if after is State.LISTENING and tts is not None:
            tts.prepare(self.session_id)

    def _take_playback_report(self, report: PlaybackReport) -> None:
        if report.turn_number > self.machine.turn_number:
            self.reject("bad_message", f"playback: turn_number {report.turn_number} has not begun")
        elif self.machine.is_current(report.turn_number):
            turn = self._turns.turn
            if turn is not None and turn.playback is not None:
                turn.playback.report(report.played_ms, report.ended)

    def _stt_failed(self, error: DownstreamError) -> None:
        self._outbox.error("stt_failed", str(error), retryable=True)

    def _close_if_drained(self) -> None:
        if self.machine.state is State.IDLE:
            self._outbox.close(CLOSE_GOING_AWAY, "the worker is draining")


_Run = Callable[[Session, Event], None]


def _by_turns(effect: Callable[[TurnTaking, Machine, Event], None]) -> _Run:
    return lambda session, event: effect(session._turns, session.machine, event)


_EFFECTS: dict[Effect, _Run] = {
    Effect.STATE_UPDATE: Session._send_state_update,
    Effect.SPECULATE: _by_turns(TurnTaking.speculate),
    Effect.START_TURN: _by_turns(TurnTaking.start_turn),
    Effect.CANCEL_TURN: _by_turns(TurnTaking.stop_turn),
    Effect.RESPONSE_READY: _by_turns(TurnTaking.announce_response),
    Effect.ANNOUNCE_INTERRUPTED: _by_turns(TurnTaking.announce_interrupted),
    Effect.TURN_COMPLETE: _by_turns(TurnTaking.complete_turn),
    Effect.TURN_CANCELLED: _by_turns(TurnTaking.complete_cancelled),
    Effect.TURN_FAILED: _by_turns(TurnTaking.complete_failed),
    Effect.NOTE_NOTHING_HEARD: Session._note_nothing_heard,
    Effect.NOTE_IGNORED: Session._note_ignored,
    Effect.PERSIST: Session._persist,
}


async def _close_relay(relay: MicrophoneRelay) -> None:
    await relay.close()
