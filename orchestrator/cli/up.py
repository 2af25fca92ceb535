"""`orchestrator up`: everything on one machine, from the store to a spoken sample conversation, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import aiohttp
import click

from orchestrator.cli.caller import CallError
from orchestrator.cli.talk import hold_conversation
from orchestrator.errors import OrchestratorError
from orchestrator.local.stack import LocalStack, log_tail
from orchestrator.settings import Settings, load_settings
from orchestrator.store.embedded import EmbeddedValkey

POOL_READY_SECONDS = 30.0
POOL_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.05


class UpError(OrchestratorError):
    """A part did not start or ended; nothing is left running."""


class Pool:
    """The worker pool as a child process, as `orchestrator serve` runs it."""

    def __init__(self, run_dir: Path) -> None:
        self._log = run_dir / "pool.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, environ: Mapping[str, str], settings: Settings) -> None:
        """Start it and wait until it is ready. Raises UpError."""
        with self._log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "orchestrator.cli.main", "serve", "--parent", str(os.getpid()),
                env=dict(environ), stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                # Ctrl-C reaches the whole foreground group: this command alone decides what it means.
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + POOL_READY_SECONDS
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1.0)) as client:
            while time.monotonic() < deadline:
                if self._process.returncode is not None:
                    last = (log_tail(self._log).splitlines() or ["nothing in its log"])[-1]
                    raise UpError(f"the worker pool ended while it started: {last} (log: {self._log})")
                try:
                    async with client.get(f"http://127.0.0.1:{settings.port}/readyz") as answer:
                        if answer.status == 200:
                            return
                except (aiohttp.ClientError, TimeoutError):
                    pass
                await asyncio.sleep(_POLL_SECONDS)
        raise UpError(f"the worker pool was not ready after {POOL_READY_SECONDS:g} s (log: {self._log})")

    async def wait_for_exit(self) -> str:
        """Waits until the pool ends by itself; how it ended."""
        assert self._process is not None
        code = await self._process.wait()
        last = (log_tail(self._log).splitlines() or ["nothing in its log"])[-1]
        return f"the worker pool ended (exit code {code}): {last}"

    async def stop(self) -> None:
        """SIGTERM, which drains, and SIGKILL if that takes too long. May be called again."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(POOL_STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def run_everything(run_dir: Path, sample: bool, exit_after_sample: bool) -> int:
    """Start all parts, play the sample, stay until SIGINT, SIGTERM or a part's end; the exit code."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    work = asyncio.create_task(_run(run_dir, sample, exit_after_sample))
    stop = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            click.echo("\nstopping …")
            work.cancel()
        stop.cancel()
        await asyncio.wait({work, stop})
        return 0 if work.cancelled() else work.result()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _run(run_dir: Path, sample: bool, exit_after_sample: bool) -> int:
    run_dir = run_dir.resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = load_settings(os.environ)
    stack, store, pool = LocalStack(run_dir / "logs"), EmbeddedValkey(run_dir / "store"), Pool(run_dir)
    began = time.monotonic()
    click.echo("starting the local stack: store, speech and language stand-ins, worker pool")
    try:
        environ = dict(os.environ)
        if "REDIS_URL" not in environ:
            store.start()
            environ["REDIS_URL"] = store.url
            click.echo(f"  store ready on {store.url} ({time.monotonic() - began:.1f} s)")
        await stack.start(lambda line: click.echo(f"  {line}"))
        environ = {**_local_defaults(), **stack.urls, **environ}
        await pool.start(environ, settings)
        click.echo(f"  worker pool ready, {settings.web_concurrency} workers ({time.monotonic() - began:.1f} s)")
        url = f"ws://localhost:{settings.port}"
        answered = await _play_sample(url, run_dir) if sample else True
        if exit_after_sample:
            return 0 if answered else 1
        _say_where(settings, url)
        return await _watch(stack, pool)
    finally:
        await asyncio.shield(_stop_all(pool, stack, store))


def _local_defaults() -> dict[str, str]:
    """On one small machine the models share the cores, so the stages get more time than a fleet of services needs."""
    return {
        "INTENT_TIMEOUT_MS": "300",
        "RAG_TIMEOUT_MS": "300",
        "LLM_TIMEOUT_MS": "1000",
        "TTS_TIMEOUT_MS": "1500",
        "DRAIN_TIMEOUT_SECONDS": "2",
    }


async def _play_sample(url: str, run_dir: Path) -> bool:
    click.echo("\nplaying a spoken question through it:")
    with resources.as_file(resources.files("orchestrator.local") / "samples" / "question.wav") as wav:
        try:
            exchange = await hold_conversation(url, "", "", wav, None, None, run_dir / "answer.wav")
        except CallError as error:
            click.echo(f"the sample conversation failed: {error}", err=True)
            return False
    return bool(exchange.answer)


def _say_where(settings: Settings, url: str) -> None:
    http = url.replace("ws", "http", 1)
    click.echo(
        f"\nready:\n"
        f"  talk in the browser   {http}/\n"
        f'  talk from a shell     orchestrator talk FILE.wav --url {url}   (or --text "…")\n'
        f"  WebSocket             {url}/orchestrate?session_id=<uuid>\n"
        f"  health and metrics    {http}/health   {http}/metrics\n"
        f"Ctrl-C stops everything."
    )


async def _watch(stack: LocalStack, pool: Pool) -> int:
    """Until a part ends by itself."""
    parts = asyncio.create_task(stack.wait_for_exit())
    workers = asyncio.create_task(pool.wait_for_exit())
    try:
        await asyncio.wait({parts, workers}, return_when=asyncio.FIRST_COMPLETED)
        if parts.done():
            part = parts.result()
            click.echo(f"{part}\n{part.log_tail}\nstopping the rest", err=True)
        else:
            click.echo(f"{workers.result()}\nstopping the rest", err=True)
        return 1
    finally:
        parts.cancel()
        workers.cancel()
        await asyncio.gather(parts, workers, return_exceptions=True)


async def _stop_all(pool: Pool, stack: LocalStack, store: EmbeddedValkey) -> None:
    await pool.stop()
    await stack.stop()
    store.stop()
