"""`bench micro`: what the single steps of a turn cost, in CPU time of this thread.

The only module of the harness that imports the orchestrator. `python -m bench.micro` prints JSON, nanoseconds by
case; that is how `bench gate` measures two trees with the same code of this file.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.measure import Spread
from bench.report import note, save, table

# Repeats take about this long each; short enough for most of them to run undisturbed.
_REPEAT_NS = 4_000_000
SLOWDOWN_VARIABLE = "BENCH_INJECT_SLOWDOWN"
Work = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Case:
    """`prepare` returns work to do a given number of times; `per_call` is how many steps one time is."""

    name: str
    prepare: Callable[[], Work]
    per_call: int = 1


def _fsm_step() -> Work:
    from orchestrator.core.fsm import Event, EventKind, Machine, Policy, step

    policy = Policy()
    words = ["what", "are", "the", "admission", "requirements"]
    partials = [Event(EventKind.FRAGMENT, 1.0, " ".join(words[: i + 1])) for i in range(4)]
    events = [
        *partials,
        Event(EventKind.FRAGMENT, 1.5, " ".join(words), True),
        Event(EventKind.VAD_END, 2.0),
        Event(EventKind.FIRST_AUDIO, 2.3),
        Event(EventKind.SPEECH_FINISHED, 6.3),
    ]

    def work(times: int) -> None:
        machine = Machine()
        for _ in range(times):
            for event in events:
                machine = step(machine, event, policy).machine

    return work


def _fragment_decode() -> Work:
    from orchestrator.wire.messages import decode_message

    frame = json.dumps(
        {
            "type": "stt_fragment",
            "session_id": "test_001",
            "text": "what are the admission requirements",
            "is_final": True,
            "timestamp": 1234567890.0,
        }
    ).encode()

    def work(times: int) -> None:
        for _ in range(times):
            decode_message(frame, "test_001")

    return work


def _message_encode() -> Work:
    from orchestrator.wire.frames import text_frame_header
    from orchestrator.wire.messages import encode_message

    fields: dict[str, Any] = {"state": "LISTENING", "text_buffer": ["what are the admission requirements"]}

    def work(times: int) -> None:
        for seq in range(times):
            payload = encode_message("state_update", "test_001", seq, 1234567890.0, fields)
            text_frame_header(len(payload)) + payload

    return work


def _audio_frame_encode() -> Work:
    from orchestrator.wire.frames import binary_frame_header

    audio = bytes(4800)

    def work(times: int) -> None:
        for _ in range(times):
            binary_frame_header(len(audio)) + audio

    return work


def _ring_lookup() -> Work:
    from orchestrator.core.ring import owner

    slots = list(range(8))
    names = [f"session-{i}" for i in range(64)]

    def work(times: int) -> None:
        for i in range(times):
            owner(names[i & 63], slots)

    return work


def _ledger() -> Work:
    from orchestrator.core.budget import Ledger

    stages = (("intent", 0.0, 0.05), ("rag", 0.0, 0.08), ("llm_first_token", 0.08, 0.18))

    def work(times: int) -> None:
        for _ in range(times):
            ledger = Ledger(0.0, 445.0, 750.0)
            for stage, begun, ended in stages:
                ledger.begin(stage, begun)
                ledger.end(stage, ended)
            ledger.begin("first_clause", 0.08)
            ledger.end("first_clause", 0.215)
            ledger.answerable(0.215)
            ledger.begin("tts_first_chunk", 0.215)
            ledger.left_ms(200.0, 0.215)
            ledger.end("tts_first_chunk", 0.29)
            ledger.first_audio(0.291)
            ledger.breakdown(0.291)

    return work


def _clause_cut() -> Work:
    from bench.fake_config import FakeConfig
    from orchestrator.core.clauses import ClauseCutter

    tokens = FakeConfig().tokens

    def work(times: int) -> None:
        for _ in range(times):
            cutter = ClauseCutter()
            for token in tokens:
                cutter.push(token)
            cutter.flush()

    return work


CASES = (
    Case("FSM step", _fsm_step, per_call=8),
    Case("fragment decode", _fragment_decode),
    Case("message encode", _message_encode),
    Case("audio frame encode", _audio_frame_encode),
    Case("ring lookup, 8 slots", _ring_lookup),
    Case("ledger of a turn", _ledger),
    Case("clause cut, a token", _clause_cut, per_call=40),
)


def measure(case: Case, repeats: int, slowdown: float = 0.0) -> list[float]:
    """Nanoseconds of CPU per step, one figure a repeat. `slowdown` 0.2 does a fifth more work than it counts."""
    work = case.prepare()
    times = 64
    while _timed(work, times) < _REPEAT_NS and times < 1 << 24:
        times *= 2
    extra = round(times * slowdown)
    return [_timed(work, times + extra) / (times * case.per_call) for _ in range(repeats)]


def _timed(work: Work, times: int) -> int:
    started = time.thread_time_ns()
    work(times)
    return time.thread_time_ns() - started


def measure_all(repeats: int, slowdown: float = 0.0) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Figures by case, and why a case could not be measured (another version of the code may lack its parts)."""
    figures: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    gc.collect()
    gc.disable()
    for case in CASES:
        try:
            figures[case.name] = measure(case, repeats, slowdown)
        except (ImportError, AttributeError, TypeError) as error:
            missing[case.name] = f"{type(error).__name__}: {error}"
    gc.enable()
    return figures, missing


def run(repeats: int = 60) -> dict[str, Any]:
    """Measures, prints and writes results."""
    figures, missing = measure_all(repeats)
    spreads = {name: Spread(tuple(values)) for name, values in figures.items()}
    rows = [
        [name, f"{spread.low:.0f}", f"{spread.median:.0f}", f"{spread.high:.0f}", f"{1e3 / spread.low:.2f}"]
        for name, spread in spreads.items()
    ]
    headings = ("step", "least ns", "median", "most", "M/s")
    table(headings, rows, title=f"Steps of a turn, CPU time, {repeats} repeats")
    for name, why in missing.items():
        note(f"{name} not measured: {why}")
    data = {"steps_ns": {name: spread.json() for name, spread in spreads.items()}, "missing": missing}
    save("micro", data)
    return data


def main() -> None:
    """Prints the least figure of each case as JSON: what noise cannot make smaller."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    slowdown = float(os.environ.get(SLOWDOWN_VARIABLE, "0"))
    figures, _ = measure_all(repeats, slowdown)
    sys.stdout.write(json.dumps({name: min(values) for name, values in figures.items()}))


if __name__ == "__main__":
    main()
