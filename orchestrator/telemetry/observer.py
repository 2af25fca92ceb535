"""What is worth counting, as calls on one observer. Only `telemetry.prometheus` knows Prometheus.

The base class counts nothing: tests and tools that do not care pass it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping


class Observer:
    """Receives facts as they happen; every method returns at once and never raises. Times are seconds."""

    def turn_ended(self, outcome: str, breakdown: Mapping[str, float | bool | str]) -> None:
        """A turn is over. `outcome` is one of completed, interrupted, cancelled, truncated, failed, abandoned.

        `breakdown` is the latency breakdown of the protocol: milliseconds by name.
        """

    def barge_in_stopped(self, seconds: float) -> None:
        """From the receipt of a barge-in to `interrupted` written."""

    def speculation(self, result: str) -> None:
        """A speculative call ended as adopted, dropped, shed or failed."""

    def session_state(self, state: str, change: int) -> None:
        """`change` sessions (+1 or -1) entered or left `state`."""

    def session_rejected(self, reason: str) -> None:
        """A connection was refused before the upgrade: full, lag, draining, bad_request, unauthorised …"""

    def handed_off(self, result: str) -> None:
        """A connection was served here (local), passed on (sent), taken (received) or could not be (failed)."""

    def downstream(self, service: str, outcome: str, seconds: float) -> None:
        """A downstream call ended: `outcome` is ok, cancelled, or an errors.Failure value."""

    def extra_request(self, service: str, kind: str, result: str) -> None:
        """An extra request ended. `kind` is hedge or retry; `result` is won (its answer was used), lost (the first one
        was faster) or failed."""

    def breaker_state(self, service: str, state: str) -> None:
        """A circuit breaker is now closed, half_open or open."""

    def store_written(self, result: str, count: int) -> None:
        """`count` session writes ended as ok, failed or fenced."""

    def store_state(self, connected: bool, dirty: int) -> None:
        """Whether the store answers, and how many sessions wait to be written."""

    def gc_paused(self, seconds: float) -> None:
        """A collection of cyclic garbage held the loop."""

    def loop_lag(self, seconds: float) -> None:
        """How late the event loop ran a timer."""
