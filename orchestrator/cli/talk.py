"""`orchestrator talk`: one spoken or typed question through a running server."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.caller import Exchange, call
from orchestrator.cli.recording import read_recording, write_recording

BAR_WIDTH = 44
_STAGES = (
    ("stt_ms", "speech to text"),
    ("intent_ms", "intent"),
    ("rag_ms", "retrieval"),
    ("intent_rag_ms", "intent beside retrieval"),
    ("llm_first_token_ms", "LLM, first token"),
    ("first_clause_ms", "LLM, first clause"),
    ("tts_first_chunk_ms", "TTS, first chunk"),
    ("overhead_ms", "orchestrator itself"),
    ("saved_ms", "saved by speculation"),
    ("total_ms", "end of speech to audio"),
)


async def hold_conversation(
    url: str,
    session_id: str,
    token: str,
    wav: Path | None,
    text: str | None,
    barge_in_ms: float | None,
    out: Path | None,
) -> Exchange:
    """Ask, print the conversation and its latencies, write the answer's audio. Raises CallError, RecordingError."""
    pcm = read_recording(wav) if wav is not None else b""
    async with call(url, session_id or f"talk-{uuid.uuid4()}", token, _Printer().show) as caller:
        greeting = caller.greeting
        click.echo(f"connected: session {greeting['session_id']} on slot {greeting['slot']} of {greeting['node']}")
        if text is not None:
            exchange = await caller.type_question(text, barge_in_ms)
        else:
            click.echo(f"speaking {wav} ({len(pcm) / 32_000:.1f} s) …")
            exchange = await caller.speak(pcm, barge_in_ms)
    print_exchange(exchange)
    if out is not None and exchange.audio:
        write_recording(out, bytes(exchange.audio), exchange.sample_rate)
        click.echo(f"answer's audio: {out} ({len(exchange.audio) / 2 / exchange.sample_rate:.1f} s)")
    return exchange


class _Printer:
    """Shows the transcript as it grows."""

    def __init__(self) -> None:
        self._shown = ""

    def show(self, kind: str, message: dict[str, Any]) -> None:
        if kind == "state_update":
            text = " ".join(message["text_buffer"])
            if text != self._shown:
                self._shown = text
                click.echo(f"  heard so far: {text}")
        elif kind == "error":
            click.echo(f"  error {message['code']}: {message['message']}", err=True)


def print_exchange(exchange: Exchange) -> None:
    """The conversation, then the breakdown with a bar for each stage against the budget."""
    click.echo(f"\n  caller  {exchange.transcript}")
    click.echo(f"  intent  {exchange.intent} ({exchange.confidence:.2f})")
    click.echo(f"  agent   {exchange.answer}")
    if exchange.interrupted:
        click.echo(f"  barge-in: heard of it {exchange.heard!r}")
    if exchange.degraded:
        click.echo(f"  degraded: {', '.join(exchange.degraded)}")
    breakdown = exchange.breakdown
    budget = float(breakdown.get("budget_ms", 445.0))
    click.echo(f"\n  latency of the turn (budget {budget:g} ms)")
    for name, label in _STAGES:
        if name in breakdown:
            value = float(breakdown[name])
            bar = "█" * max(0, min(BAR_WIDTH, round(value / budget * BAR_WIDTH)))
            click.echo(f"  {label:<24}{value:>8.1f} ms  {bar}")
    if breakdown:
        verdict = "within" if breakdown.get("within_budget") else f"over ({breakdown.get('budget_broken_by', '?')})"
        click.echo(f"  {verdict} the budget")
    if exchange.response_ms is not None:
        click.echo(f"  as the caller heard it, from the last sound of speech: {exchange.response_ms:.0f} ms")
