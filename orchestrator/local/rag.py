"""Answers from a folder of Markdown files, as a service; they are the files' own sentences."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import orjson
from aiohttp import web

from orchestrator.local.embeddings import Embedder
from orchestrator.local.retrieval import KNOWLEDGE, Found, KnowledgeBase
from orchestrator.local.service import command_line, json_response, new_app, read_json, run
from orchestrator.local.worker import InferenceWorker

DEFAULT_PORT: Final = 8003
NOTHING_FOUND: Final = "I could not find anything about that in the admissions information."

_CACHE_SIZE: Final = 512
_SESSIONS: Final = 2_000
_WORDS_A_PIECE: Final = 6

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
_SessionId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class Query(msgspec.Struct):
    """`context` (what intent found out) is accepted and not used."""

    query: _Text
    context: Any = None


class IncrementalQuery(msgspec.Struct):
    """A transcript that is still growing, or (`is_final`) done."""

    session_id: _SessionId
    text: _Text
    is_final: bool = False
    context: Any = None


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a query found, whether it was remembered, and what it took in ms."""

    found: Found
    cached: bool
    ms: float


class _Newest(OrderedDict[str, Any]):
    """Keeps the newest `size` entries."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def remember(self, key: str, value: Any) -> None:
        self[key] = value
        self.move_to_end(key)
        if len(self) > self._size:
            self.popitem(last=False)


class RagService:
    def __init__(self, folder: Path) -> None:
        self._knowledge = KnowledgeBase(folder, Embedder())
        self._knowledge.find("a first query prepares the index")
        self._worker = InferenceWorker("rag")
        self._cache = _Newest(_CACHE_SIZE)
        self._sessions = _Newest(_SESSIONS)

    def app(self) -> web.Application:
        app = new_app("rag-service")
        app.router.add_post("/api/v1/query", self.query)
        app.router.add_post("/api/v1/stream_query", self.stream_query)
        app.router.add_post("/api/v1/query/incremental", self.incremental)
        app.on_cleanup.append(self._close)
        return app

    async def query(self, request: web.Request) -> web.Response:
        asked = await read_json(request, Query)
        return json_response(answer_body(await self.look_up(asked.query)))

    async def stream_query(self, request: web.Request) -> web.StreamResponse:
        asked = await read_json(request, Query)
        return await _stream(request, await self.look_up(asked.query))

    async def incremental(self, request: web.Request) -> web.StreamResponse:
        """Retrieve while the user still speaks; the final text finds the work done if its words are the same."""
        asked = await read_json(request, IncrementalQuery)
        if asked.is_final:
            early = self._sessions.pop(asked.session_id, None)
            looked_up = await self.look_up(asked.text)
            return await _stream(request, looked_up, early_match=early == _normalised(asked.text))
        looked_up = await self.look_up(asked.text)
        self._sessions.remember(asked.session_id, _normalised(asked.text))
        return json_response(
            {
                "status": "retrieved",
                "session_id": asked.session_id,
                "docs_retrieved": len(looked_up.found.hits),
                "confidence": round(looked_up.found.confidence, 3),
                "cached": looked_up.cached,
                "retrieval_ms": looked_up.ms,
            }
        )

    async def look_up(self, query: str) -> Lookup:
        """What the knowledge base has on the query; remembered by its words."""
        began = time.perf_counter()
        key = _normalised(query)
        found: Found | None = self._cache.get(key)
        cached = found is not None
        if found is None:
            found = await self._worker.run(lambda: self._knowledge.find(query))
            self._cache.remember(key, found)
        return Lookup(found, cached, round((time.perf_counter() - began) * 1000, 2))

    async def _close(self, _app: web.Application) -> None:
        self._worker.close()


def answer_body(looked_up: Lookup) -> dict[str, Any]:
    """The answer to `/api/v1/query`."""
    found = looked_up.found
    return {
        "answer": found.text or NOTHING_FOUND,
        "sources": [
            {
                "title": hit.passage.title,
                "heading": hit.passage.heading,
                "text": hit.passage.text,
                "score": round(hit.score, 3),
            }
            for hit in found.hits
        ],
        "confidence": round(found.confidence, 3),
        "timing_breakdown": {"retrieval_ms": looked_up.ms, "total_ms": looked_up.ms},
        "cached": looked_up.cached,
        "metadata": {"method": "hybrid", "docs_retrieved": len(found.hits)},
    }


async def _stream(request: web.Request, looked_up: Lookup, early_match: bool = False) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    for piece in _pieces(looked_up.found.text or NOTHING_FOUND):
        await response.write(orjson.dumps({"text": piece, "is_final": False}) + b"\n")
    last = {
        "text": "",
        "is_final": True,
        "confidence": round(looked_up.found.confidence, 3),
        "docs_retrieved": len(looked_up.found.hits),
        "retrieved_early": early_match,
    }
    await response.write(orjson.dumps(last) + b"\n")
    await response.write_eof()
    return response


def _pieces(text: str) -> Iterator[str]:
    """A few words at a time, with their spaces: joined they are the text."""
    words = text.split(" ")
    for start in range(0, len(words), _WORDS_A_PIECE):
        piece = " ".join(words[start : start + _WORDS_A_PIECE])
        yield piece if start == 0 else " " + piece


def _normalised(text: str) -> str:
    return " ".join(text.lower().strip(" .?!").split())


def main() -> int:
    parser = command_line("rag", DEFAULT_PORT, "Answers from a folder of Markdown files.")
    parser.add_argument("--knowledge", type=Path, default=KNOWLEDGE, help="folder of .md files")
    args = parser.parse_args()
    return run("rag", args, lambda: RagService(args.knowledge).app())


if __name__ == "__main__":
    sys.exit(main())
