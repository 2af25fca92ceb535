"""`bench barge-in`: everybody is speaking, everybody is interrupted; how fast it stops and what still comes."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import uvloop

from bench import report
from bench.client import UTTERANCES, Turn
from bench.crowd import failures
from bench.fakes import FakeConfig
from bench.measure import Spread, quantile
from bench.runs import Stack, Target, connected_crowd, no_collections, stack, tick
from bench.timers import timers_for

_FIRST_AUDIO_S = 0.29
_START_S = 4.0
_SPEECH_S = 8.0


@dataclass(frozen=True, slots=True)
class Round:
    """One round: every session began to speak and was interrupted once."""

    turns: list[Turn]
    connections: int
    llm_connections: int
    cancels: int
    aborted: int

    @property
    def stopped(self) -> list[Turn]:
        return [turn for turn in self.turns if turn.interrupted]

    def server_ms(self, q: float) -> float:
        return quantile((turn.stop_latency_ms for turn in self.stopped), q)

    def client_ms(self, q: float) -> float:
        return quantile(((turn.interrupted - turn.barge_sent) * 1000 for turn in self.stopped), q)

    @property
    def tail_bytes(self) -> int:
        return sum(turn.tail_bytes for turn in self.turns)

    @property
    def late_bytes(self) -> float:
        return quantile((float(turn.late_bytes) for turn in self.stopped), 0.5)

    @property
    def connections_per_turn(self) -> float:
        return self.connections / len(self.stopped) if self.stopped else float("nan")


def speaking_config(config: FakeConfig) -> FakeConfig:
    """Eight seconds of speech, synthesised 1.25 times as fast as it plays, so that a stream is always open."""
    frame_ms = config.tts_frame_ms
    return replace(config, tts_ms_per_word=200.0, tts_spacing_ms=frame_ms * 0.8)


async def measure(up: Stack, sessions: int, rounds: int) -> list[Round]:
    timers = timers_for(asyncio.get_running_loop())
    crowd = await connected_crowd(up, sessions, timers)
    rng = random.Random(7)
    done: list[Round] = []
    try:
        with no_collections():
            for number in range(1, rounds + 1):
                begun = len(crowd.turns)
                start = monotonic() + 0.2
                before = up.fakes.stats()
                for _ in range(sessions):
                    offset = rng.uniform(0, _START_S)
                    stop = rng.uniform(_START_S + 0.6, _SPEECH_S)
                    utterance = rng.choice(UTTERANCES[False])
                    crowd.schedule(start + offset, utterance, stop - offset - _FIRST_AUDIO_S)
                await tick(f"{up.target.name} barge-in {number}/{rounds}", start + _SPEECH_S + 1.0)
                await crowd.settle(12.0)
                after = up.fakes.stats()
                done.append(
                    Round(
                        crowd.turns[begun:],
                        after["tts"].connections - before["tts"].connections,
                        after["llm"].connections - before["llm"].connections,
                        after["tts"].cancels - before["tts"].cancels,
                        sum(after[name].aborted - before[name].aborted for name in ("llm", "tts")),
                    )
                )
    finally:
        crowd.close()
        await asyncio.sleep(0.1)
        timers.close()
    return done


def run(
    target: Target, config: FakeConfig, *, protocols: tuple[str, ...], sessions: int = 500, rounds: int = 4
) -> dict[str, Any]:
    """Measures, prints and writes results. The first round warms up and is left out."""
    rows: list[list[str]] = []
    entries: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    measured: list[tuple[str, list[Round]]] = []
    for protocol in protocols:
        with stack(target.with_env(TTS_PROTOCOL=protocol), speaking_config(config)) as up:
            measured.append((protocol, uvloop.run(measure(up, sessions, rounds))[1:]))
    for protocol, done in measured:
        figures = {
            "server_p50_ms": Spread.over(done, lambda r: r.server_ms(0.5)),
            "server_p99_ms": Spread.over(done, lambda r: r.server_ms(0.99)),
            "client_p50_ms": Spread.over(done, lambda r: r.client_ms(0.5)),
            "client_p99_ms": Spread.over(done, lambda r: r.client_ms(0.99)),
            "late_bytes_p50": Spread.over(done, lambda r: r.late_bytes),
            "tail_bytes": Spread.over(done, lambda r: float(r.tail_bytes)),
            "connections_per_turn": Spread.over(done, lambda r: r.connections_per_turn),
        }
        stopped = sum(len(each.stopped) for each in done)
        digits = {"late_bytes_p50": 0, "tail_bytes": 0}
        rows.append([protocol, str(stopped), *(spread.text(digits.get(name, 2)) for name, spread in figures.items())])
        entries.append(
            {
                "tts_protocol": protocol,
                "sessions": sessions,
                "interrupted": stopped,
                "turns": sum(len(each.turns) for each in done),
                "aborted_streams": [each.aborted for each in done],
                "cancels": [each.cancels for each in done],
                "llm_connections": [each.llm_connections for each in done],
                "failures": failures([turn for each in done for turn in each.turns]),
                **{name: spread.json() for name, spread in figures.items()},
            }
        )
    headings = (
        "TTS protocol", "interrupted", "server p50 ms", "p99", "client p50 ms", "p99",
        "bytes in flight", "tail bytes", "new connections",
    )  # fmt: skip
    report.table(headings, rows, title=f"Barge-in, {target.name}, {sessions} sessions speaking; median [min–max]")
    _explain(entries)
    if target.name == "orchestrator":
        for (protocol, done), limit in zip(
            measured, [{"openai": 1.0, "stream": 0.0}[p] for p in protocols], strict=True
        ):
            p99 = Spread.over(done, lambda r: r.server_ms(0.99)).median
            tail = float(sum(each.tail_bytes for each in done))
            opened = Spread.over(done, lambda r: r.connections_per_turn).median
            bars.append(report.verdict(f"stop latency p99, {protocol}", p99, 2.0, "ms"))
            bars.append(report.verdict(f"tail bytes, {protocol}", tail, 0.0, "bytes"))
            bars.append(report.verdict(f"connections per interrupted turn, {protocol}", opened, limit, "each"))
    data = {"target": target.name, "runs": entries, "bars": bars}
    report.save(f"barge-in-{target.name}", data)
    return data


def _explain(entries: list[dict[str, Any]]) -> None:
    report.note("server: receipt → `interrupted` written, as it reports; client: `user_speaking` sent → received")
    report.note("tail bytes: audio after `interrupted`; new connections: to the TTS, per interrupted turn")
    for entry in entries:
        for why, count in entry["failures"].items():
            report.note(f"failed turns ({entry['tts_protocol']}): {count} × {why}")
        if entry["interrupted"] < entry["turns"] - sum(entry["failures"].values()):
            report.note(f"not interrupted: {entry['turns'] - entry['interrupted']} of {entry['turns']} turns")
