"""How long a fake service takes: a fixed time, or a log-normal one with a tail."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

_Z99 = 2.3263478740408408


@dataclass(frozen=True, slots=True)
class Delay:
    """A service time in milliseconds: always `p50_ms`, or log-normal through `p50_ms` and `p99_ms`."""

    p50_ms: float
    p99_ms: float | None = None

    @classmethod
    def fixed(cls, ms: float) -> Delay:
        return cls(ms)

    @classmethod
    def lognormal(cls, p50_ms: float, p99_ms: float) -> Delay:
        """Raises ValueError unless 0 < p50_ms < p99_ms."""
        if not 0 < p50_ms < p99_ms:
            raise ValueError(f"lognormal needs 0 < p50 < p99, not p50={p50_ms} p99={p99_ms}")
        return cls(p50_ms, p99_ms)

    @classmethod
    def parse(cls, text: str) -> Delay:
        """Reads `50`, `fixed:50` or `lognormal:80,300`; ValueError with one line otherwise."""
        kind, _, rest = text.rpartition(":")
        try:
            numbers = [float(part) for part in rest.split(",")]
        except ValueError:
            numbers = []
        if kind in ("", "fixed") and len(numbers) == 1 and numbers[0] >= 0:
            return cls.fixed(numbers[0])
        if kind == "lognormal" and len(numbers) == 2:
            return cls.lognormal(numbers[0], numbers[1])
        raise ValueError(f"delay {text!r}: accepted are MS, fixed:MS and lognormal:P50,P99 (milliseconds)")

    def draw_s(self, rng: random.Random) -> float:
        """One service time, in seconds."""
        if self.p99_ms is None:
            return self.p50_ms / 1000
        sigma = math.log(self.p99_ms / self.p50_ms) / _Z99
        return self.p50_ms * math.exp(sigma * rng.gauss(0.0, 1.0)) / 1000

    def __str__(self) -> str:
        if self.p99_ms is None:
            return f"{self.p50_ms:g}"
        return f"lognormal:{self.p50_ms:g},{self.p99_ms:g}"
