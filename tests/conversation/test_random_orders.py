"""A hypothesis state machine drives one session on virtual time through random orders of events."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import looptime
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orchestrator.core.transcript import normalise
from orchestrator.errors import Failure
from orchestrator.wire.messages import Cancel, PlaybackReport, SttFragment
from tests.conversation.scripted import Stage

T = TypeVar("T")
WORDS = ["what", "are", "the", "admission", "rules", "please", "wait", "stop", "no"]
LONGEST_TURN_SECONDS = 60.0


class Conversation(RuleBasedStateMachine):
    """At most one turn alive, silence after `interrupted`, every turn ends, the buffer keeps every word once."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = looptime.new_event_loop(start=100.0)
        asyncio.set_event_loop(self.loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize(speculation=st.sampled_from(["on", "off", "llm"]))
    def connect(self, speculation: str) -> None:
        async def begin() -> None:
            self.stage = Stage(speculation=speculation)
            self.session = await self.stage.connect()

        self.run(begin())
        self.words: list[str] = []

    def at_loop(self, call: Any, *args: Any) -> None:
        async def inside() -> None:
            call(*args)

        self.run(inside())

    def _heard(self, words: list[str], before: str) -> None:
        """The model of the buffer: speech after the agent's begins a new utterance, else it goes on."""
        after = self.session.machine
        if before in ("IDLE", "SPEAKING") and after.state.value == "LISTENING":
            self.words = list(words)
        elif before in ("LISTENING", "THINKING") and after.state.value == "LISTENING":
            self.words += words

    @rule(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))
    def final_chunk(self, words: list[str]) -> None:
        before = self.session.machine.state.value
        self.at_loop(self.session.receive, SttFragment(text=" ".join(words), is_final=True))
        self._heard(words, before)

    @rule(words=st.lists(st.sampled_from(WORDS), min_size=2, max_size=5, unique=True))
    def growing_partials(self, words: list[str]) -> None:
        before = self.session.machine.state.value
        for end in range(1, len(words)):
            self.at_loop(self.session.receive, SttFragment(text=" ".join(words[:end])))
        self.at_loop(self.session.receive, SttFragment(text=" ".join(words), is_final=True))
        self._heard(words, before)

    @rule(confidence=st.sampled_from([0.2, 0.9]))
    def voice(self, confidence: float) -> None:
        before = self.session.machine.state.value
        self.at_loop(self.stage.interrupt, self.session, confidence)
        self._heard([], before)

    @rule()
    def end_of_speech(self) -> None:
        self.at_loop(self.stage.end, self.session)

    @rule()
    def cancel(self) -> None:
        self.at_loop(self.session.receive, Cancel())

    @rule(played_ms=st.floats(0, 5000), ended=st.booleans())
    def playback(self, played_ms: float, ended: bool) -> None:
        number = self.session.machine.turn_number
        self.at_loop(self.session.receive, PlaybackReport(turn_number=number, played_ms=played_ms, ended=ended))

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.3, 1.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule(
        service=st.sampled_from(["intent", "rag", "llm", "tts"]),
        fails=st.sampled_from([None, None, Failure.TIMEOUT, Failure.STATUS]),
    )
    def trouble(self, service: str, fails: Failure | None) -> None:
        scripted = getattr(self.stage, service)
        scripted.fails = scripted.failure = fails

    @rule()
    def reconnect(self) -> None:
        async def again() -> None:
            self.session.detach(self.stage.link)
            self._check_silence()
            self.session = await self.stage.connect()

        listening = self.session.machine.state.value == "LISTENING"
        self.run(again())
        if not listening:
            self.words = []

    @invariant()
    def at_most_one_turn_is_alive(self) -> None:
        if not hasattr(self, "session"):
            return
        runs = self.session.machine.turn_runs
        assert (self.session._turns.turn is not None) == runs
        if runs:
            assert self.session._turns.turn is not None
            assert self.session._turns.turn.number == self.session.machine.turn_number

    @invariant()
    def the_buffer_keeps_every_word_once(self) -> None:
        if hasattr(self, "session") and self.session.machine.state.value == "LISTENING":
            assert normalise(self.session.machine.transcript.text) == tuple(self.words)

    @invariant()
    def silence_after_interrupted(self) -> None:
        if hasattr(self, "session"):
            self._check_silence()

    def _check_silence(self) -> None:
        turn, over = 0, set()
        for sent in self.stage.link.sent:
            if sent.kind == "response_ready":
                turn = sent.message["turn_number"]
            elif sent.kind in ("interrupted", "turn_complete"):
                over.add(sent.message["turn_number"])
            elif sent.audio:
                assert turn not in over

    def teardown(self) -> None:
        if not hasattr(self, "session"):
            return
        self.run(asyncio.sleep(LONGEST_TURN_SECONDS))
        assert self.session.machine.state.value in ("IDLE", "LISTENING")
        for service in (self.stage.intent, self.stage.rag, self.stage.llm, self.stage.tts):
            assert service.seen.open == 0
        self.run(self.stage.sessions.close())
        assert asyncio.all_tasks(self.loop) == set()
        self.loop.close()
        asyncio.set_event_loop(None)


Conversation.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestConversation = Conversation.TestCase
