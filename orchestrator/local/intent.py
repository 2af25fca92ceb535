"""Intent by nearest example: the utterance is closest, as an embedding, to one of a file of examples."""

from __future__ import annotations

import sys
import time
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from aiohttp import web

from orchestrator.local.embeddings import Embedder
from orchestrator.local.entities import entities
from orchestrator.local.service import command_line, json_response, new_app, read_json, run
from orchestrator.local.worker import InferenceWorker

DEFAULT_PORT: Final = 8002
UNKNOWN: Final = "unknown"
THRESHOLD: Final = 0.45
"""Cosine below which the nearest example says nothing. Of 32 newly phrased utterances on the subject the lowest
had 0.452, of 15 on other subjects the highest 0.43."""


class ClassifyRequest(msgspec.Struct):
    """`context` is accepted and not used: an example is near or it is not."""

    text: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    context: Any = None


@dataclass(frozen=True, slots=True)
class Match:
    """The nearest example, and how near the best example of any other intent comes."""

    intent: str
    similarity: float
    example: str
    goal: str
    meaning: str
    runner_up: str
    runner_up_similarity: float


class IntentIndex:
    """The examples of `intents.toml`, embedded."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._intents: dict[str, dict[str, Any]] = tomllib.loads(
            files("orchestrator.local").joinpath("intents.toml").read_text("utf-8")
        )
        self._names = [name for name, entry in self._intents.items() for _ in entry["examples"]]
        self._examples: list[str] = [text for entry in self._intents.values() for text in entry["examples"]]
        self._vectors = embedder.embed_all(self._examples)

    def nearest(self, text: str) -> Match:
        """The match, however far."""
        similarities = self._vectors @ self._embedder.embed(text)
        best = int(np.argmax(similarities))
        name = self._names[best]
        others = [
            (float(value), other) for value, other in zip(similarities, self._names, strict=True) if other != name
        ]
        runner_up_similarity, runner_up = max(others)
        entry = self._intents[name]
        return Match(
            name,
            float(similarities[best]),
            self._examples[best],
            entry["goal"],
            entry["meaning"],
            runner_up,
            runner_up_similarity,
        )


class IntentService:
    def __init__(self) -> None:
        self._index = IntentIndex(Embedder())
        self._worker = InferenceWorker("intent")

    def app(self) -> web.Application:
        app = new_app("intent-service")
        app.router.add_post("/api/v1/classify", self.classify)
        app.on_cleanup.append(self._close)
        return app

    async def classify(self, request: web.Request) -> web.Response:
        began = time.perf_counter()
        asked = await read_json(request, ClassifyRequest)
        match = await self._worker.run(lambda: self._index.nearest(asked.text))
        answer = describe(asked.text, match)
        answer["response_time_ms"] = round((time.perf_counter() - began) * 1000, 2)
        return json_response(answer)

    async def _close(self, _app: web.Application) -> None:
        self._worker.close()


def describe(text: str, match: Match) -> dict[str, Any]:
    """The service's answer. Confidence is the cosine of the nearest example; for `unknown`, what it lacks to 1."""
    named = entities(text)
    mentioned = ", ".join(f"{kind}: {value}" for kind, value in named.items())
    nearest = f"nearest example {match.example!r} ({match.intent}, {match.similarity:.2f})"
    rival = f"next {match.runner_up} ({match.runner_up_similarity:.2f})"
    known = match.similarity >= THRESHOLD
    confidence = match.similarity if known else 1.0 - match.similarity
    meaning = match.meaning if known else "says something this service has no examples for"
    return {
        "intent": match.intent if known else UNKNOWN,
        "confidence": round(min(max(confidence, 0.0), 1.0), 3),
        "context": {
            "user_goal": match.goal if known else "not clear",
            "key_entities": mentioned,
            "extracted_meaning": f"{meaning} ({mentioned})" if mentioned else meaning,
        },
        "reasoning": f"{nearest}; {rival}" if known else f"{nearest} is below {THRESHOLD}",
        "layer_type": "embedding",
        "entities": named,
    }


def main() -> int:
    args = command_line("intent", DEFAULT_PORT, "Intent of an utterance by nearest example.").parse_args()
    return run("intent", args, lambda: IntentService().app())


if __name__ == "__main__":
    sys.exit(main())
