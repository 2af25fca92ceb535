"""The circuit breaker of a service and what it reports; shared by all calls of a worker to that service."""

from __future__ import annotations

import asyncio
from typing import Protocol

from orchestrator.core.resilience import Breaker, BreakerPolicy, Permit
from orchestrator.downstream.http_pool import StatusError
from orchestrator.errors import DownstreamError, Failure

_FAIR_SHARE = 0.5
"""A timeout counts against a service only if it had this share of its usual time."""


class CallObserver(Protocol):
    """The part of the observer that downstream calls report to."""

    def downstream(self, service: str, outcome: str, seconds: float) -> None: ...

    def breaker_state(self, service: str, state: str) -> None: ...

    def extra_request(self, service: str, kind: str, result: str) -> None: ...


class ServiceGuard:
    """The circuit breaker of one service in one worker, and its outcomes. `usual_timeout` is in seconds."""

    def __init__(
        self,
        service: str,
        observer: CallObserver,
        loop: asyncio.AbstractEventLoop,
        usual_timeout: float,
        policy: BreakerPolicy | None = None,
    ) -> None:
        self.service = service
        self.loop = loop
        self.clock = loop.time
        self._observer = observer
        self._fair_seconds = usual_timeout * _FAIR_SHARE
        self._breaker = Breaker(policy or BreakerPolicy())
        self._told = self._breaker.state
        observer.breaker_state(service, self._told.value)

    @property
    def state(self) -> str:
        """`closed`, `half_open` or `open`."""
        return self._breaker.state.value

    def admit(self) -> Permit:
        """Before a call. Raises DownstreamError at once while the circuit is open."""
        permit = self._breaker.admit(self.clock())
        if permit is Permit.REFUSED:
            self._observer.downstream(self.service, Failure.CIRCUIT_OPEN.value, 0.0)
            raise DownstreamError(self.service, Failure.CIRCUIT_OPEN)
        self._tell()
        return permit

    def answered(self, permit: Permit) -> None:
        """The call gave something usable."""
        self._breaker.succeed(permit, self.clock())
        self._tell()

    def failed(self, permit: Permit, error: DownstreamError, seconds: float) -> None:
        """The call failed after `seconds`."""
        if self._is_fault(error, seconds):
            self._breaker.fail(permit, self.clock())
            self._tell()
        else:
            self._breaker.release(permit)

    def abandoned(self, permit: Permit) -> None:
        """Nobody wants the answer any more."""
        self._breaker.release(permit)

    def observe(self, outcome: str, seconds: float) -> None:
        """Report how a call ended."""
        self._observer.downstream(self.service, outcome, seconds)

    def observe_extra(self, kind: str, result: str) -> None:
        """Report how an extra request ended."""
        self._observer.extra_request(self.service, kind, result)

    def _is_fault(self, error: DownstreamError, seconds: float) -> bool:
        """Not the service's fault: a request it rightly refused, and a wait that was cut short by our own budget."""
        if isinstance(error, StatusError):
            return error.status >= 500 or error.status in (408, 429) or error.status < 400
        if error.failure is Failure.TIMEOUT:
            return seconds >= self._fair_seconds
        return True

    def _tell(self) -> None:
        if self._breaker.state is not self._told:
            self._told = self._breaker.state
            self._observer.breaker_state(self.service, self._told.value)


class StreamGuard:
    """Watches one streamed call for its service's guard. A stream counts as answered with its first piece."""

    __slots__ = ("_answered", "_guard", "_permit", "_started")

    def __init__(self, guard: ServiceGuard) -> None:
        self._guard = guard
        self._permit = Permit.REFUSED
        self._started = 0.0
        self._answered = False

    def begin(self) -> None:
        self._permit = self._guard.admit()
        self._started = self._guard.clock()

    def first(self) -> None:
        self._answered = True
        self._guard.answered(self._permit)

    def end(self, outcome: str, error: DownstreamError | None) -> None:
        guard = self._guard
        seconds = guard.clock() - self._started
        guard.observe(outcome, seconds)
        if error is not None:
            guard.failed(Permit.NORMAL if self._answered else self._permit, error, seconds)
        elif not self._answered:
            if outcome == "ok":
                guard.answered(self._permit)
            else:
                guard.abandoned(self._permit)
