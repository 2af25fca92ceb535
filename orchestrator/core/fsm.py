"""The conversation's state machine: one table, and everything that changes state lives in this file.

`step(machine, event, policy)` returns the next machine and the effects to run; the session only runs them. For each
state and event the rows are tried in order and the first whose guard holds is taken. What has no row is illegal: the
machine stays as it is and the step says so. Time comes in with the events (`at`, seconds on any monotonic clock).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum

from orchestrator.core.transcript import Mode, Transcript, normalise

LATE_FINAL_SECONDS = 1.5
"""STT services confirm an utterance up to about a second after its end; such a confirmation is not new speech."""


class State(StrEnum):
    IDLE = "IDLE"
    LISTENING = "LISTENING"
    THINKING = "THINKING"
    SPEAKING = "SPEAKING"
    INTERRUPT = "INTERRUPT"


class EventKind(StrEnum):
    FRAGMENT = "fragment"
    USER_SPEAKING = "user_speaking"
    VAD_END = "vad_end"
    FIRST_AUDIO = "first_audio"
    TEXT_ANSWER = "text_answer"
    SPEECH_FINISHED = "speech_finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    CANCEL = "cancel"
    ATTACHED = "attached"
    DISCONNECTED = "disconnected"


class Effect(StrEnum):
    """What the session does on a transition, in the order the row lists them."""

    STATE_UPDATE = "state_update"
    SPECULATE = "speculate"
    START_TURN = "start turn"
    CANCEL_TURN = "cancel turn"
    RESPONSE_READY = "response_ready"
    ANNOUNCE_INTERRUPTED = "interrupted"
    TURN_COMPLETE = "turn_complete"
    TURN_CANCELLED = "turn_complete (cancelled)"
    TURN_FAILED = "error, turn over"
    NOTE_NOTHING_HEARD = "notice nothing_heard"
    NOTE_IGNORED = "notice (ignored)"
    PERSIST = "persist"


class Turn(Enum):
    """What a row does to the utterance and to the turn number."""

    KEEP = "keep"
    MERGE = "merge fragment"
    BEGIN = "begin utterance"
    NEXT = "turn + 1"
    MERGE_NEXT = "merge fragment, turn + 1"
    CLEAR = "clear utterance"


@dataclass(frozen=True, slots=True)
class Policy:
    """When speech over the agent counts. `confidence` is 0…1, `min_words` counts words of a fragment."""

    confidence: float = 0.7
    min_words: int = 1


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. Fields that a kind does not use keep their defaults."""

    kind: EventKind
    at: float = 0.0
    text: str = ""
    is_final: bool = False
    mode: Mode | None = None
    confidence: float = 1.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a conversation stands. `turn_number` counts turns begun; `ended_at` is when `vad_end` came."""

    state: State = State.IDLE
    turn_number: int = 0
    transcript: Transcript = field(default_factory=Transcript)
    ended_at: float = -1e9

    @property
    def turn_runs(self) -> bool:
        return self.state is State.THINKING or self.state is State.SPEAKING

    def is_current(self, turn_number: int) -> bool:
        """The gate for stale work: whether what comes from turn `turn_number` still counts."""
        return self.turn_runs and turn_number == self.turn_number


Guard = Callable[[Machine, Event, Policy], bool]


def has_words(machine: Machine, event: Event, policy: Policy) -> bool:
    """the fragment has a word"""
    return bool(event.text) and not event.text.isspace()


def has_text(machine: Machine, event: Event, policy: Policy) -> bool:
    """the utterance has text"""
    return not machine.transcript.empty


def confident(machine: Machine, event: Event, policy: Policy) -> bool:
    """voice confidence ≥ BARGE_IN_CONFIDENCE"""
    return event.confidence >= policy.confidence


def confirms_utterance(machine: Machine, event: Event, policy: Policy) -> bool:
    """it repeats the utterance just ended"""
    return event.at - machine.ended_at <= LATE_FINAL_SECONDS and machine.transcript.says(event.text)


def corrects_utterance(machine: Machine, event: Event, policy: Policy) -> bool:
    """a late final that corrects the utterance just ended"""
    return (
        event.is_final
        and event.mode is None
        and event.at - machine.ended_at <= LATE_FINAL_SECONDS
        and bool(machine.transcript.partial)
        and machine.transcript.revises(event.text)
    )


def counts_as_speech(machine: Machine, event: Event, policy: Policy) -> bool:
    """words ≥ BARGE_IN_MIN_WORDS"""
    return len(normalise(event.text)) >= policy.min_words


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    state: State
    event: EventKind
    guard: Guard | None
    next: State
    effects: tuple[Effect, ...] = ()
    turn: Turn = Turn.KEEP


_S, _E, _F = State, EventKind, Effect

TABLE: tuple[Row, ...] = (
    Row(_S.IDLE, _E.FRAGMENT, has_words, _S.LISTENING, (_F.STATE_UPDATE, _F.SPECULATE, _F.PERSIST), Turn.BEGIN),
    Row(_S.IDLE, _E.FRAGMENT, None, _S.IDLE, (_F.NOTE_IGNORED,)),
    Row(_S.IDLE, _E.USER_SPEAKING, None, _S.LISTENING, (), Turn.BEGIN),
    Row(_S.IDLE, _E.VAD_END, None, _S.IDLE, (_F.NOTE_NOTHING_HEARD,)),
    Row(_S.IDLE, _E.ATTACHED, has_text, _S.LISTENING),
    Row(_S.IDLE, _E.ATTACHED, None, _S.IDLE),
    Row(_S.IDLE, _E.DISCONNECTED, None, _S.IDLE, (_F.PERSIST,)),
    Row(_S.LISTENING, _E.FRAGMENT, has_words, _S.LISTENING, (_F.STATE_UPDATE, _F.SPECULATE), Turn.MERGE),
    Row(_S.LISTENING, _E.FRAGMENT, None, _S.LISTENING, (_F.NOTE_IGNORED,), Turn.MERGE),
    Row(_S.LISTENING, _E.USER_SPEAKING, None, _S.LISTENING),
    Row(_S.LISTENING, _E.VAD_END, has_text, _S.THINKING, (_F.START_TURN, _F.PERSIST), Turn.NEXT),
    Row(_S.LISTENING, _E.VAD_END, None, _S.IDLE, (_F.NOTE_NOTHING_HEARD,)),
    Row(_S.LISTENING, _E.DISCONNECTED, None, _S.IDLE, (_F.CANCEL_TURN, _F.PERSIST)),
    Row(_S.THINKING, _E.FRAGMENT, confirms_utterance, _S.THINKING, (_F.NOTE_IGNORED,)),
    Row(
        _S.THINKING,
        _E.FRAGMENT,
        corrects_utterance,
        _S.THINKING,
        (_F.CANCEL_TURN, _F.STATE_UPDATE, _F.START_TURN),
        Turn.MERGE_NEXT,
    ),
    Row(
        _S.THINKING,
        _E.FRAGMENT,
        counts_as_speech,
        _S.LISTENING,
        (_F.CANCEL_TURN, _F.STATE_UPDATE, _F.ANNOUNCE_INTERRUPTED, _F.SPECULATE, _F.PERSIST),
        Turn.MERGE,
    ),
    Row(_S.THINKING, _E.FRAGMENT, None, _S.THINKING, (_F.NOTE_IGNORED,)),
    Row(
        _S.THINKING,
        _E.USER_SPEAKING,
        confident,
        _S.LISTENING,
        (_F.CANCEL_TURN, _F.ANNOUNCE_INTERRUPTED, _F.PERSIST),
    ),
    Row(_S.THINKING, _E.USER_SPEAKING, None, _S.THINKING, (_F.NOTE_IGNORED,)),
    Row(_S.THINKING, _E.FIRST_AUDIO, None, _S.SPEAKING, (_F.RESPONSE_READY,)),
    Row(_S.THINKING, _E.TEXT_ANSWER, None, _S.SPEAKING, (_F.RESPONSE_READY,)),
    Row(_S.THINKING, _E.FAILED, None, _S.IDLE, (_F.CANCEL_TURN, _F.TURN_FAILED, _F.PERSIST), Turn.CLEAR),
    Row(_S.THINKING, _E.CANCEL, None, _S.IDLE, (_F.CANCEL_TURN, _F.TURN_CANCELLED, _F.PERSIST), Turn.CLEAR),
    Row(_S.THINKING, _E.DISCONNECTED, None, _S.IDLE, (_F.CANCEL_TURN, _F.PERSIST), Turn.CLEAR),
    Row(_S.SPEAKING, _E.FRAGMENT, confirms_utterance, _S.SPEAKING, (_F.NOTE_IGNORED,)),
    Row(
        _S.SPEAKING,
        _E.FRAGMENT,
        counts_as_speech,
        _S.INTERRUPT,
        (_F.CANCEL_TURN, _F.ANNOUNCE_INTERRUPTED, _F.STATE_UPDATE, _F.SPECULATE),
        Turn.BEGIN,
    ),
    Row(_S.SPEAKING, _E.FRAGMENT, None, _S.SPEAKING, (_F.NOTE_IGNORED,)),
    Row(
        _S.SPEAKING,
        _E.USER_SPEAKING,
        confident,
        _S.INTERRUPT,
        (_F.CANCEL_TURN, _F.ANNOUNCE_INTERRUPTED),
        Turn.BEGIN,
    ),
    Row(_S.SPEAKING, _E.USER_SPEAKING, None, _S.SPEAKING, (_F.NOTE_IGNORED,)),
    Row(_S.SPEAKING, _E.SPEECH_FINISHED, None, _S.IDLE, (_F.TURN_COMPLETE, _F.PERSIST), Turn.CLEAR),
    Row(_S.SPEAKING, _E.FAILED, None, _S.IDLE, (_F.CANCEL_TURN, _F.TURN_FAILED, _F.PERSIST), Turn.CLEAR),
    Row(_S.SPEAKING, _E.CANCEL, None, _S.IDLE, (_F.CANCEL_TURN, _F.TURN_CANCELLED, _F.PERSIST), Turn.CLEAR),
    Row(_S.SPEAKING, _E.DISCONNECTED, None, _S.IDLE, (_F.CANCEL_TURN, _F.PERSIST), Turn.CLEAR),
    Row(_S.INTERRUPT, _E.INTERRUPTED, None, _S.LISTENING, (_F.PERSIST,)),
)

_ROWS: dict[tuple[State, EventKind], tuple[Row, ...]] = {}
for _row in TABLE:
    _ROWS[_row.state, _row.event] = (*_ROWS.get((_row.state, _row.event), ()), _row)


@dataclass(frozen=True, slots=True)
class Step:
    """What `step` decided. `row` is None when the event is illegal in this state."""

    machine: Machine
    row: Row | None

    @property
    def effects(self) -> tuple[Effect, ...]:
        return self.row.effects if self.row is not None else ()


def step(machine: Machine, event: Event, policy: Policy) -> Step:
    """The machine after `event`, and the row that was taken. Pure; never raises."""
    for row in _ROWS.get((machine.state, event.kind), ()):
        if row.guard is None or row.guard(machine, event, policy):
            return Step(_follow(machine, row, event), row)
    return Step(machine, None)


def _follow(machine: Machine, row: Row, event: Event) -> Machine:
    turn = row.turn
    if turn is Turn.KEEP:
        return machine if row.next is machine.state else replace(machine, state=row.next)
    transcript, turn_number, ended_at = machine.transcript, machine.turn_number, machine.ended_at
    if turn is Turn.BEGIN or turn is Turn.CLEAR:
        transcript = transcript.cleared()
    if event.kind is EventKind.FRAGMENT:
        transcript = transcript.merged(event.text, event.is_final, event.mode)
    if turn is Turn.NEXT or turn is Turn.MERGE_NEXT:
        turn_number += 1
        ended_at = event.at
    return Machine(row.next, turn_number, transcript, ended_at)
