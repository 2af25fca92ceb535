"""What tests make the scripted server say, over and over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.console.scripted_agent import BREAKDOWN
from tests.console.scripted_server import ScriptedServer

if TYPE_CHECKING:
    from tests.console.page import Console

ANSWER = "One two three four five six."
LOST = ("WebSocket connection to",)
"""What a browser's console says of a connection that a test cuts."""


def move(server: ScriptedServer, before: str, after: str, trigger: str) -> None:
    server.say("state_change", **{"from": before, "to": after, "trigger": trigger, "latency_ms": 12.0})


def hear(server: ScriptedServer, *pieces: str) -> None:
    server.say("state_update", state="LISTENING", text_buffer=list(pieces))


def respond(server: ScriptedServer, turn: int, text: str = ANSWER, rate: int = 24_000, **more: Any) -> None:
    usual = {
        "turn_number": turn,
        "text": text,
        "is_partial": False,
        "intent": "unknown",
        "confidence": 0.5,
        "audio": True,
        "audio_format": {"encoding": "pcm_s16le", "sample_rate": rate, "channels": 1},
        "latency_breakdown": BREAKDOWN,
    }
    server.say("response_ready", **{**usual, **more})
    move(server, "THINKING", "SPEAKING", "first_audio")


def complete(server: ScriptedServer, turn: int, text: str = ANSWER, **more: Any) -> None:
    usual = {
        "turn_number": turn,
        "state": "IDLE",
        "text": text,
        "cancelled": False,
        "truncated": False,
        "degraded": [],
        "latency_breakdown": BREAKDOWN,
    }
    server.say("turn_complete", **{**usual, **more})


def begin_turn(server: ScriptedServer, console: Console, text: str = "A question", **more: Any) -> None:
    """The user types a question, and the server starts to answer turn 1."""
    console.ask(text)
    server.wait_for("vad_end")
    hear(server, text)
    respond(server, 1, **more)
