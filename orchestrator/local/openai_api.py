"""The wire format of OpenAI's chat completions, as far as a stand-in needs it."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
import orjson
from aiohttp import web

_PASSAGE: Final = re.compile(r"\[\d+\]\s*(.*)$")


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """The text of the message, its text parts joined."""
        if isinstance(self.content, list):
            return " ".join(str(part.get("text", "")) for part in self.content if part.get("type") == "text")
        return self.content or ""


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class ChatRequest(msgspec.Struct):
    """What is understood of the request; every other field is accepted and not used."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=1000)]
    model: str = ""
    stream: bool = False
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    stream_options: StreamOptions | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked: the last user message, the user's one before it, and the passages to answer from."""

    question: str
    previous_question: str
    passages: tuple[str, ...]


def prompt_of(messages: list[ChatMessage]) -> Prompt:
    """Read question and passages out of the messages.

    Passages are the lines `[1] …`, `[2] …` after a line `Passages:` in a system message; a line without a
    number continues the one before.
    """
    asked = [message.text.strip() for message in messages if message.role == "user"]
    passages: list[str] = []
    for message in messages:
        if message.role in ("system", "developer"):
            passages += _passages(message.text)
    return Prompt(asked[-1] if asked else "", asked[-2] if len(asked) > 1 else "", tuple(filter(None, passages)))


def _passages(text: str) -> list[str]:
    lines = iter(text.splitlines())
    for line in lines:
        if line.strip() == "Passages:":
            break
    passages: list[str] = []
    for line in lines:
        match = _PASSAGE.match(line.strip())
        if match:
            passages.append(match[1])
        elif passages:
            passages[-1] = f"{passages[-1]} {line.strip()}".strip()
    return passages


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply as it is streamed: one delta a word, with the space before it; joined they are the text."""

    model: str
    deltas: tuple[str, ...]
    finish_reason: str
    prompt_words: int

    @property
    def usage(self) -> dict[str, int]:
        """Counted in words, which is what this model's tokens are."""
        return {
            "prompt_tokens": self.prompt_words,
            "completion_tokens": len(self.deltas),
            "total_tokens": self.prompt_words + len(self.deltas),
        }

    def completion(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(self.deltas)}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage}

    async def stream(self, response: web.StreamResponse, with_usage: bool) -> None:
        """Write the reply as server-sent events, `[DONE]` last."""
        head = self._head("chat.completion.chunk")
        first: dict[str, Any] = {"role": "assistant", "content": ""}
        for delta in (first, *({"content": word} for word in self.deltas)):
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            await response.write(_event({**head, "choices": [choice]}))
        end = {"index": 0, "delta": {}, "finish_reason": self.finish_reason}
        await response.write(_event({**head, "choices": [end]}))
        if with_usage:
            await response.write(_event({**head, "choices": [], "usage": self.usage}))
        await response.write(b"data: [DONE]\n\n")

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }


def reply_of(text: str, request: ChatRequest, model: str) -> Reply:
    """The reply in words, cut where the request limits it."""
    words = text.split()
    limit = request.max_completion_tokens or request.max_tokens or len(words)
    deltas = tuple(word if place == 0 else " " + word for place, word in enumerate(words[:limit]))
    prompt_words = sum(len(message.text.split()) for message in request.messages)
    return Reply(model, deltas, "length" if limit < len(words) else "stop", prompt_words)


def error_body(message: str) -> dict[str, Any]:
    """A refusal in OpenAI's form."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
