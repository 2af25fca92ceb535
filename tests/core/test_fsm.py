"""Every state × event, and what must hold along any path."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.fsm import (
    LATE_FINAL_SECONDS,
    TABLE,
    Effect,
    Event,
    EventKind,
    Machine,
    Policy,
    State,
    Turn,
    step,
)
from orchestrator.core.transcript import Transcript

POLICY = Policy(confidence=0.7, min_words=1)
IDLE, L, T, S, X = State.IDLE, State.LISTENING, State.THINKING, State.SPEAKING, State.INTERRUPT
K = EventKind

EXPECTED: dict[tuple[State, EventKind], State | None] = {
    (IDLE, K.FRAGMENT): L, (IDLE, K.USER_SPEAKING): L, (IDLE, K.VAD_END): IDLE, (IDLE, K.FIRST_AUDIO): None,
    (IDLE, K.TEXT_ANSWER): None, (IDLE, K.SPEECH_FINISHED): None, (IDLE, K.FAILED): None, (IDLE, K.INTERRUPTED): None,
    (IDLE, K.CANCEL): None, (IDLE, K.ATTACHED): L, (IDLE, K.DISCONNECTED): IDLE,
    (L, K.FRAGMENT): L, (L, K.USER_SPEAKING): L, (L, K.VAD_END): T, (L, K.FIRST_AUDIO): None,
    (L, K.TEXT_ANSWER): None, (L, K.SPEECH_FINISHED): None, (L, K.FAILED): None, (L, K.INTERRUPTED): None,
    (L, K.CANCEL): None, (L, K.ATTACHED): None, (L, K.DISCONNECTED): IDLE,
    (T, K.FRAGMENT): L, (T, K.USER_SPEAKING): L, (T, K.VAD_END): None, (T, K.FIRST_AUDIO): S,
    (T, K.TEXT_ANSWER): S, (T, K.SPEECH_FINISHED): None, (T, K.FAILED): IDLE, (T, K.INTERRUPTED): None,
    (T, K.CANCEL): IDLE, (T, K.ATTACHED): None, (T, K.DISCONNECTED): IDLE,
    (S, K.FRAGMENT): X, (S, K.USER_SPEAKING): X, (S, K.VAD_END): None, (S, K.FIRST_AUDIO): None,
    (S, K.TEXT_ANSWER): None, (S, K.SPEECH_FINISHED): IDLE, (S, K.FAILED): IDLE, (S, K.INTERRUPTED): None,
    (S, K.CANCEL): IDLE, (S, K.ATTACHED): None, (S, K.DISCONNECTED): IDLE,
    (X, K.FRAGMENT): None, (X, K.USER_SPEAKING): None, (X, K.VAD_END): None, (X, K.FIRST_AUDIO): None,
    (X, K.TEXT_ANSWER): None, (X, K.SPEECH_FINISHED): None, (X, K.FAILED): None, (X, K.INTERRUPTED): L,
    (X, K.CANCEL): None, (X, K.ATTACHED): None, (X, K.DISCONNECTED): None,
}  # fmt: skip


def machine(state: State) -> Machine:
    return Machine(state, 3, Transcript(fixed=("what are admission",)), ended_at=0.0)


def event(kind: EventKind) -> Event:
    """Speech that counts, long after the utterance ended."""
    return Event(kind, 60.0, "requirements", False, None, 1.0)


def test_the_expectation_covers_every_state_and_event() -> None:
    assert set(EXPECTED) == set(itertools.product(State, EventKind))


@pytest.mark.parametrize(("state", "kind"), EXPECTED)
def test_next_state(state: State, kind: EventKind) -> None:
    before = machine(state)
    taken = step(before, event(kind), POLICY)
    expected = EXPECTED[state, kind]
    if expected is None:
        assert taken.row is None
        assert taken.machine is before
        assert taken.effects == ()
    else:
        assert taken.row is not None
        assert taken.machine.state is expected


def test_every_row_can_be_taken() -> None:
    """No row is shadowed by those before it."""
    transcripts = [Transcript(), Transcript(fixed=("what are admission",)), Transcript(partial=("what are admission",))]
    texts = ["", "requirements", "what are admission", "What are admission requirements?", "."]
    taken = set()
    for state, kind, transcript, text, final, confidence, at in itertools.product(
        State, EventKind, transcripts, texts, (False, True), (0.1, 1.0), (0.5, 60.0)
    ):
        before = Machine(state, 3, transcript, ended_at=0.0)
        result = step(before, Event(kind, at, text, final, None, confidence), POLICY)
        taken.add(id(result.row))
    assert [row for row in TABLE if id(row) not in taken] == []


def test_a_turn_is_stopped_on_every_way_out_but_its_own_end() -> None:
    for row in TABLE:
        if row.state in (T, S) and row.next not in (T, S) and row.event is not K.SPEECH_FINISHED:
            assert row.effects[0] is Effect.CANCEL_TURN, row


def test_only_the_end_of_speech_begins_a_turn() -> None:
    for row in TABLE:
        begins = Effect.START_TURN in row.effects
        assert begins == (row.turn in (Turn.NEXT, Turn.MERGE_NEXT))
        assert begins == (row.next is T and row.effects != (Effect.NOTE_IGNORED,))


def test_a_quiet_voice_does_not_interrupt() -> None:
    for state in (T, S):
        taken = step(machine(state), replace(event(K.USER_SPEAKING), confidence=0.69), POLICY)
        assert taken.machine.state is state
        assert taken.effects == (Effect.NOTE_IGNORED,)


def test_barge_in_needs_the_words_the_policy_asks_for() -> None:
    policy = Policy(min_words=3)
    assert step(machine(S), replace(event(K.FRAGMENT), text="wait a"), policy).machine.state is S
    assert step(machine(S), replace(event(K.FRAGMENT), text="wait a moment"), policy).machine.state is X


def test_barge_in_keeps_the_fragment_that_caused_it() -> None:
    taken = step(machine(S), replace(event(K.FRAGMENT), text="wait"), POLICY)
    assert taken.machine.transcript.pieces == ["wait"]


def test_the_user_who_was_not_done_keeps_the_utterance() -> None:
    taken = step(machine(T), replace(event(K.FRAGMENT), text="requirements"), POLICY)
    assert taken.machine.transcript.text == "what are admission requirements"
    assert taken.machine.turn_number == 3


@pytest.mark.parametrize("state", [T, S])
def test_a_late_confirmation_is_not_speech(state: State) -> None:
    late = Event(K.FRAGMENT, LATE_FINAL_SECONDS, "What are admission?", True)
    assert step(machine(state), late, POLICY).effects == (Effect.NOTE_IGNORED,)
    later = replace(late, at=LATE_FINAL_SECONDS + 0.1)
    assert step(machine(state), later, POLICY).machine.state in (L, X)


def test_a_late_correction_asks_again() -> None:
    before = Machine(T, 3, Transcript(partial=("what are a mission",)), ended_at=0.0)
    taken = step(before, Event(K.FRAGMENT, 0.3, "What are admission requirements?", True), POLICY)
    assert taken.machine.state is T
    assert taken.machine.turn_number == 4
    assert taken.machine.transcript.text == "What are admission requirements?"
    assert taken.effects == (Effect.CANCEL_TURN, Effect.STATE_UPDATE, Effect.START_TURN)


def test_the_gate_passes_only_the_turn_that_runs() -> None:
    assert machine(T).is_current(3)
    assert machine(S).is_current(3)
    assert not machine(S).is_current(2)
    assert not machine(S).is_current(4)
    assert not any(machine(state).is_current(3) for state in (IDLE, L, X))


events = st.builds(
    Event,
    kind=st.sampled_from(EventKind),
    at=st.floats(0, 100),
    text=st.sampled_from(["", " ", "yes", "what are", "what are admission", "and for me?"]),
    is_final=st.booleans(),
    mode=st.sampled_from([None, "replace", "append"]),
    confidence=st.floats(0, 1),
)


@given(st.lists(events, max_size=40))
def test_along_any_path(path: list[Event]) -> None:
    current, running = Machine(), 0
    for happened in path:
        taken = step(current, happened, POLICY)
        for effect in taken.effects:
            if effect is Effect.START_TURN:
                running += 1
            if effect in (Effect.CANCEL_TURN, Effect.TURN_COMPLETE):
                running = 0
            assert running <= 1
        assert taken.machine.turn_number >= current.turn_number
        assert (running == 1) == taken.machine.turn_runs
        current = taken.machine
        if current.state is X:
            current = step(current, Event(K.INTERRUPTED), POLICY).machine
            assert current.state is L
