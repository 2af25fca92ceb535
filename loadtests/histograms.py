"""Exact latencies beside Locust's own statistics, which round what is over 100 ms.

One HdrHistogram per name, in microseconds, three digits. Locust workers send theirs to the master encoded, so that a
distributed run is judged on all values together and not on an average of percentiles.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

_LOWEST_US, _HIGHEST_US, _DIGITS = 1, 120_000_000, 3


def _empty() -> HdrHistogram:
    return HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)


class Histograms:
    """Latencies by name. `take` hands over what was recorded since the last time, for the master."""

    def __init__(self) -> None:
        self._all: dict[str, HdrHistogram] = {}
        self._fresh: dict[str, HdrHistogram] = {}

    def record(self, name: str, ms: float) -> None:
        """One latency; what is over two minutes counts as two minutes."""
        value = max(_LOWEST_US, min(_HIGHEST_US, round(ms * 1000)))
        for kept in (self._all, self._fresh):
            kept.setdefault(name, _empty()).record_value(value)

    def take(self) -> dict[str, str]:
        """The histograms since the last call, encoded as text."""
        fresh, self._fresh = self._fresh, {}
        return {name: base64.b64encode(each.encode()).decode() for name, each in fresh.items()}

    def merge(self, encoded: Mapping[str, str]) -> None:
        """Adds what another process `take`s."""
        for name, text in encoded.items():
            other = HdrHistogram.decode(base64.b64decode(text))
            self._all.setdefault(name, _empty()).add(other)

    def clear(self) -> None:
        self._all.clear()
        self._fresh.clear()

    def names(self) -> list[str]:
        return sorted(self._all)

    def count(self, name: str) -> int:
        return int(self._all[name].get_total_count()) if name in self._all else 0

    def ms(self, name: str, q: float) -> float:
        """The quantile in milliseconds; NaN where nothing was recorded."""
        if not self.count(name):
            return float("nan")
        return float(self._all[name].get_value_at_percentile(q * 100)) / 1000


@dataclass(frozen=True, slots=True)
class Threshold:
    """`quantile` of `name` must be at most `limit_ms`, and there must be values at all."""

    name: str
    quantile: float
    limit_ms: float

    def broken_by(self, histograms: Histograms) -> str:
        """One line that says what is wrong, or an empty string."""
        if not histograms.count(self.name):
            return f"{self.name}: nothing was measured"
        found = histograms.ms(self.name, self.quantile)
        if found <= self.limit_ms:
            return ""
        return f"{self.name}: p{self.quantile * 100:g} is {found:.1f} ms, the limit is {self.limit_ms:g} ms"


def broken(thresholds: Iterable[Threshold], histograms: Histograms) -> list[str]:
    """What is wrong, a line each."""
    return [line for each in thresholds if (line := each.broken_by(histograms))]
