from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import orjson
import pytest
import pytest_asyncio

from bench.client import UTTERANCES, Session, Turn, Utterance
from bench.crowd import Crowd, failures
from bench.fake_ws import BINARY, CLOSE, PING, PONG, TEXT, ClientFrames, accept_response, frame

pytestmark = pytest.mark.asyncio


class Clock:
    """Timers that run when told to; times are whatever the code under test asks for."""

    def __init__(self) -> None:
        self.due: list[tuple[float, Callable[..., object], tuple[object, ...]]] = []

    def at(self, when: float, callback: Callable[..., object], *args: object) -> Clock:
        self.due.append((when, callback, args))
        return self

    def cancel(self) -> None:
        return None

    def close(self) -> None:
        return None

    def run_all(self) -> None:
        while self.due:
            self.due.sort(key=lambda entry: entry[0])
            _, callback, args = self.due.pop(0)
            callback(*args)


class Wire(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.aborted = False

    def write(self, data: Any) -> None:
        self.sent += data

    def abort(self) -> None:
        self.aborted = True


class Rig:
    """A session on a fake transport, past its handshake."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.idle: list[Session] = []
        self.gone: list[str] = []
        self.session = Session("s-1", self.clock, self.idle.append, lambda session, why: self.gone.append(why))
        self.wire = Wire()
        self.session.connection_made(self.wire)
        self.request = self.wire.sent
        self.wire.sent = b""

    def upgrade(self) -> None:
        self.session.data_received(accept_response("k"))

    def speak(self) -> Turn:
        turn = Turn(0.0)
        self.session.play(turn, UTTERANCES[False][0])
        self.clock.run_all()
        self.wire.sent = b""
        return turn


@pytest_asyncio.fixture
async def rig() -> Rig:
    rig = Rig()
    rig.upgrade()
    return rig


def message(**fields: object) -> bytes:
    return frame(TEXT, orjson.dumps(fields))


ANSWER = (
    message(type="response_ready", text="Hello there,", turn_number=3)
    + frame(BINARY, bytes(4800))
    + frame(PING, b"are you there")
    + frame(BINARY, bytes(100))
    + frame(BINARY, bytes(70_000))
    + message(type="turn_complete", turn_number=3, latency_breakdown={"total_ms": 290.5})
)


async def test_handshake_names_the_session() -> None:
    rig = Rig()
    assert rig.request.startswith(b"GET /orchestrate?session_id=s-1 HTTP/1.1\r\n")
    assert b"Sec-WebSocket-Version: 13\r\n" in rig.request
    rig.session.data_received(accept_response("k")[:40])
    rig.session.data_received(accept_response("k")[40:] + message(type="connected", slot=2))
    assert (await rig.session.connected)["slot"] == 2


async def test_refusal_fails_the_connection_with_its_status() -> None:
    rig = Rig()
    rig.session.data_received(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n")
    with pytest.raises(ConnectionError, match="503"):
        await rig.session.connected
    assert rig.wire.aborted


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 5000, 1 << 20])
async def test_answer_is_read_the_same_however_it_arrives(rig: Rig, size: int) -> None:
    turn = rig.speak()
    for start in range(0, len(ANSWER), size):
        rig.session.data_received(ANSWER[start : start + size])
    assert turn.audio_bytes == 4800 + 100 + 70_000
    assert turn.first_clause == "Hello there,"
    assert turn.number == 3
    assert turn.breakdown == {"total_ms": 290.5}
    assert 0 < turn.ready <= turn.first_audio <= turn.completed
    assert rig.idle == [rig.session]
    assert ClientFrames().feed(rig.wire.sent) == [(PONG, b"are you there")]


async def test_utterance_grows_word_by_word_and_ends_with_the_final_fragment(rig: Rig) -> None:
    utterance = Utterance.of("what are the requirements", partials=True)
    offsets = [offset for offset, _ in utterance.partials]
    assert offsets[-1] == pytest.approx(-0.150)
    assert [b - a for a, b in itertools.pairwise(offsets)] == pytest.approx([1 / 6] * 3)
    rig.session.play(Turn(0.0), utterance)
    rig.clock.run_all()
    sent = [orjson.loads(payload) for _, payload in ClientFrames().feed(rig.wire.sent)]
    assert [each.get("text") for each in sent] == [
        "what", "what are", "what are the", "what are the requirements", "what are the requirements", None,
    ]  # fmt: skip
    assert [each.get("is_final") for each in sent] == [False, False, False, False, True, None]
    assert sent[-1]["type"] == "vad_end"


async def test_barge_in_goes_out_after_first_audio_and_tail_bytes_are_counted(rig: Rig) -> None:
    turn = Turn(0.0)
    rig.session.play(turn, UTTERANCES[False][0], barge_after_s=1.0)
    rig.clock.run_all()
    rig.wire.sent = b""
    rig.session.data_received(message(type="response_ready", text="Hi,") + frame(BINARY, bytes(10)))
    rig.clock.run_all()
    assert orjson.loads(ClientFrames().feed(rig.wire.sent)[0][1])["type"] == "user_speaking"
    rig.session.data_received(frame(BINARY, bytes(20)))
    rig.session.data_received(message(type="interrupted", stop_latency_ms=0.4) + frame(BINARY, bytes(30)))
    assert (turn.audio_bytes, turn.late_bytes, turn.tail_bytes) == (30, 20, 30)
    assert turn.stop_latency_ms == 0.4
    assert rig.idle == []
    rig.clock.run_all()
    assert rig.idle == [rig.session]


async def test_error_ends_the_turn_even_if_nothing_follows(rig: Rig) -> None:
    turn = rig.speak()
    rig.session.data_received(message(type="error", code="llm_failed"))
    rig.clock.run_all()
    assert turn.error == "llm_failed"
    assert rig.idle == [rig.session]
    assert failures([turn, Turn(1.0)]) == {"llm_failed": 1}


async def test_close_by_the_server_is_answered_and_reported(rig: Rig) -> None:
    turn = rig.speak()
    rig.session.data_received(frame(CLOSE, (4409).to_bytes(2, "big")))
    assert rig.gone == ["closed with 4409"]
    assert turn.error == "closed with 4409"
    assert ClientFrames().feed(rig.wire.sent) == [(CLOSE, (4409).to_bytes(2, "big"))]


async def test_crowd_keeps_the_intended_time_of_a_turn_that_has_to_wait() -> None:
    clock = Clock()
    crowd = Crowd("127.0.0.1", 1, clock)
    waiting = Turn(5.0)
    crowd.begin(waiting, UTTERANCES[False][0])
    assert crowd.waited == 1
    rig = Rig()
    rig.upgrade()
    rig.session.on_idle = crowd._on_idle
    crowd._on_idle(rig.session)
    assert rig.session.turn is waiting
    assert waiting.intended == 5.0


async def test_poisson_arrivals_have_the_rate_asked_for() -> None:
    clock = Clock()
    Crowd("127.0.0.1", 1, clock, seed=11).poisson(100.0, 200.0, 50.0)
    times = [when for when, _, _ in clock.due]
    assert len(times) == pytest.approx(10_000, rel=0.03)
    assert min(times) >= 100.0
    assert max(times) < 300.0
