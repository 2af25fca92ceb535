"""Log lines: one event a line in either format, whatever a client put into it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.settings import load_settings
from orchestrator.telemetry import logs

EVIL = "line\nforged\r\x1b[31mred\x00\x7f\x85\x9b2J\u2028\u2029\ud800"
Logged = Callable[[str], io.StringIO]


@pytest.fixture
def logged() -> Iterator[Logged]:
    root = logging.getLogger()
    handlers, level, raising = list(root.handlers), root.level, logging.raiseExceptions

    def configure(log_format: str) -> io.StringIO:
        stream = io.StringIO()
        logs.configure(load_settings({"LOG_FORMAT": log_format, "LOG_LEVEL": "DEBUG"}), stream)
        return stream

    yield configure
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raising
    logging.captureWarnings(False)


def only_printable(text: str) -> bool:
    return all(character == "\n" or not logs._UNSAFE.match(character) for character in text)


def test_json_is_one_object_a_line(logged: Logged):
    stream = logged("json")
    logging.getLogger("test").info("hello %s", "world", extra={"session_id": "s", "n": 3})
    line = json.loads(stream.getvalue())
    assert (line["level"], line["logger"], line["message"]) == ("INFO", "test", "hello world")
    assert (line["session_id"], line["n"]) == ("s", 3)
    assert line["time"].endswith("+00:00")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_control_characters_never_appear_raw(logged: Logged, log_format):
    stream = logged(log_format)
    logging.getLogger("test").warning("said %s", EVIL, extra={"text": EVIL})
    assert stream.getvalue().count("\n") == 1
    assert only_printable(stream.getvalue())
    assert "forged" in stream.getvalue()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_an_exception_cannot_forge_a_line(logged: Logged, log_format):
    stream = logged(log_format)
    try:
        raise ValueError("bad\n12:00:00.000 INFO    root[1] forged")
    except ValueError:
        logging.getLogger("test").exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert "failed" in first
    assert all(line.startswith("  | ") for line in rest)
    assert (len(rest) == 0) is (log_format == "json")
    assert "ValueError" in stream.getvalue()


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("value", [2**80, {1: object()}, b"\xff", float("nan"), {"\ud800"}])
def test_any_value_can_be_logged(logged: Logged, log_format, value):
    stream = logged(log_format)
    logging.getLogger("test").info("value", extra={"value": value})
    assert stream.getvalue().count("\n") == 1


def test_a_wrong_format_string_is_still_logged(logged: Logged):
    stream = logged("console")
    logging.getLogger("test").info("%d", "not a number")
    assert "not a number" in stream.getvalue()


def test_configuring_again_does_not_log_twice(logged: Logged):
    logged("json")
    stream = logged("console")
    logging.getLogger("test").info("once")
    assert stream.getvalue().count("once") == 1


@given(st.text(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_stays_on_its_line(logged: Logged, text):
    for log_format in ("json", "console"):
        stream = logged(log_format)
        logging.getLogger("test").info("%s", text)
        assert stream.getvalue().count("\n") == 1
        assert only_printable(stream.getvalue())
