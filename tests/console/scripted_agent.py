"""A small agent for the scripted server: it listens, answers in paced tones, and yields when spoken over."""

from __future__ import annotations

import array
import asyncio
import contextlib
import math
from typing import Any

from tests.console.scripted_server import AUDIO_FORMAT, SAMPLE_RATE, Link, greeting

CLAUSES = (
    "You need a secondary school certificate,",
    "a transcript of your grades, and proof of English at level B2.",
    "The application closes on the fifteenth of July for the winter term.",
)
QUESTION = "What are admission requirements?"
CLAUSE_SECONDS = 0.7
FRAME_SECONDS = 0.1
LEAD_SECONDS = 0.4
LOUD = 0.02
LOUD_FRAMES = 6
QUIET_FRAMES = 12

BREAKDOWN = {
    "stt_ms": 48.2,
    "intent_ms": 41.7,
    "rag_ms": 78.9,
    "intent_rag_ms": 79.3,
    "llm_first_token_ms": 96.4,
    "first_clause_ms": 121.8,
    "tts_first_chunk_ms": 71.5,
    "thinking_ms": 201.9,
    "overhead_ms": 0.9,
    "total_ms": 321.7,
    "budget_ms": 445.0,
    "within_budget": True,
}


def tone(seconds: float, hertz: float = 220.0, rate: int = SAMPLE_RATE) -> bytes:
    """A PCM16 tone with a soft start and end."""
    count = round(seconds * rate)
    edge = max(1, round(0.01 * rate))
    samples = array.array("h")
    for i in range(count):
        gain = min(1.0, i / edge, (count - i) / edge)
        samples.append(round(9000 * gain * math.sin(2 * math.pi * hertz * i / rate)))
    return samples.tobytes()


def loudness(pcm: bytes) -> float:
    """Root mean square of PCM16, 0…1."""
    samples = array.array("h", pcm)
    return math.sqrt(sum(sample * sample for sample in samples) / len(samples)) / 32768


class Agent:
    """The conversation of one page: the five states, barge-in, playback reports, and endpointing by loudness."""

    def __init__(self) -> None:
        self.state = "IDLE"
        self.turn = 0
        self.fixed: list[str] = []
        self.partial = ""
        self.played_ms = 0.0
        self.loud = 0
        self.quiet = 0
        self._turn_task: asyncio.Task[None] | None = None

    async def opened(self, link: Link) -> None:
        resumed = "last_seq" in link.query
        await link.say("connected", **greeting(state=self.state, turn_number=self.turn, resumed=resumed))

    async def gone(self, link: Link) -> None:
        await self._end_turn()
        self.state = "IDLE"

    async def heard(self, link: Link, message: dict[str, Any] | bytes) -> None:
        if isinstance(message, bytes):
            await self._listen(link, message)
        elif message["type"] == "ping":
            await link.say("pong", id=message.get("id"))
        elif message["type"] == "stt_fragment":
            await self._fragment(link, message["text"], message.get("is_final", False))
        elif message["type"] == "vad_end":
            await self._vad_end(link)
        elif message["type"] == "user_speaking":
            await self._yield_to_user(link)
        elif message["type"] == "playback" and message["turn_number"] == self.turn:
            self.played_ms = message["played_ms"]
        elif message["type"] == "cancel" and self._turn_task is not None:
            await self._end_turn()
            await link.say("turn_complete", turn_number=self.turn, state="IDLE", text="", cancelled=True,
                           truncated=False, degraded=[], latency_breakdown={})  # fmt: skip
            await self._move(link, "IDLE", "cancel")

    async def _listen(self, link: Link, pcm: bytes) -> None:
        if loudness(pcm) > LOUD:
            self.loud += 1
            self.quiet = 0
            if self.loud == LOUD_FRAMES:
                await self._yield_to_user(link)
        else:
            self.quiet += 1
        if self.loud >= LOUD_FRAMES and self.quiet == QUIET_FRAMES:
            self.loud = 0
            await self._fragment(link, QUESTION, True)
            await self._vad_end(link)

    async def _move(self, link: Link, state: str, trigger: str) -> None:
        before, self.state = self.state, state
        if before != state:
            await link.say("state_change", **{"from": before, "to": state, "trigger": trigger, "latency_ms": 12.5})

    async def _yield_to_user(self, link: Link) -> None:
        if self.state == "IDLE":
            await self._move(link, "LISTENING", "user_speaking")
        if self.state != "SPEAKING":
            return
        await self._end_turn()
        await self._move(link, "INTERRUPT", "user_speaking")
        words = " ".join(CLAUSES).split()
        share = self.played_ms / (1000 * CLAUSE_SECONDS * len(CLAUSES))
        heard = " ".join(words[: round(len(words) * min(1.0, share))])
        await link.say("interrupted", turn_number=self.turn, message="barge-in", heard_text=heard,
                       played_ms=self.played_ms, stop_latency_ms=0.4)  # fmt: skip
        await self._move(link, "LISTENING", "interrupted")

    async def _fragment(self, link: Link, text: str, final: bool) -> None:
        await self._yield_to_user(link)
        if final:
            self.fixed.append(text)
        self.partial = "" if final else text
        await self._move(link, "LISTENING", "fragment")
        buffer = [*self.fixed, self.partial] if self.partial else [*self.fixed]
        await link.say("state_update", state="LISTENING", text_buffer=buffer)

    async def _vad_end(self, link: Link) -> None:
        if not self.fixed or self.state != "LISTENING":
            await link.say("notice", code="nothing_heard", message="Nothing was heard.")
            await self._move(link, "IDLE", "vad_end")
            return
        self.fixed.clear()
        self.turn += 1
        self.played_ms = 0.0
        await self._move(link, "THINKING", "vad_end")
        self._turn_task = asyncio.create_task(self._answer(link))

    async def _answer(self, link: Link) -> None:
        await link.say("processing", stage="intent_rag", progress=0.3, details={"passages": 4})
        await asyncio.sleep(0.15)
        turn = {"turn_number": self.turn}
        await link.say("response_ready", **turn, text=CLAUSES[0], is_partial=True, intent="admission_requirements",
                       confidence=0.93, thinking_ms=201.9, audio=True, audio_format=AUDIO_FORMAT,
                       latency_breakdown=BREAKDOWN)  # fmt: skip
        await self._move(link, "SPEAKING", "first_audio")
        loop = asyncio.get_running_loop()
        play_end = loop.time()
        for index, clause in enumerate(CLAUSES):
            if index:
                await link.say("response_text", **turn, index=index, text=clause)
            for _ in range(round(CLAUSE_SECONDS / FRAME_SECONDS)):
                await asyncio.sleep(max(0.0, play_end - LEAD_SECONDS - loop.time()))
                await link.play(tone(FRAME_SECONDS, 200.0 + 40 * index))
                play_end = max(play_end, loop.time()) + FRAME_SECONDS
        await asyncio.sleep(max(0.0, play_end - loop.time()))
        await link.say("turn_complete", **turn, state="IDLE", text=" ".join(CLAUSES), cancelled=False, truncated=False,
                       degraded=[], latency_breakdown=BREAKDOWN)  # fmt: skip
        await self._move(link, "IDLE", "speech_finished")
        self._turn_task = None

    async def _end_turn(self) -> None:
        task, self._turn_task = self._turn_task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
