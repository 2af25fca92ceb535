"""Intent and RAG asked while the user still speaks, so that their answers are there at the end of speech.

A transcript that stands still for the debounce time is asked about, a final one at once; one question is in flight per
session. With `SPECULATION=llm` a final one begins the whole turn, held back before its first audio. At the end of
speech the result is adopted if it was asked for the very words of the turn, else it is dropped: no speculative result
reaches a turn with another text.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.conversation.pacing import Due
from orchestrator.conversation.runtime import Runtime
from orchestrator.conversation.turn import Turn
from orchestrator.conversation.understanding import Understanding
from orchestrator.core.transcript import normalise

DEBOUNCE_SECONDS = 0.06
HOLD_SECONDS = 3.0
"""A prepared answer is given up after this: no endpointing takes so long, and it holds streams open."""

BeginTurn = Callable[[str, int, Understanding], Turn]


class Speculation:
    """One a session. `consider` on each fragment, `adopt` at the end of speech, `drop` when the utterance is void."""

    __slots__ = ("_asked", "_attempts", "_begin_turn", "_due", "_early_turn", "_own", "_runtime", "_session_id",
                 "_text", "_turn_number")  # fmt: skip

    def __init__(self, runtime: Runtime, session_id: str, begin_turn: BeginTurn, own: Callable[[Turn], None]) -> None:
        """`begin_turn` makes and starts a held turn; `own` takes one that was stopped."""
        self._runtime = runtime
        self._session_id = session_id
        self._begin_turn = begin_turn
        self._own = own
        self._early_turn: Turn | None = None
        self._asked: Understanding | None = None
        self._due: Due | None = None
        self._text = ""
        self._turn_number = 0
        self._attempts = 0

    def consider(self, text: str, turn_number: int, is_final: bool) -> None:
        """The utterance of the coming turn reads `text` now."""
        self._text = text
        self._turn_number = turn_number
        self._cancel_due()
        if self._runtime.overloaded:
            self._runtime.observer.speculation("shed")
            return
        if is_final:
            self._ask(partial=False)
            if self._runtime.settings.speculation == "llm" and self._early_turn is None and self._asked is not None:
                self._early_turn = self._begin_turn(self._text, turn_number, self._asked)
                self._due = self._runtime.wheel.at(self._runtime.loop.time() + HOLD_SECONDS, self._stop_early_turn)
        else:
            self._due = self._runtime.wheel.at(self._runtime.loop.time() + DEBOUNCE_SECONDS, self._ask_if_free)

    def adopt_turn(self, text: str, turn_number: int) -> Turn | None:
        """The turn begun for the words of `text`, still held; the caller owns and releases it."""
        turn = self._early_turn
        if turn is None or turn.broken or turn.number != turn_number:
            return None
        if normalise(turn.question.text) != normalise(text):
            return None
        self._early_turn = self._asked = None
        self._cancel_due()
        self._runtime.observer.speculation("adopted")
        return turn

    def adopt(self, text: str) -> Understanding | None:
        """What was asked for the words of `text`, finished or in flight; the caller owns it from here on."""
        self._cancel_due()
        asked, self._asked = self._asked, None
        if self._early_turn is not None:
            self._stop_early_turn()
            return None
        if asked is None:
            return None
        if normalise(asked.text) == normalise(text) and not asked.failed:
            self._runtime.observer.speculation("adopted")
            asked.complete()
            return asked
        self._void(asked)
        return None

    def drop(self) -> None:
        """The utterance is void: whatever was asked is given up."""
        self._cancel_due()
        if self._early_turn is not None:
            self._stop_early_turn()
        elif self._asked is not None:
            self._void(self._asked)
        self._asked = None

    def _ask_if_free(self) -> None:
        self._due = None
        if self._asked is not None and not self._asked.done:
            self._due = self._runtime.wheel.at(self._runtime.loop.time() + DEBOUNCE_SECONDS, self._ask_if_free)
            return
        self._ask(partial=True)

    def _ask(self, partial: bool) -> None:
        if self._asked is not None:
            if normalise(self._asked.text) == normalise(self._text):
                if not partial:
                    self._asked.complete()
                return
            if self._early_turn is not None:
                self._stop_early_turn()
            else:
                self._void(self._asked)
        self._attempts += 1
        self._asked = Understanding(
            self._runtime, self._session_id, self._turn_number, self._text, f"-early-{self._attempts}", partial
        )

    def _stop_early_turn(self) -> None:
        turn, self._early_turn = self._early_turn, None
        if turn is not None:
            self._runtime.observer.speculation("dropped")
            turn.stop()
            self._own(turn)

    def _void(self, asked: Understanding) -> None:
        self._runtime.observer.speculation("dropped")
        asked.cancel()

    def _cancel_due(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
