"""The intent service: `POST /api/v1/classify`."""

from __future__ import annotations

import msgspec
import orjson

from orchestrator.downstream.http_pool import HttpPool
from orchestrator.downstream.types import Call, Intent


class _Context(msgspec.Struct):
    user_goal: str | None = None
    key_entities: str | dict[str, object] | list[object] | None = None
    extracted_meaning: str | None = None


class _Answer(msgspec.Struct):
    intent: str
    confidence: float = 0.0
    context: _Context | None = None


_decoder = msgspec.json.Decoder(_Answer)


class IntentClient:
    """Classifies what the user said."""

    def __init__(self, pool: HttpPool) -> None:
        self._pool = pool
        self._url = pool.target("/api/v1/classify")

    async def classify(self, text: str, call: Call) -> Intent:
        """The intent of `text`. Raises DownstreamError."""
        body = orjson.dumps({"text": text})
        answer = self._pool.decode(_decoder, await self._pool.post(self._url, body, call))
        context = answer.context
        confidence = min(1.0, max(0.0, answer.confidence))
        if context is None:
            return Intent(answer.intent, confidence)
        entities = context.key_entities
        if not isinstance(entities, str):
            entities = msgspec.json.encode(entities).decode() if entities else ""
        return Intent(answer.intent, confidence, context.user_goal or "", entities, context.extracted_meaning or "")
