"""Guards, hedges and retries on virtual time, over services scripted to the millisecond."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import pytest

from orchestrator.core.resilience import BreakerPolicy
from orchestrator.downstream.guard import ServiceGuard
from orchestrator.downstream.hedging import Hedger
from orchestrator.downstream.http_pool import StatusError
from orchestrator.downstream.resilient import ResilientIntent, ResilientLlm
from orchestrator.downstream.streams import PieceStream
from orchestrator.downstream.types import Call, Intent
from orchestrator.errors import DownstreamError, Failure
from tests.downstream.running import collect, failure_of
from tests.loops import settled, virtual

USUAL_MS = 100.0


@dataclass
class Seen:
    """An observer that remembers."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    extra: Counter[str] = field(default_factory=Counter)

    def downstream(self, service: str, outcome: str, seconds: float) -> None:
        self.outcomes[outcome] += 1
        self.seconds.append(seconds)

    def breaker_state(self, service: str, state: str) -> None:
        self.states.append(state)

    def extra_request(self, service: str, kind: str, result: str) -> None:
        self.extra[f"{kind} {result}"] += 1


class Scripted:
    """An intent service: each request takes the next `(ms, failure)`; the last one goes on."""

    def __init__(self, *script: tuple[float, DownstreamError | None]) -> None:
        self.script = list(script)
        self.calls: list[Call] = []
        self.at: list[float] = []
        self.open = 0
        self.aborted = 0

    async def classify(self, text: str, call: Call) -> Intent:
        self.calls.append(call)
        self.at.append(asyncio.get_running_loop().time())
        ms, error = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        self.open += 1
        try:
            await asyncio.sleep(ms / 1000)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.open -= 1
        if error is not None:
            raise error
        return Intent(f"after {ms:g}")


class Bench:
    """An intent service behind its guard, and everything around it."""

    def __init__(self, *script: tuple[float, DownstreamError | None], policy: BreakerPolicy | None = None) -> None:
        self.seen = Seen()
        self.service = Scripted(*script)
        self.guard = ServiceGuard("intent", self.seen, asyncio.get_running_loop(), USUAL_MS / 1000, policy)
        self.hedger = Hedger(self.guard)
        self.intent = ResilientIntent(self.service, self.hedger)

    async def learn(self, ms: float = 20.0, times: int = 60) -> None:
        """Let the guard see ordinary answers, so that it knows a p95 and has earned extra requests."""
        script, self.service.script = self.service.script, [(ms, None)]
        for _ in range(times):
            await self.intent.classify("x", call())
        self.service.script = script
        self.service.calls.clear()
        self.service.at.clear()
        self.seen.outcomes.clear()


def call(timeout_ms: float = USUAL_MS) -> Call:
    return Call("test_001", 1, "intent", timeout_ms)


def failed(failure: Failure = Failure.UNREACHABLE) -> DownstreamError:
    return DownstreamError("intent", failure)


def now() -> float:
    return asyncio.get_running_loop().time()


@virtual
async def test_an_ordinary_call_makes_one_request_and_no_task() -> None:
    bench = Bench((20, None))
    await bench.learn()
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(bench.intent.classify("x", call()))
    await asyncio.sleep(0.010)
    assert asyncio.all_tasks() - before == {task}
    assert (await task).name == "after 20"
    assert len(bench.service.calls) == 1
    assert bench.seen.outcomes == {"ok": 1}
    assert not bench.seen.extra


@virtual
async def test_a_slow_answer_is_overtaken_by_a_second_request() -> None:
    bench = Bench((90, None), (15, None))
    await bench.learn()
    began = now()
    intent = await bench.intent.classify("x", call())
    assert intent.name == "after 15"
    assert now() - began == pytest.approx(0.037, abs=1e-3)
    first, second = bench.service.calls
    assert first.timeout_ms == USUAL_MS
    assert second.timeout_ms == pytest.approx(78.0, abs=1.0)
    assert (second.session_id, second.turn_number, second.stage) == ("test_001", 1, "intent")
    assert (bench.service.open, bench.service.aborted) == (0, 1)
    assert bench.seen.extra == {"hedge won": 1}
    assert bench.seen.outcomes == {"ok": 1}
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@virtual
async def test_the_first_answer_ends_the_second_request() -> None:
    bench = Bench((30, None), (50, None))
    await bench.learn()
    assert (await bench.intent.classify("x", call())).name == "after 30"
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (bench.service.open, bench.service.aborted) == (0, 1)
    assert bench.seen.extra == {"hedge lost": 1}


@virtual
async def test_a_failed_second_request_does_not_harm_the_first() -> None:
    bench = Bench((60, None), (10, failed()))
    await bench.learn()
    assert (await bench.intent.classify("x", call())).name == "after 60"
    assert bench.seen.extra == {"hedge failed": 1}


@virtual
async def test_a_failed_first_request_is_saved_by_the_second() -> None:
    bench = Bench((30, failed()), (30, None))
    await bench.learn()
    assert (await bench.intent.classify("x", call())).name == "after 30"
    assert bench.seen.extra == {"hedge won": 1}
    assert bench.seen.outcomes == {"ok": 1}


@virtual
async def test_two_failures_are_one_error_and_no_third_request() -> None:
    bench = Bench((30, failed()), (30, failed(Failure.CLOSED)), (1, None))
    await bench.learn()
    error = await failure_of(bench.intent.classify("x", call()))
    assert error.failure is Failure.CLOSED
    assert len(bench.service.calls) == 2
    assert bench.seen.extra == {"hedge failed": 1}


@virtual
async def test_both_answers_in_the_same_tick() -> None:
    bench = Bench((42, None), (20, None))
    await bench.learn()
    intent = await bench.intent.classify("x", call())
    assert intent.name in ("after 42", "after 20")
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(1)
    assert bench.service.open == 0


@pytest.mark.parametrize("after_ms", [0, 10, 21, 22, 23, 30, 36, 37, 38])
def test_a_cancelled_call_leaves_nothing(after_ms: int) -> None:
    @virtual
    async def run() -> None:
        bench = Bench((90, None), (15, None))
        await bench.learn()
        task = asyncio.ensure_future(bench.intent.classify("x", call()))
        await asyncio.sleep(after_ms / 1000)
        if not task.done():
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
            raise asyncio.CancelledError
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert bench.service.open == 0
        assert sum(bench.seen.outcomes.values()) == 1
        assert bench.guard.state == "closed"

    run()


@virtual
async def test_a_cancellation_in_the_tick_of_the_second_answer_is_kept() -> None:
    bench = Bench((90, None), (15, None))
    await bench.learn()
    loop = asyncio.get_running_loop()
    began = now()
    task = asyncio.ensure_future(bench.intent.classify("x", call()))
    loop.call_at(began + 0.037, task.cancel)
    await asyncio.wait((task,))
    assert task.cancelled() or task.result().name == "after 15"
    if not task.cancelled():
        # The cancel came after the task was done.
        assert task.cancelling() == 0
    assert bench.service.open == 0


@virtual
async def test_second_requests_stay_within_five_percent() -> None:
    bench = Bench((20, None))
    await bench.learn(times=40)
    sent = 0
    for index in range(400):
        bench.service.script = [(60.0 if index % 2 else 20.0, None), (20, None)]
        bench.service.calls.clear()
        await bench.intent.classify("x", call(1000.0))
        sent += len(bench.service.calls) - 1
    assert 0 < sent <= 0.05 * 440 + 1


@virtual
async def test_hedging_can_be_shed() -> None:
    bench = Bench((90, None), (15, None))
    await bench.learn()
    bench.hedger.hedging = False
    assert (await bench.intent.classify("x", call())).name == "after 90"
    assert len(bench.service.calls) == 1


@virtual
async def test_a_second_request_that_could_not_be_in_time_is_not_sent() -> None:
    bench = Bench((90, None), (15, None))
    await bench.learn(ms=70)
    assert (await bench.intent.classify("x", call())).name == "after 90"
    assert len(bench.service.calls) == 1


@pytest.mark.parametrize(
    ("error", "repeated"),
    [
        (failed(Failure.UNREACHABLE), True),
        (failed(Failure.CLOSED), True),
        (StatusError("intent", 503), True),
        (StatusError("intent", 500), False),
        (StatusError("intent", 400), False),
        (failed(Failure.BAD_ANSWER), False),
        (failed(Failure.TIMEOUT), False),
    ],
)
def test_what_is_repeated(error: DownstreamError, repeated: bool) -> None:
    @virtual
    async def run() -> None:
        bench = Bench((5, error), (5, None))
        if repeated:
            assert (await bench.intent.classify("x", call())).name == "after 5"
            assert bench.service.calls[1].timeout_ms == pytest.approx(95.0, abs=0.5)
            assert bench.seen.extra == {"retry won": 1}
        else:
            assert await failure_of(bench.intent.classify("x", call())) is error
            assert len(bench.service.calls) == 1

    run()


@virtual
async def test_nothing_is_repeated_out_of_time_or_budget() -> None:
    bench = Bench((5, failed()))
    await bench.learn(ms=20)
    await failure_of(bench.intent.classify("x", call(24.0)))
    assert len(bench.service.calls) == 1
    requests = 0
    for _ in range(30):
        bench.service.calls.clear()
        await failure_of(bench.intent.classify("x", call()))
        requests += len(bench.service.calls)
        await asyncio.sleep(20)
    assert requests < 30 + 30 * 0.05 + 6


@virtual
async def test_a_dead_service_is_not_waited_for() -> None:
    bench = Bench((100, failed(Failure.TIMEOUT)))
    for _ in range(5):
        await failure_of(bench.intent.classify("x", call()))
    assert bench.seen.states == ["closed", "open"]
    began = now()
    error = await failure_of(bench.intent.classify("x", call()))
    assert error.failure is Failure.CIRCUIT_OPEN
    assert now() == began
    assert len(bench.service.calls) == 5
    assert bench.seen.outcomes == {"timeout": 5, "circuit_open": 1}
    await asyncio.sleep(0.5)
    bench.service.script = [(10, None)]
    probe = asyncio.ensure_future(bench.intent.classify("x", call()))
    await asyncio.sleep(0.005)
    assert (await failure_of(bench.intent.classify("x", call()))).failure is Failure.CIRCUIT_OPEN
    assert (await probe).name == "after 10"
    assert bench.seen.states == ["closed", "open", "half_open", "closed"]


@virtual
async def test_a_cancelled_probe_leaves_its_place_to_the_next_call() -> None:
    bench = Bench((100, failed(Failure.TIMEOUT)))
    for _ in range(5):
        await failure_of(bench.intent.classify("x", call()))
    await asyncio.sleep(0.5)
    probe = asyncio.ensure_future(bench.intent.classify("x", call()))
    await asyncio.sleep(0.005)
    probe.cancel()
    await asyncio.wait((probe,))
    bench.service.script = [(10, None)]
    assert (await bench.intent.classify("x", call())).name == "after 10"
    assert bench.guard.state == "closed"


@pytest.mark.parametrize("error", [StatusError("intent", 400), StatusError("intent", 404), StatusError("intent", 422)])
def test_a_refused_request_does_not_open_the_circuit(error: StatusError) -> None:
    @virtual
    async def run() -> None:
        bench = Bench((1, error))
        for _ in range(50):
            await failure_of(bench.intent.classify("x", call()))
        assert bench.guard.state == "closed"

    run()


@virtual
async def test_a_wait_cut_short_by_our_own_budget_does_not_open_the_circuit() -> None:
    bench = Bench((10, failed(Failure.TIMEOUT)))
    for _ in range(50):
        await failure_of(bench.intent.classify("x", call(10.0)))
    assert bench.guard.state == "closed"


class Tokens(PieceStream[str]):
    """A stream of `pieces` tokens 5 ms apart that ends in `error`."""

    def __init__(self, call: Call, pieces: int, error: DownstreamError | None) -> None:
        super().__init__(asyncio.get_running_loop(), "llm", call)
        self.left = pieces
        self.error = error
        self.released: list[str] = []

    async def _open(self) -> None:
        await asyncio.sleep(0.010)

    async def _next(self) -> str | None:
        await asyncio.sleep(0.005)
        if self.left:
            self.left -= 1
            return "x"
        if self.error is not None:
            raise self.error
        return None

    def _release(self, outcome: str) -> None:
        self.released.append(outcome)


class Llm:
    def __init__(self, pieces: int, error: DownstreamError | None = None) -> None:
        self.pieces = pieces
        self.error = error
        self.streams: list[Tokens] = []

    def stream(self, messages: object, call: Call) -> Tokens:
        self.streams.append(Tokens(call, self.pieces, self.error))
        return self.streams[-1]


def guarded(llm: Llm) -> tuple[ResilientLlm, ServiceGuard, Seen]:
    seen = Seen()
    guard = ServiceGuard("llm", seen, asyncio.get_running_loop(), USUAL_MS / 1000)
    return ResilientLlm(llm, guard), guard, seen


@virtual
async def test_a_stream_reports_once_at_its_end() -> None:
    resilient, _guard, seen = guarded(Llm(4))
    assert await collect(resilient.stream([], call())) == ["x"] * 4
    assert seen.outcomes == {"ok": 1}
    assert seen.seconds == [pytest.approx(0.035, abs=1e-3)]


@virtual
async def test_a_stream_nobody_began_is_no_call() -> None:
    resilient, _guard, seen = guarded(Llm(4))
    await resilient.stream([], call()).aclose()
    assert not seen.outcomes


@pytest.mark.parametrize("how", ["aclose", "drop", "cancel"])
def test_an_abandoned_stream_is_released_at_once(how: str) -> None:
    @virtual
    async def run() -> None:
        llm = Llm(4)
        resilient, guard, seen = guarded(llm)
        stream = resilient.stream([], call())
        await anext(stream)
        if how == "aclose":
            await stream.aclose()
        elif how == "drop":
            released = llm.streams.pop().released
            del stream
            assert released == ["cancelled"]
        else:
            task = asyncio.ensure_future(collect(stream))
            await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.wait((task,))
        assert seen.outcomes == {"cancelled": 1}
        assert guard.state == "closed"
        assert await settled({asyncio.current_task() or asyncio.ensure_future(asyncio.sleep(0))}) == set()

    run()


@virtual
async def test_stalls_after_the_first_piece_open_the_circuit_too() -> None:
    llm = Llm(0, DownstreamError("llm", Failure.UNREACHABLE))
    resilient, guard, seen = guarded(llm)
    for _ in range(5):
        await failure_of(collect(resilient.stream([], call())))
    assert guard.state == "open"
    error = await failure_of(collect(resilient.stream([], call())))
    assert error.failure is Failure.CIRCUIT_OPEN
    assert len(llm.streams) == 6
    assert llm.streams[-1].released == []
    await asyncio.sleep(0.5)
    llm.error, llm.pieces = DownstreamError("llm", Failure.STALLED), 1
    await failure_of(collect(resilient.stream([], call())))
    assert guard.state == "closed"
    for _ in range(12):
        await failure_of(collect(resilient.stream([], call())))
    assert guard.state == "open"
    assert seen.outcomes["stalled"] >= 10


@virtual
async def test_a_half_open_stream_abandoned_before_its_first_piece_frees_the_probe() -> None:
    llm = Llm(0, DownstreamError("llm", Failure.UNREACHABLE))
    resilient, guard, _seen = guarded(llm)
    for _ in range(5):
        await failure_of(collect(resilient.stream([], call())))
    await asyncio.sleep(0.5)
    probe = asyncio.ensure_future(collect(resilient.stream([], call())))
    await asyncio.sleep(0.001)
    probe.cancel()
    await asyncio.wait((probe,))
    llm.error, llm.pieces = None, 3
    assert await collect(resilient.stream([], call())) == ["x"] * 3
    assert guard.state == "closed"
