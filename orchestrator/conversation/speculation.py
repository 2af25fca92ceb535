"""Intent and RAG asked while the user still speaks, so that their answers are there at the end of speech.

A transcript that stands still for the debounce time is asked about, a final one at once; one question is in flight per
session. At the end of speech the result is adopted if it was asked for the very words of the turn, else it is dropped:
no speculative result reaches a turn with another text.
"""

from __future__ import annotations

from orchestrator.conversation.pacing import Due
from orchestrator.conversation.runtime import Runtime
from orchestrator.conversation.understanding import Understanding
from orchestrator.core.transcript import normalise

DEBOUNCE_SECONDS = 0.06


class Speculation:
    """One a session. `consider` on each fragment, `adopt` at the end of speech, `drop` when the utterance is void."""

    __slots__ = ("_asked", "_attempts", "_due", "_runtime", "_session_id", "_text", "_turn_number")

    def __init__(self, runtime: Runtime, session_id: str) -> None:
        self._runtime = runtime
        self._session_id = session_id
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
        if self._runtime.overloaded():
            self._runtime.observer.speculation("shed")
            return
        if is_final:
            self._ask()
        else:
            self._due = self._runtime.wheel.at(self._runtime.loop.time() + DEBOUNCE_SECONDS, self._ask_if_free)

    def adopt(self, text: str) -> Understanding | None:
        """What was asked for the words of `text`, finished or in flight; the caller owns it from here on."""
        self._cancel_due()
        asked, self._asked = self._asked, None
        if asked is None:
            return None
        if normalise(asked.text) == normalise(text) and not (asked.done and asked.failures):
            self._runtime.observer.speculation("adopted")
            return asked
        self._void(asked)
        return None

    def drop(self) -> None:
        """The utterance is void: whatever was asked is given up."""
        self._cancel_due()
        if self._asked is not None:
            self._void(self._asked)
            self._asked = None

    def _ask_if_free(self) -> None:
        self._due = None
        if self._asked is not None and not self._asked.done:
            self._due = self._runtime.wheel.at(self._runtime.loop.time() + DEBOUNCE_SECONDS, self._ask_if_free)
            return
        self._ask()

    def _ask(self) -> None:
        if self._asked is not None:
            if normalise(self._asked.text) == normalise(self._text):
                return
            self._void(self._asked)
        self._attempts += 1
        self._asked = Understanding(
            self._runtime, self._session_id, self._turn_number, self._text, f"-early-{self._attempts}"
        )

    def _void(self, asked: Understanding) -> None:
        self._runtime.observer.speculation("dropped")
        asked.cancel()

    def _cancel_due(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
