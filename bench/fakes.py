"""Scripted fake services: Intent, RAG, LLM, TTS (both protocols) and STT, each on a port of its own.

In a test, on the test's own loop (also one with virtual time):

    async with FakeServices(FakeConfig()) as fakes:
        server = start_server(env=fakes.env)          # INTENT_SERVICE_URL, RAG_SERVICE_URL, LLM_BASE_URL, …
        fakes.script("llm", status=503, times=1)      # the next LLM request fails; fields: fake_config.Script
        ...
        assert fakes.counters["tts"].aborted == 1     # requests, completed, aborted, cancels, connections, …
        prompt = fakes.requests("llm")[0].json()      # what was asked, with headers and times
        fakes.stt_say(session_id, {"type": "user_speaking", "confidence": 1.0})
        fakes.reset()                                 # counters, scripts and remembered requests

In a process of its own (a synchronous context manager with the same `env`, `urls`, `script`, `reset`, and
with `stats()` for the counters); or from a shell as `python -m bench fakes`, which prints the URLs as JSON:

    with FakeProcess(FakeConfig(), cpu=1) as fakes: ...

Over HTTP, on any of the ports: `GET /__stats`, `POST /__reset`, `POST /__script` (a `Script`),
`GET /__requests`, `GET /__timings`, `POST /__stt_say` (`{"session_id", "message"}`), `GET /health`.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import subprocess
import sys
from functools import partial
from types import TracebackType
from typing import Any, Self

import msgspec

from bench.delays import Delay
from bench.fake_config import SERVICES, Counters, FakeConfig, Script, Seen
from bench.fake_http import FakeService, HttpConnection, Request, response
from bench.fake_services import Intent, Llm, Rag
from bench.fake_speech import Stt, Tts
from bench.timers import Timers, clock_for, timers_for

__all__ = ["Counters", "Delay", "FakeConfig", "FakeProcess", "FakeServices", "Script", "Seen"]

_HOST = "127.0.0.1"
_START_S = 20.0


class FakeServices:
    """All five services on the running loop, listening on loopback from `__aenter__` to `__aexit__`."""

    def __init__(self, config: FakeConfig | None = None) -> None:
        self.config = config or FakeConfig()
        self.urls: dict[str, str] = {}
        self._services: dict[str, FakeService] = {}
        self._servers: list[asyncio.Server] = []
        self._timers: Timers | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._timers = timers_for(loop)
        clock = clock_for(loop)
        for kind in (Intent, Rag, Llm, Tts, Stt):
            service: FakeService = kind(self.config, self._timers, clock, self._control)
            self._services[service.name] = service
            port = self.config.ports.get(service.name, 0)
            factory = partial(HttpConnection, service)
            server = await loop.create_server(factory, _HOST, port, backlog=4096)
            self._servers.append(server)
            self.urls[service.name] = f"http://{_HOST}:{server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.close()
        for service in self._services.values():
            for conn in list(service.connections):
                if conn.transport is not None:
                    conn.transport.abort()
        for server in self._servers:
            await server.wait_closed()
        # One pass of the loop, so that every connection_lost has run before the timers go.
        await asyncio.sleep(0)
        if self._timers is not None:
            self._timers.close()

    @property
    def env(self) -> dict[str, str]:
        """The orchestrator's environment for these services; LLM_BASE_URL="" would mean streaming RAG."""
        return environment(self.urls)

    @property
    def counters(self) -> dict[str, Counters]:
        return {name: service.counters for name, service in self._services.items()}

    def script(self, service: str, **fields: Any) -> None:
        """Adds a `Script`; the oldest one that fits a request is the one that counts.

        Raises msgspec.ValidationError for a wrong field, ValueError for an unknown service.
        """
        self._add_script(msgspec.convert({"service": service, **fields}, Script))

    def _add_script(self, script: Script) -> None:
        if script.service not in self._services:
            raise ValueError(f"service {script.service!r}: accepted are {', '.join(SERVICES)}")
        self._services[script.service].scripts.append((script, [script.times]))

    def reset(self) -> None:
        for service in self._services.values():
            service.reset()

    def requests(self, service: str) -> list[Seen]:
        """The requests seen since the last reset, oldest first (at most `keep_requests` of them)."""
        return list(self._services[service].seen)

    def stt_say(self, session_id: str, message: dict[str, Any]) -> bool:
        """Sends a message on that session's STT stream; False where it has none."""
        stt = self._services["stt"]
        assert isinstance(stt, Stt)
        return stt.say(session_id, message)

    def _control(self, request: Request) -> bytes | None:
        path = request.path
        if path == "/health":
            return response(200, b'{"status":"healthy"}')
        if not path.startswith("/__"):
            return None
        try:
            return response(200, msgspec.json.encode(self._do(path[3:], request)))
        except (ValueError, KeyError) as error:  # msgspec's errors are ValueErrors
            return response(400, msgspec.json.encode({"error": str(error)}))

    def _do(self, action: str, request: Request) -> Any:
        if action == "stats":
            return self.counters
        if action == "timings":
            return [row for service in self._services.values() for row in service.timings]
        if action == "requests":
            return {name: self.requests(name) for name in self._services}
        if action == "reset":
            self.reset()
            return {"ok": True}
        if action == "script":
            self._add_script(msgspec.json.decode(request.body, type=Script))
            return {"ok": True}
        if action == "stt_say":
            asked = msgspec.json.decode(request.body)
            return {"ok": self.stt_say(asked["session_id"], asked["message"])}
        raise ValueError(f"no such control path: /__{action}")


def environment(urls: dict[str, str]) -> dict[str, str]:
    return {
        "INTENT_SERVICE_URL": urls["intent"],
        "RAG_SERVICE_URL": urls["rag"],
        "STT_SERVICE_URL": urls["stt"],
        "TTS_SERVICE_URL": urls["tts"],
        "LLM_BASE_URL": urls["llm"] + "/v1",
        "LLM_API_KEY": "fake",
        "LLM_MODEL": "fake",
    }


class FakeProcess:
    """The services in a process of their own, optionally on one CPU; RuntimeError if they do not start."""

    def __init__(self, config: FakeConfig | None = None, cpu: int | None = None) -> None:
        self.config = config or FakeConfig()
        self._cpu = cpu
        self.urls: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "bench.fakes"]
        if self._cpu is not None:
            command.append(str(self._cpu))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(self.config) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self.__exit__(None, None, None)
            raise RuntimeError("the fake services did not start; their error stands above")
        self.urls = msgspec.json.decode(line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        # The end of its standard input tells it to go; a signal on top could hit it on its way out.
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def env(self) -> dict[str, str]:
        return environment(self.urls)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        conn = http.client.HTTPConnection(self.urls["intent"].removeprefix("http://"), timeout=30)
        try:
            conn.request(method, path, None if body is None else msgspec.json.encode(body))
            answer = conn.getresponse()
            data = answer.read()
        finally:
            conn.close()
        if answer.status != 200:
            raise ValueError(msgspec.json.decode(data)["error"])
        return msgspec.json.decode(data)

    def stats(self) -> dict[str, Counters]:
        return msgspec.convert(self._call("GET", "/__stats"), dict[str, Counters])

    def timings(self) -> list[tuple[str, str, float, float, float]]:
        """With `log_timings`, per request: service, "session/turn", received, first sent, finished (s)."""
        return [tuple(row) for row in self._call("GET", "/__timings")]

    def requests(self, service: str) -> list[Seen]:
        seen = self._call("GET", "/__requests")[service]
        return msgspec.convert(seen, list[Seen], str_keys=True)

    def script(self, service: str, **fields: Any) -> None:
        self._call("POST", "/__script", {"service": service, **fields})

    def reset(self) -> None:
        self._call("POST", "/__reset")

    def stt_say(self, session_id: str, message: dict[str, Any]) -> bool:
        said = self._call("POST", "/__stt_say", {"session_id": session_id, "message": message})
        return bool(said["ok"])


async def serve(config: FakeConfig, watch_stdin: bool = False) -> None:
    """Serves until SIGTERM or SIGINT, having printed one JSON line of URLs to standard output.

    With `watch_stdin` also until the other end of standard input is gone, so that it outlives no parent.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if watch_stdin:
        loop.add_reader(sys.stdin.fileno(), stop.set)
    async with FakeServices(config) as fakes:
        sys.stdout.write(msgspec.json.encode(fakes.urls).decode() + "\n")
        sys.stdout.flush()
        await stop.wait()


def main() -> None:
    """Entry of the process: the configuration is one JSON line on standard input, the CPU an argument."""
    import gc

    import uvloop

    if len(sys.argv) > 1:
        os.sched_setaffinity(0, {int(sys.argv[1])})
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=FakeConfig)
    # Exchanges are freed by reference counting; a collection would only add pauses to what others measure.
    gc.freeze()
    gc.disable()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(config, watch_stdin=True))


if __name__ == "__main__":
    main()
