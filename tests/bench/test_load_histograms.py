from __future__ import annotations

import json
import math

import pytest

from loadtests.histograms import Histograms, Threshold, broken


def test_histograms_of_two_processes_make_one() -> None:
    master, worker = Histograms(), Histograms()
    for ms in range(1, 51):
        master.record("first audio", ms)
    for ms in range(51, 101):
        worker.record("first audio", ms)
    sent = json.loads(json.dumps(worker.take()))
    master.merge(sent)
    assert master.count("first audio") == 100
    assert master.ms("first audio", 0.99) == pytest.approx(99, rel=1e-3)
    assert worker.take() == {}
    assert math.isnan(master.ms("unknown", 0.5))


def test_times_over_a_hundred_milliseconds_are_not_rounded() -> None:
    histograms = Histograms()
    histograms.record("first audio", 443.21)
    assert histograms.ms("first audio", 1.0) == pytest.approx(443.21, rel=1e-3)


def test_limits_name_what_broke_them() -> None:
    histograms = Histograms()
    for ms in (100.0, 200.0, 500.0):
        histograms.record("first audio", ms)
    kept = Threshold("first audio", 0.5, 200.5)
    late = Threshold("first audio", 0.99, 445.0)
    absent = Threshold("barge-in", 0.99, 100.0)
    assert broken((kept,), histograms) == []
    lines = broken((kept, late, absent), histograms)
    assert len(lines) == 2
    assert "p99 is 500" in lines[0]
    assert "445" in lines[0]
    assert lines[1] == "barge-in: nothing was measured"
