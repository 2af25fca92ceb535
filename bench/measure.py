"""Numbers with their spread: quantiles of one window, and the median and range over repeated windows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

# One microsecond to one minute, three significant digits.
_LOWEST_US, _HIGHEST_US, _DIGITS = 1, 60_000_000, 3


def quantile(values: Iterable[float], q: float) -> float:
    """The exact nearest-rank quantile; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure measured in several windows of the same run."""

    values: tuple[float, ...]

    @classmethod
    def over(cls, windows: Sequence[Any], figure: Callable[[Any], float]) -> Spread:
        return cls(tuple(figure(window) for window in windows))

    @property
    def median(self) -> float:
        known = [value for value in self.values if not math.isnan(value)]
        return statistics.median(known) if known else math.nan

    @property
    def low(self) -> float:
        return min(self.values, default=math.nan)

    @property
    def high(self) -> float:
        return max(self.values, default=math.nan)

    def __sub__(self, other: float) -> Spread:
        return Spread(tuple(value - other for value in self.values))

    def text(self, digits: int = 2) -> str:
        """`median [low–high]`."""
        if math.isnan(self.median):
            return "–"
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}–{self.high:.{digits}f}]"

    def json(self) -> dict[str, Any]:
        return {"median": self.median, "min": self.low, "max": self.high, "windows": list(self.values)}


def histogram(values_ms: Iterable[float]) -> HdrHistogram:
    """An HdrHistogram in microseconds; values under one microsecond count as one."""
    result = HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)
    for value in values_ms:
        result.record_value(max(_LOWEST_US, min(_HIGHEST_US, round(value * 1000))))
    return result


def encoded(values_ms: Iterable[float]) -> str:
    """The histogram in HdrHistogram's portable encoding, for the JSON results."""
    return bytes(histogram(values_ms).encode()).decode("ascii")
