"""The error tree. Each error is mapped once, at the boundary where it becomes a message, a status or an exit code."""

from __future__ import annotations

from enum import StrEnum


class OrchestratorError(Exception):
    """Base of everything this package raises on purpose. `str(error)` is one line fit for a user."""


class SettingsError(OrchestratorError):
    """A setting has a value that is not accepted; the line names the variable, the value and what is accepted."""


class BadMessage(OrchestratorError):
    """A client's text frame that is not a message of the protocol; the session goes on."""


class StoreUnavailable(OrchestratorError):
    """The session store did not answer; conversations go on from memory."""


class Failure(StrEnum):
    """Why a downstream call gave no usable answer."""

    TIMEOUT = "timeout"
    STALLED = "stalled"
    UNREACHABLE = "unreachable"
    STATUS = "status"
    BAD_ANSWER = "bad_answer"
    CLOSED = "closed"
    CIRCUIT_OPEN = "circuit_open"


class DownstreamError(OrchestratorError):
    """A downstream call that failed, whatever the reason on the wire was.

    `service` is `intent`, `rag`, `llm`, `tts` or `stt`; `failure` says how; `detail` is for the log.
    """

    def __init__(self, service: str, failure: Failure, detail: str = "") -> None:
        super().__init__(f"{service} {failure.value}{': ' + detail if detail else ''}")
        self.service = service
        self.failure = failure
        self.detail = detail
