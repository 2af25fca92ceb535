"""The harness's own floor: the same turn without any server, played by the client straight against the fakes.

The client asks Intent and RAG in parallel, then the LLM, and at the token that ends the first clause asks TTS,
over warm connections and with the same timers, arrivals and amount of data as under load. What the total is over
the ideal is what client and fakes themselves add, on the core that they share.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from time import monotonic
from typing import cast
from urllib.parse import urlsplit

import msgspec

from bench.fake_config import FakeConfig
from bench.ideal import first_clause_tokens, spoken_clauses
from bench.timers import Handle, Timers

_TOKEN = b'"content":" '


class _Line(asyncio.Protocol):
    """One keep-alive connection; `on_data` gets what arrives for the request that is out."""

    def __init__(self) -> None:
        self.on_data: Callable[[bytes], None] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.on_data is not None:
            self.on_data(data)


class FloorLoad:
    """Plays turns against the fakes at a given rate; `totals_ms` are intended start to first audio byte."""

    def __init__(self, urls: dict[str, str], config: FakeConfig, timers: Timers, seed: int = 2) -> None:
        self._urls = urls
        self._timers = timers
        self._rng = random.Random(seed)
        self._free: dict[str, list[_Line]] = {name: [] for name in ("intent", "rag", "llm", "tts")}
        clauses = spoken_clauses(config)
        self.cut = first_clause_tokens(config, clauses[0])
        self.requests = {
            "intent": _post("/api/v1/classify", {"text": "what are the admission requirements"}),
            "rag": _post("/api/v1/query", {"query": "what are the admission requirements"}),
            "llm": _post("/v1/chat/completions", {"model": "fake", "messages": _PROMPT, "stream": True}),
        }
        self.speeches = [
            _post("/v1/audio/speech", {"model": "tts-1", "voice": "alloy", "input": clause}) for clause in clauses
        ]
        self.totals_ms: list[tuple[float, float]] = []
        self.running = 0

    async def warm(self, per_service: int) -> None:
        """Opens the connections beforehand, so that no turn waits for one."""
        loop = asyncio.get_running_loop()
        for name, free in self._free.items():
            parts = urlsplit(self._urls[name])
            for _ in range(per_service):
                _, line = await loop.create_connection(_Line, parts.hostname or "", parts.port or 80)
                free.append(line)

    def poisson(self, start: float, seconds: float, rate: float) -> list[Handle]:
        """Schedules arrivals at `rate` turns/s from `start` (monotonic s) for `seconds`."""
        handles: list[Handle] = []
        when = start + self._rng.expovariate(rate)
        while when < start + seconds:
            handles.append(self._timers.at(when, _FloorTurn(self, when).begin))
            when += self._rng.expovariate(rate)
        return handles

    def borrow(self, name: str, on_data: Callable[[bytes], None]) -> _Line:
        """A free warm connection. Raises RuntimeError when all are in use: `warm` was told too few."""
        free = self._free[name]
        if not free:
            raise RuntimeError(f"floor: all connections to {name} are in use")
        line = free.pop()
        line.on_data = on_data
        return line

    def give_back(self, name: str, line: _Line) -> None:
        line.on_data = None
        self._free[name].append(line)

    async def settle(self, timeout_s: float = 10.0) -> None:
        """Waits until every turn begun is over, at most so long."""
        for _ in range(round(timeout_s * 20)):
            if not self.running:
                return
            await asyncio.sleep(0.05)

    def close(self) -> None:
        for lines in self._free.values():
            for line in lines:
                if line.transport is not None:
                    line.transport.abort()


_PROMPT = [
    {"role": "system", "content": "Answer from these passages. " + "passage " * 60},
    {"role": "user", "content": "what are the admission requirements"},
]


def _post(path: str, body: object) -> bytes:
    data = msgspec.json.encode(body)
    return (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode() + data


class _FloorTurn:
    __slots__ = ("_answers", "_intended", "_lines", "_load", "_speech", "_tokens")

    def __init__(self, load: FloorLoad, intended: float) -> None:
        self._load = load
        self._intended = intended
        self._answers = 0
        self._tokens = 0
        self._speech = 0
        self._lines: dict[str, _Line] = {}

    def begin(self) -> None:
        self._load.running += 1
        self._ask("intent", self._load.requests["intent"], self._intent)
        self._ask("rag", self._load.requests["rag"], self._rag)

    def _ask(self, name: str, request: bytes, on_data: Callable[[bytes], None]) -> None:
        line = self._load.borrow(name, on_data)
        self._lines[name] = line
        assert line.transport is not None
        line.transport.write(request)

    def _return(self, name: str) -> None:
        self._load.give_back(name, self._lines.pop(name))

    def _intent(self, data: bytes) -> None:
        self._return("intent")
        self._answered()

    def _rag(self, data: bytes) -> None:
        # The answers fit into one segment, so the first data are the whole of them.
        self._return("rag")
        self._answered()

    def _answered(self) -> None:
        self._answers += 1
        if self._answers == 2:
            self._ask("llm", self._load.requests["llm"], self._llm)

    def _llm(self, data: bytes) -> None:
        before = self._tokens
        self._tokens += data.count(b"data: ") - data.count(b'"role"') - data.count(b"[DONE]")
        if before < self._load.cut <= self._tokens:
            self._ask("tts", self._load.speeches[0], self._first_audio)
        if data.endswith(b"0\r\n\r\n"):
            self._return("llm")

    def _first_audio(self, data: bytes) -> None:
        self._load.totals_ms.append((self._intended, (monotonic() - self._intended) * 1000))
        line = self._lines["tts"]
        line.on_data = self._more_audio
        self._more_audio(data)

    def _more_audio(self, data: bytes) -> None:
        if not data.endswith(b"\r\n0\r\n\r\n"):
            return
        self._return("tts")
        self._speech += 1
        if self._speech < len(self._load.speeches):
            self._ask("tts", self._load.speeches[self._speech], self._more_audio)
        else:
            self._load.running -= 1
