"""A session over its connections: greeting, resuming, taking over, draining, expiring, surviving its worker."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.conversation.registry import Sessions
from orchestrator.downstream.stt import SttFragmentEvent, SttUserSpeaking, SttVadEnd
from orchestrator.errors import DownstreamError, Failure
from orchestrator.wire.messages import Cancel, Ping, SttFragment, VadEnd
from tests.conversation.scripted import RecordingLink, Stage, staged


@staged
async def test_the_greeting() -> None:
    stage = Stage()
    await stage.connect("s1")
    greeting = stage.link.sent[0].message
    assert greeting == {
        "type": "connected", "session_id": "s1", "seq": 1, "timestamp": 1_700_000_100.0, "state": "IDLE",
        "turn_number": 0, "resumed": False, "node": "test", "slot": 0, "protocol": 1, "budget_ms": 445.0,
        "audio_format": {"encoding": "pcm_s16le", "sample_rate": 24000, "channels": 1}, "max_message_bytes": 65536,
    }  # fmt: skip
    assert stage.sessions.attached == 1


@staged
async def test_partials_are_confirmed_and_finals_by_the_turn() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.say(session, "what are", final=False)
    stage.say(session, "what are admission requirements", final=True)
    updates = stage.link.messages("state_update")
    assert [(update["state"], update["text_buffer"]) for update in updates] == [("LISTENING", ["what are"])]


@staged
async def test_extra_events_are_sent_where_they_are_wanted() -> None:
    stage = Stage()
    session = await stage.connect(events=frozenset({"state", "progress"}))
    stage.ask(session)
    await stage.link.until("turn_complete")
    changes = [(change["from"], change["to"], change["trigger"]) for change in stage.link.messages("state_change")]
    assert changes == [
        ("IDLE", "LISTENING", "fragment"),
        ("LISTENING", "THINKING", "vad_end"),
        ("THINKING", "SPEAKING", "first_audio"),
        ("SPEAKING", "IDLE", "speech_finished"),
    ]
    assert stage.link.messages("state_update")[0]["text_buffer"] == ["What are admission requirements?"]
    assert stage.link.messages("processing")[0]["stage"] == "understanding"


@staged
async def test_nothing_heard_illegal_and_ping() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.end(session)
    session.receive(Cancel())
    session.receive(Ping(id=7))
    session.receive(SttFragment(text="  "))
    kinds = [(sent.kind, sent.message.get("code")) for sent in stage.link.sent[1:]]
    assert kinds == [
        ("notice", "nothing_heard"), ("error", "illegal_event"), ("pong", None), ("notice", "fragment_ignored"),
    ]  # fmt: skip
    assert stage.link.sent[3].message["id"] == 7


@staged
async def test_sequence_numbers_go_on_over_connections_and_missed_messages_are_sent_again() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("turn_complete")
    before = [sent.message for sent in stage.link.sent if not sent.audio]
    session.detach(stage.link)
    await stage.connect(last_seq=2)
    again = [sent.message for sent in stage.link.sent]
    assert again[0]["type"] == "connected"
    assert again[0]["resumed"] is True
    assert again[0]["seq"] == before[-1]["seq"] + 1
    assert again[1:] == before[2:]
    assert not any(sent.audio for sent in stage.link.sent)


@staged
async def test_a_newer_connection_takes_the_session() -> None:
    stage = Stage()
    session = await stage.connect()
    older = stage.link
    stage.ask(session)
    await older.until("audio")
    assert await stage.connect() is session
    assert older.closed is not None
    assert older.closed[0] == 4409
    count = len(older.sent)
    session.detach(older)
    assert session.link is stage.link
    assert stage.sessions.attached == 1
    await asyncio.sleep(5)
    assert len(older.sent) == count
    assert stage.link.kinds == ["connected"]
    assert stage.observer.outcomes == ["abandoned"]


@staged
async def test_two_connections_opening_the_same_session_share_it() -> None:
    stage = Stage()
    first, second = RecordingLink(), RecordingLink()
    from orchestrator.conversation.registry import ConnectQuery

    query = ConnectQuery(frozenset(), None)
    load = stage.store.load

    async def slow(session_id: str):  # type: ignore[no-untyped-def]
        await asyncio.sleep(0.05)
        return await load(session_id)

    stage.store.load = slow  # type: ignore[method-assign]
    sessions = await asyncio.gather(stage.sessions.open("x", first, query), stage.sessions.open("x", second, query))
    assert sessions[0] is sessions[1]
    assert (first.closed is None) != (second.closed is None)
    assert stage.sessions.attached == 1


@staged
async def test_a_disconnect_mid_sentence_keeps_the_sentence() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.say(session, "What are admission", final=False)
    session.detach(stage.link)
    session = await stage.connect()
    assert stage.link.sent[0].message["state"] == "LISTENING"
    stage.say(session, "What are admission requirements?")
    stage.end(session)
    await stage.link.until("response_ready")
    assert stage.llm.messages[-1][-1]["content"] == "What are admission requirements?"


@staged
async def test_a_disconnect_mid_answer_stops_it_and_keeps_what_was_heard() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await asyncio.sleep(0.270 + 1.5)
    session.detach(stage.link)
    await asyncio.sleep(0.1)
    assert stage.tts.seen.open == stage.llm.seen.open == 0
    assert [entry.text for entry in session._turns.memory.history()][1] == "You need a diploma. Send it"
    await stage.connect()
    assert stage.link.sent[0].message["state"] == "IDLE"
    assert stage.link.sent[0].message["turn_number"] == 1


@staged
async def test_another_worker_goes_on_where_the_first_one_was() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("turn_complete")
    stage.ask(session, "And until when?")
    await asyncio.sleep(0.1)
    # The worker dies while it thinks: what the store has is all there is.
    successor = Sessions(stage.runtime)
    stage.sessions = successor
    session = await stage.connect()
    greeting = stage.link.sent[0].message
    assert (greeting["resumed"], greeting["turn_number"], greeting["state"]) == (True, 2, "IDLE")
    assert greeting["seq"] > 6
    assert [entry.text for entry in session._turns.memory.history()] == [
        "What are admission requirements?", "You need a diploma. Send it by May. Good luck!", "And until when?",
    ]  # fmt: skip
    stage.ask(session, "Hello?")
    assert (await stage.link.until("response_ready")).message["turn_number"] == 3


@staged
async def test_without_the_store_conversations_go_on() -> None:
    stage = Stage()
    stage.store.connected = False
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("turn_complete")
    assert not stage.sessions.store_connected


@staged
async def test_the_store_is_written_at_turn_boundaries_not_per_frame() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("turn_complete")
    assert stage.store.writes == 3
    record = stage.store.records["s1"]
    assert (record.state, record.turn_number, len(record.history)) == ("IDLE", 1, 2)


@staged
async def test_draining_closes_at_the_next_idle() -> None:
    stage = Stage()
    session = await stage.connect()
    idle_link = RecordingLink()
    from orchestrator.conversation.registry import ConnectQuery

    await stage.sessions.open("idle", idle_link, ConnectQuery(frozenset(), None))
    stage.ask(session)
    await stage.link.until("audio")
    stage.sessions.drain(1500)
    assert idle_link.closed == (1012, "the worker is draining")
    assert stage.link.closed is None
    assert stage.link.messages("draining")[0]["reconnect_after_ms"] == 1500
    await stage.link.until("turn_complete")
    assert stage.link.closed == (1012, "the worker is draining")


@staged
async def test_an_idle_session_expires() -> None:
    stage = Stage(session_ttl_seconds=60)
    await stage.connect()
    await asyncio.sleep(50)
    assert stage.link.closed is None
    await asyncio.sleep(30)
    assert stage.link.closed is not None
    assert stage.link.closed[0] == 4410


@staged
async def test_a_stored_session_without_a_connection_leaves_memory_and_comes_back() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("turn_complete")
    session.detach(stage.link)
    await asyncio.sleep(60)
    assert stage.sessions.find("s1") is None
    description = await stage.sessions.describe("s1")
    assert description is not None
    assert description["turn_number"] == 1
    assert await stage.sessions.describe("nobody") is None
    await stage.connect()
    assert stage.link.sent[0].message["resumed"] is True


@staged
async def test_a_session_the_store_does_not_have_stays_in_memory() -> None:
    stage = Stage()
    stage.store.connected = False
    session = await stage.connect()
    session.detach(stage.link)
    await asyncio.sleep(600)
    assert stage.sessions.find("s1") is session


class Relay:
    def __init__(self) -> None:
        self.fed = b""
        self.closed = False

    def feed(self, pcm: bytes) -> None:
        self.fed += pcm

    async def close(self) -> None:
        self.closed = True


@staged
async def test_the_microphone_drives_the_conversation() -> None:
    stage = Stage()
    relay, callbacks = Relay(), []

    def factory(session_id, on_event, on_failure):  # type: ignore[no-untyped-def]
        callbacks.extend((on_event, on_failure))
        return relay

    from dataclasses import replace

    stage.runtime.services = replace(stage.runtime.services, stt_relay=factory)
    session = await stage.connect()
    assert stage.sessions.accepts_audio
    session.receive_audio(b"\1\2")
    session.receive_audio(b"\3\4")
    assert relay.fed == b"\1\2\3\4"
    heard, failed = callbacks
    heard(SttUserSpeaking(confidence=0.9))
    heard(SttFragmentEvent(text="what are", is_final=False, timestamp=None))
    heard(SttFragmentEvent(text="What are admission requirements?", is_final=True, timestamp=None))
    heard(SttVadEnd(confidence=1.0))
    await stage.link.until("audio")
    assert stage.link.kinds == ["connected", "state_update", "response_ready", "audio"]
    heard(SttVadEnd(confidence=1.0))
    assert "error" not in stage.link.kinds
    heard(SttUserSpeaking(confidence=0.9))
    assert "interrupted" in stage.link.kinds
    failed(DownstreamError("stt", Failure.CLOSED))
    assert stage.link.messages("error")[0]["code"] == "stt_failed"
    session.detach(stage.link)
    await asyncio.sleep(0)
    assert relay.closed


@staged
async def test_closing_the_worker_stops_everything() -> None:
    stage = Stage()
    session = await stage.connect()
    stage.ask(session)
    await stage.link.until("audio")
    await stage.sessions.close()
    assert stage.link.closed is not None
    assert stage.link.closed[0] == 1012
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert stage.tts.seen.open == 0


@staged
async def test_five_hundred_short_sessions_leave_nothing_behind() -> None:
    stage = Stage()
    for number in range(500):
        session = await stage.connect(f"s{number}")
        stage.ask(session)
        await asyncio.sleep((number % 40) / 100.0)
        session.detach(stage.link)
    await asyncio.sleep(100)
    assert stage.sessions.attached == 0
    assert stage.sessions.find("s1") is None
    assert len(asyncio.all_tasks()) == 2
    assert all(service.seen.open == 0 for service in (stage.intent, stage.rag, stage.llm, stage.tts))
    assert stage.runtime.wheel._slots == {}
    assert sum(stage.observer.states.values()) == 0


@pytest.mark.parametrize("field", ["state", "turn_number", "history", "latency_breakdowns", "node", "slot"])
def test_a_description_has(field: str) -> None:
    @staged
    async def run() -> None:
        stage = Stage()
        session = await stage.connect()
        session.receive(SttFragment(text="Hello there", is_final=True))
        session.receive(VadEnd())
        await stage.link.until("turn_complete")
        assert field in session.describe()

    run()
