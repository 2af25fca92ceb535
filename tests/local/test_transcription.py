"""A speech session with a scripted recogniser: what is asked of it, when, and what the client is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("numpy")

from orchestrator.local.endpointing import Endpointer, EndpointSettings
from orchestrator.local.transcription import FINAL_PRIORITY, PARTIAL_PRIORITY, SpeechSession

WINDOW_MS = 32
LOUD, QUIET = b"\x00\x40" * 512, b"\x00\x00" * 512
ENDPOINT = EndpointSettings(endpoint_ms=320)
ENDPOINT_WINDOWS = 10


class Activity:
    """Speech is what is loud."""

    def push(self, window: Any) -> float:
        return 0.9 if abs(float(window[0])) > 0.1 else 0.1

    def reset(self) -> None: ...


class Rig:
    """A session, its clock of fed audio, and a recogniser that answers when told to."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.asked: list[tuple[int, int]] = []
        self.answers: list[asyncio.Future[str]] = []
        self.now = 0.0
        self.session = SpeechSession(
            Activity(), Endpointer(ENDPOINT), self._recognise, self.sent.append, lambda: self.now
        )

    async def _recognise(self, samples: Any, priority: int) -> str:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.asked.append((len(samples) // 512, priority))
        self.answers.append(answer)
        return await answer

    async def feed(self, audio: bytes, windows: int = 1) -> None:
        for _ in range(windows):
            self.now += WINDOW_MS / 1000
            self.session.feed(audio, 1000 + self.now)
            await settle()

    async def answer(self, text: str) -> None:
        self.answers[-1].set_result(text)
        await settle()

    def told(self) -> list[tuple[Any, ...]]:
        """What the client was told since last asked: types, with text and finality of fragments."""
        messages = [
            (item["type"], item["text"], item["is_final"]) if item["type"] == "fragment" else (item["type"],)
            for item in self.sent
        ]
        self.sent.clear()
        return messages


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def scripted(test: Callable[[Rig], Awaitable[None]]) -> Callable[[], None]:
    """Run the test with a session whose loop is running beside it."""

    async def run() -> None:
        rig = Rig()
        running = asyncio.ensure_future(rig.session.run())
        try:
            await test(rig)
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def wrapped() -> None:
        asyncio.run(run())

    wrapped.__name__ = test.__name__
    return wrapped


@scripted
async def test_partials_grow_while_the_user_speaks(rig: Rig) -> None:
    await rig.feed(QUIET, 20)
    await rig.feed(LOUD, 2)
    assert rig.told() == [("user_speaking",)]
    await rig.feed(LOUD, 10)
    assert rig.asked == [(16, PARTIAL_PRIORITY)]
    await rig.answer("What are.")
    assert rig.told() == [("fragment", "What are", False)]
    await rig.feed(LOUD, 10)
    await rig.answer("What are the fees?")
    assert rig.told() == [("fragment", "What are the fees", False)]


@scripted
async def test_the_final_text_is_there_before_the_endpoint(rig: Rig) -> None:
    await rig.feed(LOUD, 8)
    await rig.feed(QUIET, 3)
    assert rig.asked[-1][1] == FINAL_PRIORITY
    await rig.answer("Hello.")
    assert rig.told() == [("user_speaking",), ("fragment", "Hello.", False)]
    await rig.feed(QUIET, ENDPOINT_WINDOWS - 4)
    assert rig.told() == []
    await rig.feed(QUIET)
    assert [message["timestamp"] for message in rig.sent] == [1000 + rig.now] * 2
    assert rig.told() == [("fragment", "Hello.", True), ("vad_end",)]
    assert len(rig.asked) == 1


@scripted
async def test_a_slow_recogniser_delays_the_final_but_loses_nothing(rig: Rig) -> None:
    await rig.feed(LOUD, 8)
    await rig.feed(QUIET, ENDPOINT_WINDOWS)
    await rig.feed(LOUD, 12)
    assert rig.told() == [("user_speaking",), ("user_speaking",)]
    assert len(rig.asked) == 1
    await rig.answer("First.")
    assert rig.told() == [("fragment", "First.", True), ("vad_end",)]
    await rig.feed(LOUD, 10)
    assert len(rig.asked) == 1, "partials keep a slow recogniser busy only part of the time"
    await rig.feed(LOUD, 70)
    await rig.answer("Second")
    assert rig.told() == [("fragment", "Second", False)]


@scripted
async def test_only_the_newest_request_waits(rig: Rig) -> None:
    await rig.feed(LOUD, 12)
    assert len(rig.asked) == 1
    await rig.feed(LOUD, 100)
    await rig.feed(QUIET, 3)
    await rig.feed(LOUD, 4)
    await rig.feed(QUIET, 3)
    assert len(rig.asked) == 1
    await rig.answer("one")
    assert rig.asked[1] == (12 + 100 + 3 + 4 + 3, FINAL_PRIORITY)


@scripted
async def test_a_pause_that_was_none_is_just_a_partial(rig: Rig) -> None:
    await rig.feed(LOUD, 8)
    await rig.feed(QUIET, 3)
    await rig.feed(LOUD, 2)
    await rig.answer("Tell me")
    assert rig.told() == [("user_speaking",), ("fragment", "Tell me", False)]
    await rig.feed(QUIET, 3)
    await rig.answer("Tell me more.")
    await rig.feed(QUIET, ENDPOINT_WINDOWS - 3)
    assert rig.told() == [("fragment", "Tell me more.", False), ("fragment", "Tell me more.", True), ("vad_end",)]


@scripted
async def test_noise_without_words_still_ends_the_turn(rig: Rig) -> None:
    await rig.feed(LOUD, 3)
    await rig.feed(QUIET, 3)
    await rig.answer("")
    await rig.feed(QUIET, ENDPOINT_WINDOWS)
    assert rig.told() == [("user_speaking",), ("vad_end",)]


@scripted
async def test_stop_capture_ends_the_turn_at_once(rig: Rig) -> None:
    await rig.feed(LOUD, 8)
    rig.session.flush()
    await settle()
    await rig.answer("Stop.")
    assert rig.told() == [("user_speaking",), ("fragment", "Stop.", True), ("vad_end",)]
    rig.session.flush()
    await rig.feed(QUIET, 20)
    assert rig.told() == []
    assert len(rig.asked) == 1


@scripted
async def test_stop_capture_in_a_pause_uses_what_is_transcribed(rig: Rig) -> None:
    await rig.feed(LOUD, 8)
    await rig.feed(QUIET, 3)
    await rig.answer("Stop.")
    rig.session.flush()
    assert rig.told()[-2:] == [("fragment", "Stop.", True), ("vad_end",)]
    assert len(rig.asked) == 1


@scripted
async def test_start_capture_drops_what_was_being_said(rig: Rig) -> None:
    await rig.feed(LOUD, 12)
    rig.session.start()
    await rig.answer("dropped")
    assert rig.told() == [("user_speaking",)]
    await rig.feed(QUIET, 20)
    assert rig.told() == []
    await rig.feed(LOUD, 12)
    await rig.answer("kept")
    assert rig.told() == [("user_speaking",), ("fragment", "kept", False)]


@scripted
async def test_a_long_speech_is_fixed_at_a_pause_and_goes_on(rig: Rig) -> None:
    await rig.feed(LOUD, 12)
    await rig.answer("long")
    await rig.feed(LOUD, 320)
    await rig.answer("very long")
    await rig.feed(QUIET, 3)
    rig.told()
    await rig.answer("Very long.")
    assert rig.told() == [("fragment", "Very long.", True)]
    await rig.feed(LOUD, 12)
    assert rig.asked[-1][0] < 20
    await rig.answer("and on")
    await rig.feed(QUIET, 3)
    await rig.answer("And on.")
    await rig.feed(QUIET, ENDPOINT_WINDOWS - 3)
    assert rig.told()[-2:] == [("fragment", "And on.", True), ("vad_end",)]


@scripted
async def test_speech_without_any_pause_is_cut_after_twenty_seconds(rig: Rig) -> None:
    await rig.feed(LOUD, 12)
    await rig.answer("long")
    await rig.feed(LOUD, 625)
    for _ in range(3):
        if not rig.answers[-1].done():
            await rig.answer("longer")
    assert ("fragment", "longer", True) in rig.told()
    assert max(windows for windows, _ in rig.asked) == 625


@scripted
async def test_half_a_sample_is_refused(rig: Rig) -> None:
    with pytest.raises(ValueError, match="2 bytes a sample"):
        rig.session.feed(b"\0", 0.0)
