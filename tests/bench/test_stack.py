from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from click.testing import CliRunner

from bench import compare
from bench.cli import main
from bench.fakes import Delay, FakeConfig
from bench.runs import FASTAPI_TARGET, Plan, Target, run_plan, stack
from bench.sut import NICE_VARIABLE, Child, StartError, apply_priority, process_tree

EVERYWHERE = frozenset(os.sched_getaffinity(0))
SHORT = FakeConfig(
    intent=Delay.fixed(2),
    rag=Delay.fixed(3),
    llm_first=Delay.fixed(4),
    tts_first=Delay.fixed(5),
    llm_gap_ms=0.5,
    tts_ms_per_word=10.0,
    tts_frame_ms=10.0,
)


@pytest.mark.server
@pytest.mark.skipif(bool(compare.why_missing(FASTAPI_TARGET)), reason="the FastAPI peer is not installed")
def test_run_plays_whole_turns_and_accounts_for_them() -> None:
    config = replace(SHORT, log_timings=True)
    plan = Plan(30, 12.0, windows=1, window_s=1.5, warmup_s=0.5, partials=True, extra_windows=0)
    with stack(FASTAPI_TARGET, config) as up:
        result = uvloop.run(run_plan(up, plan, "test"))
        stats = up.fakes.stats()
    assert result.failures == {}
    assert result.lost == []
    turns = result.windows[0].good
    assert turns
    assert {turn.audio_bytes for turn in turns} == {40 * 480}
    assert all(overhead > 0 for overhead in result.windows[0].overheads)
    # The waits that the services logged are never less than what they were told to wait.
    waits = [turn.total_ms - own for turn, own in zip(turns, result.windows[0].overheads, strict=True)]
    assert min(waits) >= 3 + 4 + 7 * 0.5 + 5 - 0.2
    assert stats["tts"].requests >= len(turns)
    assert os.sched_getaffinity(0) == EVERYWHERE


def test_server_that_dies_is_one_clear_error() -> None:
    broken = Target("broken", (sys.executable, "-c", "print('no such setting'); raise SystemExit(3)"))
    with pytest.raises(StartError, match=r"stopped(.|\n)*no such setting"), stack(broken, SHORT):
        pass
    missing = Target("missing", ("/nonexistent/server",))
    with pytest.raises(StartError, match="cannot run '/nonexistent/server'"), stack(missing, SHORT):
        pass


def test_stopped_child_leaves_no_process_of_its_session() -> None:
    script = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('up', flush=True); time.sleep(60)"
    child = Child((sys.executable, "-c", script), {}, EVERYWHERE)
    for _ in range(500):
        if "up" in child.output():
            break
        time.sleep(0.01)
    pids = process_tree(child.process.pid)
    assert len(pids) == 2
    child.stop()
    for _ in range(500):
        if not any(_runs(pid) for pid in pids):
            return
        time.sleep(0.01)
    pytest.fail("a process outlived stop()")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["e2e", "--rag", "lognormal:9"], "lognormal:P50,P99"),
        (["e2e", "--point", "many"], "SESSIONS,RATE"),
        (["e2e", "--command", "/nonexistent/server"], "cannot run '/nonexistent/server'"),
        (["peers", "--only", "nobody"], "nobody"),
    ],
)
def test_users_mistakes_are_one_line(arguments: list[str], complaint: str) -> None:
    outcome = CliRunner().invoke(main, arguments)
    assert outcome.exit_code != 0
    assert complaint in outcome.output
    assert "Traceback" not in outcome.output


def test_wrong_priority_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NICE_VARIABLE, "very")
    with pytest.raises(StartError, match="BENCH_NICE='very'"):
        apply_priority()
