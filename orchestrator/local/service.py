"""What the five services share: their command line, the listening socket, health, JSON in and out, a clean end."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec
import orjson
import uvloop
from aiohttp import web

from orchestrator.local.errors import LocalStackError
from orchestrator.process import end_with_parent

T = TypeVar("T")

logger = logging.getLogger(__name__)

_SHUTDOWN_S: Final = 1.0
_BACKLOG: Final = 128

SERVICE_NAME: Final = web.AppKey("service_name", str)
SOCKETS: Final[web.AppKey[set[web.WebSocketResponse]]] = web.AppKey("sockets")


def command_line(name: str, port: int, about: str) -> argparse.ArgumentParser:
    """The options every service takes; a service adds its own to the parser returned."""
    parser = argparse.ArgumentParser(prog=f"python -m orchestrator.local.{name}", description=about)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=port, help="port to listen on (default: %(default)s)")
    parser.add_argument("--fd", type=int, help="inherited listening socket, instead of --host and --port")
    parser.add_argument("--parent", type=int, help="process id of the supervisor; end when it ends")
    return parser


def new_app(name: str, max_body_bytes: int = 1 << 20) -> web.Application:
    """An application that answers `GET /health` and turns wrong requests into one JSON line."""
    app = web.Application(client_max_size=max_body_bytes, middlewares=[_errors_as_json])
    app[SERVICE_NAME] = name
    app[SOCKETS] = set()
    app.router.add_get("/health", _health)
    app.on_shutdown.append(_close_sockets)
    return app


def run(name: str, args: argparse.Namespace, build: Callable[[], web.Application]) -> int:
    """Load the service with `build`, serve until SIGTERM or SIGINT, return the exit code.

    Nothing is answered before `build` has returned, so a service that answers `/health` has its model loaded.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        if args.parent is not None and not end_with_parent(args.parent, signal.SIGKILL):
            raise LocalStackError(f"the supervisor (process {args.parent}) ended before the service had started")
        listener = _listener(name, args)
        with listener:
            app = build()
            _trim_memory()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(app, listener))
    except LocalStackError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _trim_memory() -> None:
    """Give back what loading a model has left over: about 60 MB of each service's 250."""
    gc.collect()
    gc.freeze()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def bind(name: str, host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one.

    Raises:
        LocalStackError: the address is taken, not allowed or not this machine's; the line says what to do.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        # Two sockets with SO_REUSEADDR may both bind until one of them listens, so take the port now.
        sock.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise LocalStackError(
            f"port {port} on {host} for the {name} service cannot be used ({reason}): "
            "stop the program that holds it or choose another port"
        ) from error
    return sock


def _listener(name: str, args: argparse.Namespace) -> socket.socket:
    if args.fd is not None:
        return socket.socket(fileno=args.fd)
    return bind(name, args.host, args.port)


async def _serve(app: web.Application, listener: socket.socket) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        logger.info("listening on %s", listener.getsockname())
        await stop.wait()
    finally:
        await runner.cleanup()


async def _health(request: web.Request) -> web.Response:
    return json_response({"status": "healthy", "service": request.app[SERVICE_NAME]})


async def _close_sockets(app: web.Application) -> None:
    sockets = app[SOCKETS]
    for sock in list(sockets):
        await sock.close(code=1001, message=b"service is stopping")


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return json_response({"error": error.text or error.reason}, status=error.status)


def json_response(value: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


async def read_json(request: web.Request, kind: type[T]) -> T:
    """The request's body as a msgspec type.

    Raises:
        HTTPBadRequest: not JSON, or not of that type; the text names the field and what is accepted.
    """
    body = await request.read()
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise web.HTTPBadRequest(text=str(error)) from error


@asynccontextmanager
async def websocket(request: web.Request, max_message_bytes: int) -> AsyncIterator[web.WebSocketResponse]:
    """The request's WebSocket, open; closed at the end, and when the service stops."""
    socket = web.WebSocketResponse(max_msg_size=max_message_bytes, heartbeat=20.0, timeout=1.0, compress=False)
    await socket.prepare(request)
    sockets = request.app[SOCKETS]
    sockets.add(socket)
    try:
        yield socket
    finally:
        sockets.discard(socket)
        await socket.close()


async def together(*parts: Coroutine[Any, Any, None]) -> None:
    """Run the parts of a connection until the first ends, then end the others.

    Raises:
        Exception: what a part raised; a lost connection is an ordinary end.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for error in results:
        if isinstance(error, Exception) and not isinstance(error, ConnectionError):
            raise error


def session_of(request: web.Request) -> str:
    """The `session_id` of a WebSocket request.

    Raises:
        HTTPBadRequest: it is missing, empty or longer than 128 characters.
    """
    session_id = request.query.get("session_id", "")
    if not 1 <= len(session_id) <= 128:
        raise web.HTTPBadRequest(text="session_id must be given, with 1 to 128 characters")
    return session_id
