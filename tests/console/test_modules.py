"""The page's pure parts, run in the browser: resampling and the layout of the waterfall."""

from __future__ import annotations

from typing import Any

import pytest

from tests.console.conftest import OpenConsole
from tests.console.scripted_agent import BREAKDOWN
from tests.console.scripted_server import ScriptedServer

RESAMPLE = """async ([from, to, hertz, chunk]) => {
  const { Resampler } = await import('/resampler.js');
  const resampler = new Resampler(from, to);
  const input = Float32Array.from({ length: from }, (_, i) => Math.sin(2 * Math.PI * hertz * i / from));
  const output = [];
  for (let at = 0; at < input.length; at += chunk) output.push(...resampler.process(input.slice(at, at + chunk)));
  output.push(...resampler.finish());
  const inside = output.slice(500, -500);
  const ideal = (i) => Math.sin(2 * Math.PI * hertz * (i + 500) / to);
  const error = Math.max(...inside.map((value, i) => Math.abs(value - ideal(i))));
  const energy = output.reduce((sum, value) => sum + value * value, 0);
  return { length: output.length, error, peak: Math.max(...inside.map(Math.abs)), energy };
}"""


@pytest.mark.parametrize(("rate", "to"), [(48_000, 16_000), (44_100, 16_000), (22_050, 48_000), (24_000, 44_100)])
def test_resampling_keeps_tones_time_and_chunks(
    server: ScriptedServer, open_console: OpenConsole, rate: int, to: int
) -> None:
    page = open_console(server.url).page
    whole = page.evaluate(RESAMPLE, [rate, to, 1000, rate])
    assert whole["length"] == to
    assert whole["error"] < 0.001
    chunked = page.evaluate(RESAMPLE, [rate, to, 1000, 137])
    assert chunked == whole


def test_resampling_down_lets_nothing_alias(server: ScriptedServer, open_console: OpenConsole) -> None:
    page = open_console(server.url).page
    assert page.evaluate(RESAMPLE, [48_000, 16_000, 9500, 1024])["peak"] < 0.001


def lay_out(page: Any, breakdown: dict[str, Any]) -> dict[str, Any]:
    chart: dict[str, Any] = page.evaluate(
        "async breakdown => (await import('/waterfall.js')).layOut(breakdown, 445)", breakdown
    )
    chart["rows"] = {row["key"]: (row["start"], row["length"]) for row in chart["rows"]}
    return chart


def test_waterfall_puts_each_stage_behind_the_one_it_waited_for(
    server: ScriptedServer, open_console: OpenConsole
) -> None:
    page = open_console(server.url).page
    chart = lay_out(page, BREAKDOWN)
    rows = chart["rows"]
    assert rows["intent"][0] == rows["rag"][0] == pytest.approx(48.2)
    assert rows["llm"][0] == rows["clause"][0] == pytest.approx(48.2 + 79.3)
    assert rows["tts"] == (pytest.approx(48.2 + 79.3 + 121.8), 71.5)
    assert sum(rows["overhead"]) == pytest.approx(chart["total"]) == pytest.approx(321.7)
    assert sum(segment["length"] for segment in chart["segments"]) == pytest.approx(321.7)
    assert chart["within"]
    assert "saved" not in rows


def test_waterfall_of_retrieval_that_answers_itself(server: ScriptedServer, open_console: OpenConsole) -> None:
    breakdown = {"intent_ms": 40.0, "rag_ms": 90.0, "intent_rag_ms": 90.0, "first_clause_ms": 95.0,
                 "tts_first_chunk_ms": 60.0, "overhead_ms": 2.0, "total_ms": 157.0}  # fmt: skip
    rows = lay_out(open_console(server.url).page, breakdown)["rows"]
    assert rows["clause"] == (0, 95)
    assert rows["tts"] == (95, 60)


def test_waterfall_shows_what_was_saved_before_the_end_of_speech(
    server: ScriptedServer, open_console: OpenConsole
) -> None:
    breakdown = {"stt_ms": 20.0, "intent_ms": 0.0, "rag_ms": 10.0, "intent_rag_ms": 10.0, "first_clause_ms": 400.0,
                 "tts_first_chunk_ms": 60.0, "overhead_ms": 2.0, "saved_ms": 70.0, "total_ms": 492.0,
                 "within_budget": False}  # fmt: skip
    chart = lay_out(open_console(server.url).page, breakdown)
    assert chart["rows"]["saved"] == (-50, 70)
    assert chart["from"] == -50
    assert not chart["within"]
    assert chart["to"] > 492


@pytest.mark.parametrize(
    ("heard", "rest"),
    [
        ("", "One  two,\nthree."),
        ("One two,", "three."),
        ("One", "two,\nthree."),
        ("One two, three.", ""),
        ("x" * 99, ""),
    ],
)
def test_what_was_heard_is_found_whatever_the_white_space(
    server: ScriptedServer, open_console: OpenConsole, heard: str, rest: str
) -> None:
    found = open_console(server.url).page.evaluate(
        """async ([full, heard]) =>
        full.slice((await import('/conversation.js')).heardLength(full, heard))""",
        ["One  two,\nthree.", heard],
    )
    assert found == rest
