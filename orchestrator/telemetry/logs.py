"""Logging on the standard library: one event a line on stderr, as JSON or for people to read.

What a client sent may stand in a message, an extra field or an exception: control characters never appear raw, so
nobody can forge a line or steer a terminal.
"""

from __future__ import annotations

import datetime
import logging
import re
import sys
import warnings
from typing import Any, TextIO

import orjson

from orchestrator.settings import Settings

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_UNSAFE_IN_JSON = re.compile(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_TRACEBACK_MARK = "  | "


def configure(settings: Settings, stream: TextIO | None = None) -> None:
    """Send every logger to `stream` (stderr) in the format of LOG_FORMAT, from LOG_LEVEL upwards. May be repeated."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else ConsoleFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        if getattr(old, "orchestrator_handler", False):
            root.removeHandler(old)
    handler.orchestrator_handler = True  # type: ignore[attr-defined]  # found again by the next configure()
    root.addHandler(handler)
    root.setLevel(settings.log_level)
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", message=".*below the minimum recommended length.*")
    quiet = logging.WARNING if settings.log_level != "DEBUG" else logging.INFO
    for name in ("asyncio", "aiohttp", "websockets"):
        logging.getLogger(name).setLevel(quiet)


def printable(text: str) -> str:
    """`text` with control characters, line separators and lone surrogates written as escapes."""
    return _UNSAFE.sub(_escape, text)


def _escape(matched: re.Match[str]) -> str:
    code = ord(matched[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS}


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):
        return f"{record.msg} {record.args!r}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC, RFC 3339), `level`, `logger`, `pid`, `message`, extras, `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": _message(record),
        }
        for name, value in _extra_fields(record).items():
            fields.setdefault(name, value)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return _UNSAFE_IN_JSON.sub(_escape_json, _dump(fields))


def _dump(fields: dict[str, Any]) -> str:
    try:
        return orjson.dumps(fields, default=repr).decode()
    except (TypeError, ValueError):
        # orjson refuses lone surrogates and huge integers; what the line says matters more than its types.
        return orjson.dumps({name: printable(str(value)) for name, value in fields.items()}).decode()


def _escape_json(matched: re.Match[str]) -> str:
    return f"\\u{ord(matched[0]):04x}"


class ConsoleFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER[PID] MESSAGE key=value …`; the lines of a traceback follow, each marked with a bar."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        line = f"{clock} {record.levelname:<7} {record.name}[{record.process}] {printable(_message(record))}"
        for name, value in _extra_fields(record).items():
            line += f" {name}={printable(str(value))}"
        trace = ""
        if record.exc_info:
            trace += self.formatException(record.exc_info)
        if record.stack_info:
            trace += "\n" + self.formatStack(record.stack_info)
        marked = [_TRACEBACK_MARK + printable(part) for part in trace.split("\n") if part]
        return "\n".join([line, *marked])
