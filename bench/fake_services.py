"""Intent, RAG and LLM as the orchestrator sees them over HTTP."""

from __future__ import annotations

import msgspec

from bench.fake_config import FakeConfig, Script
from bench.fake_http import LAST_CHUNK, Exchange, FakeService, Request, chunk, response, stream_head

_ENDLESS_PIECES = 2_000_000
_encode = msgspec.json.encode


class Intent(FakeService):
    """`POST /api/v1/classify`."""

    name = "intent"
    _whole: bytes = b""

    def answer(self, exchange: Exchange, request: Request, script: Script | None) -> None:
        if request.path != "/api/v1/classify":
            not_found(exchange)
            return
        if script is not None and script.oversize_bytes:
            answer = {**self.config.intent_answer, "reasoning": "x" * script.oversize_bytes}
            whole = response(200, _encode(answer))
        else:
            whole = self._whole = self._whole or response(200, _encode(self.config.intent_answer))
        exchange.send_pieces(self.draw_s(self.config.intent, script), (whole,), 0.0)


class Rag(FakeService):
    """`/api/v1/query`, `/api/v1/stream_query` and `/api/v1/query/incremental`."""

    name = "rag"
    _whole: bytes = b""

    def answer(self, exchange: Exchange, request: Request, script: Script | None) -> None:
        config = self.config
        if request.path == "/api/v1/query":
            if script is not None and script.oversize_bytes:
                answer = {**config.rag_answer, "answer": "x" * script.oversize_bytes}
                whole = response(200, _encode(answer))
            else:
                whole = self._whole = self._whole or response(200, _encode(config.rag_answer))
            exchange.send_pieces(self.draw_s(config.rag, script), (whole,), 0.0)
        elif request.path == "/api/v1/stream_query":
            self._stream(exchange, script)
        elif request.path == "/api/v1/query/incremental":
            if _says_final(request.body):
                self._stream(exchange, script)
            else:
                early = _encode({"status": "retrieving", "docs_retrieved": 3})
                exchange.send_pieces(self.draw_s(config.rag_early, script), (response(200, early),), 0.0)
        else:
            not_found(exchange)

    def _stream(self, exchange: Exchange, script: Script | None) -> None:
        config = self.config
        if config.rag_first is not None or (script is not None and script.delay_ms is not None):
            after = self.draw_s(config.rag_first or config.rag, script)
        else:
            after = config.rag.draw_s(self.rng) + config.llm_first.draw_s(self.rng)
        texts = config.tokens
        lines = [chunk(_line(text, i == len(texts) - 1)) for i, text in enumerate(texts)]
        if script is not None and script.oversize_bytes:
            lines = [chunk(_line("x" * script.oversize_bytes, True))]
        if script is not None and script.endless:
            lines = [chunk(_line(" more", False))] * _ENDLESS_PIECES
        lines[0] = stream_head(b"application/x-ndjson") + lines[0]
        lines[-1] += LAST_CHUNK
        exchange.send_pieces(after, lines, config.llm_gap_ms / 1000)


class Llm(FakeService):
    """`POST /v1/chat/completions`: OpenAI server-sent events, or one JSON body where `stream` is not true."""

    name = "llm"
    _pieces: list[bytes] | None = None

    def answer(self, exchange: Exchange, request: Request, script: Script | None) -> None:
        config = self.config
        if request.path != "/v1/chat/completions":
            if request.path == "/v1/models":
                models = _encode({"object": "list", "data": [{"id": "fake", "object": "model"}]})
                exchange.send_pieces(0.0, (response(200, models),), 0.0)
            else:
                not_found(exchange)
            return
        after = self.draw_s(config.llm_first, script)
        gap = config.llm_gap_ms / 1000
        if b'"stream":true' not in request.body and b'"stream": true' not in request.body:
            whole = response(200, _encode(_completion(config)))
            exchange.send_pieces(after + gap * len(config.tokens), (whole,), 0.0)
            return
        if self._pieces is None:
            self._pieces = sse_pieces(config.tokens)
        pieces = self._pieces
        if script is not None and script.oversize_bytes:
            pieces = sse_pieces(["x" * script.oversize_bytes])
        elif script is not None and script.endless:
            token = chunk(_event({"content": " more"}, None))
            pieces = [stream_head(b"text/event-stream") + token, *[token] * _ENDLESS_PIECES]
        exchange.send_pieces(after, pieces, gap)


def sse_pieces(tokens: list[str]) -> list[bytes]:
    """A piece to write per token; the first brings head and role, the last finish reason and `[DONE]`."""
    pieces = [chunk(_event({"content": token}, None)) for token in tokens]
    role = chunk(_event({"role": "assistant", "content": ""}, None))
    pieces[0] = stream_head(b"text/event-stream") + role + pieces[0]
    pieces[-1] += chunk(_event({}, "stop")) + chunk(b"data: [DONE]\n\n") + LAST_CHUNK
    return pieces


def _event(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    event = {
        "id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 1_700_000_000,
        "model": "fake", "choices": [choice],
    }  # fmt: skip
    return b"data: " + _encode(event) + b"\n\n"


def _completion(config: FakeConfig) -> dict[str, object]:
    message = {"role": "assistant", "content": "".join(config.tokens)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {
        "id": "chatcmpl-0", "object": "chat.completion", "created": 1_700_000_000,
        "model": "fake", "choices": [choice],
    }  # fmt: skip


def _line(text: str, is_final: bool) -> bytes:
    return _encode({"text": text, "is_final": is_final}) + b"\n"


def _says_final(body: bytes) -> bool:
    try:
        decoded = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return False
    return isinstance(decoded, dict) and decoded.get("is_final") is True


def not_found(exchange: Exchange) -> None:
    exchange.send_pieces(0.0, (response(404, b'{"error":"not found"}'),), 0.0)
