"""The HTTP pages: health, probes, metrics, one session, and the console's files. Every answer closes its connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from orchestrator import __version__
from orchestrator.server.head import ParsedHead, Refusal
from orchestrator.server.slots import SlotTable
from orchestrator.telemetry import prometheus

if TYPE_CHECKING:
    from orchestrator.server.hub import Hub

TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"
DEEP_HEALTH_TIMEOUT_S: Final = 1.0
CONTENT_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": JSON,
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".wav": "audio/wav",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
}
CONSOLE_POLICY: Final = (
    "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data:; media-src 'self' blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer."""

    status: int
    content_type: str
    body: bytes
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Asset:
    """A static file of the console, read at start."""

    content_type: str
    body: bytes


def load_assets(directory: Path) -> dict[str, Asset]:
    """The files in `directory` by their path on the server, `/` for index.html; none where there is no index.html."""
    if not (directory / "index.html").is_file():
        return {}
    assets = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            kind = CONTENT_TYPES.get(file.suffix, "application/octet-stream")
            assets["/" + file.relative_to(directory).as_posix()] = Asset(kind, file.read_bytes())
    assets["/"] = assets["/index.html"]
    return assets


def serialize(response: Response, head_only: bool) -> bytes:
    """The response on the wire."""
    lines = [
        f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        "Connection: close",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        *(f"{name}: {value}" for name, value in response.headers),
    ]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    return head if head_only else head + response.body


def refusal_response(refusal: Refusal) -> Response:
    """A refusal as plain text."""
    return Response(refusal.status, TEXT, refusal.reason.encode() + b"\n", refusal.headers)


def answer(hub: Hub, head: ParsedHead) -> Response | Awaitable[Response]:
    """The page that `head` asks for."""
    match head.route:
        case "health":
            return _deep_health(hub) if head.deep else _health_response(hub, {})
        case "livez":
            return Response(200, TEXT, b"alive\n")
        case "readyz":
            return _readiness(hub)
        case "metrics":
            return hub.metrics.respond()
        case "session":
            return _describe(hub, head)
        case _:
            asset = hub.assets[head.path]
            return Response(200, asset.content_type, asset.body, (("Content-Security-Policy", CONSOLE_POLICY),))


def _json(status: int, value: Mapping[str, Any], headers: Headers = ()) -> Response:
    return Response(status, JSON, orjson.dumps(value) + b"\n", headers)


def _health_response(hub: Hub, more: dict[str, Any]) -> Response:
    now_ns = time.monotonic_ns()
    table = hub.table
    connected = table.redis_connected(now_ns)
    draining = table.draining(now_ns)
    fields = {
        "status": "healthy" if connected else "degraded",
        "service": "orchestrator",
        "active_sessions": table.total_attached(),
        "redis_connected": connected,
        "uptime_seconds": round((now_ns - table.started_ns) / 1e9, 2),
        "workers": len(table.live(now_ns)),
        "draining": draining,
        "version": __version__,
        **more,
    }
    return _json(503 if draining else 200, fields)


async def _deep_health(hub: Hub) -> Response:
    try:
        services = await asyncio.wait_for(hub.sessions.health(), DEEP_HEALTH_TIMEOUT_S)
    except TimeoutError:
        services = {}
    return _health_response(hub, {"services": services})


def _readiness(hub: Hub) -> Response:
    if hub.table.draining(time.monotonic_ns()):
        return Response(503, TEXT, b"draining\n", (("Retry-After", "2"),))
    return Response(200, TEXT, b"ready\n")


async def _describe(hub: Hub, head: ParsedHead) -> Response:
    verdict = hub.authenticator.admit(head.token, head.session_id)
    if isinstance(verdict, Refusal):
        return refusal_response(verdict)
    described = await hub.sessions.describe(head.session_id)
    if described is None:
        return _json(404, {"error": "nobody knows this session"})
    return _json(200, described)


class MetricsPage:
    """Reads all workers' metric files in a thread of its own; scrapes that come meanwhile share the result."""

    def __init__(self, directory: str, table: SlotTable) -> None:
        self._directory = directory
        self._table = table
        self._executor: ThreadPoolExecutor | None = None
        self._running: asyncio.Future[bytes] | None = None

    async def respond(self) -> Response:
        """The metrics of all workers."""
        if self._running is None or self._running.done():
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="metrics")
            loop = asyncio.get_running_loop()
            self._running = loop.run_in_executor(
                self._executor, prometheus.render, self._directory, self._table.restarts()
            )
        return Response(200, prometheus.CONTENT_TYPE, await asyncio.shield(self._running))

    def close(self) -> None:
        """Let the thread go."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
