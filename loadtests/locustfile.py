"""Locust users: talkers, interrupters, quitters and lurkers. See README.md beside this file."""

from __future__ import annotations

import json
import random
import time
import uuid
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]
import websocket
from locust import User, between, constant, events, task
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtests.conversation import QUESTIONS, Conversation, Failed
from loadtests.histograms import Histograms, Threshold, broken

HISTOGRAMS = Histograms()
_MESSAGE = "histograms"


class Caller(User):
    """Somebody with a conversation; what goes wrong is a failed request, and the next task reconnects."""

    abstract = True
    conversation: Conversation | None = None

    def on_start(self) -> None:
        self.session_id = str(uuid.uuid4())

    def on_stop(self) -> None:
        if self.conversation is not None:
            self.conversation.close()
            self.conversation = None

    def connected(self) -> Conversation:
        """The conversation, opened where there is none."""
        if self.conversation is None:
            started = time.perf_counter()
            self.conversation = Conversation(self.host or "", self.session_id)
            self.succeed("connect", time.perf_counter() - started)
        return self.conversation

    def succeed(self, name: str, seconds: float, size: int = 0) -> None:
        HISTOGRAMS.record(name, seconds * 1000)
        self._fire(name, seconds, size, None)

    def fail(self, name: str, error: Exception) -> None:
        if self.conversation is not None:
            self.conversation.drop()
            self.conversation = None
        self._fire(name, 0.0, 0, error)

    def _fire(self, name: str, seconds: float, size: int, error: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type=type(self).__name__,
            name=name,
            response_time=seconds * 1000,
            response_length=size,
            exception=error,
            context={},
        )

    def attempt(self, name: str, action: Any) -> None:
        """Runs a task's body; a protocol failure is recorded under `name`."""
        try:
            action()
        except (Failed, websocket.WebSocketException, OSError) as error:
            self.fail(name, error)

    def ask(self, conversation: Conversation) -> float:
        """Speaks a question and waits for the first audio. Returns when that came (perf_counter)."""
        intended = conversation.say(random.choice(QUESTIONS))
        conversation.expect("response_ready", 5.0)
        give_up = time.perf_counter() + 5.0
        while not conversation.first_audio_at:
            if time.perf_counter() > give_up:
                raise Failed("response_ready, but no audio")
            gevent.sleep(0.002)
        self.succeed("first audio", conversation.first_audio_at - intended)
        return conversation.first_audio_at


class Talker(Caller):
    """Asks, listens to the end, thinks, asks again."""

    weight = 6
    wait_time = between(0.5, 4.0)

    @task
    def talk(self) -> None:
        self.attempt("turn", self._talk)

    def _talk(self) -> None:
        conversation = self.connected()
        began = self.ask(conversation)
        ended, complete = conversation.expect("turn_complete", 30.0)
        if complete.get("cancelled"):
            raise Failed("the turn was cancelled by nobody")
        self.succeed("turn", ended - began, conversation.audio_bytes)


class Interrupter(Caller):
    """Talks over the answer; not a byte of it may come after `interrupted`."""

    weight = 2
    wait_time = between(0.5, 2.0)

    @task
    def interrupt(self) -> None:
        self.attempt("barge-in", self._interrupt)

    def _interrupt(self) -> None:
        conversation = self.connected()
        self.ask(conversation)
        gevent.sleep(random.uniform(0.1, 2.0))
        said = time.perf_counter()
        conversation.send("user_speaking", confidence=1.0)
        for received, message in conversation.messages(5.0):
            if message["type"] == "turn_complete":
                return
            if message["type"] == "interrupted":
                self.succeed("barge-in", received - said)
                gevent.sleep(0.3)
                if conversation.last_audio_at > received:
                    raise Failed("audio after interrupted")
                return


class Quitter(Caller):
    """Leaves in the middle, with or without a goodbye, and comes back to the same conversation."""

    weight = 1
    wait_time = between(0.5, 3.0)

    @task
    def quit(self) -> None:
        self.attempt("reconnect", self._quit)

    def _quit(self) -> None:
        conversation = self.connected()
        conversation.say(random.choice(QUESTIONS))
        gevent.sleep(random.uniform(0.0, 1.5))
        random.choice((conversation.drop, conversation.close))()
        self.conversation = None
        gevent.sleep(random.uniform(0.05, 0.5))
        started = time.perf_counter()
        self.conversation = Conversation(self.host or "", self.session_id)
        self.succeed("reconnect", time.perf_counter() - started)
        if not self.conversation.greeting.get("resumed"):
            raise Failed("the conversation was not resumed")


class Lurker(Caller):
    """Stays connected and says nothing but `ping`."""

    weight = 3
    wait_time = constant(5)

    @task
    def lurk(self) -> None:
        self.attempt("ping", self._lurk)

    def _lurk(self) -> None:
        conversation = self.connected()
        started = time.perf_counter()
        conversation.send("ping", id="lurker")
        self.succeed("ping", conversation.expect("pong", 5.0)[0] - started)


def _options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("limits that set the exit code")
    group.add_argument("--limit-first-audio-p50", type=float, default=400.0, help="ms")
    group.add_argument("--limit-first-audio-p99", type=float, default=445.0, help="ms")
    group.add_argument("--limit-barge-in-p99", type=float, default=100.0, help="ms, seen by the client")
    group.add_argument("--limit-failures", type=float, default=0.0, help="share of requests, 0…1")
    group.add_argument("--results", default="", help="write the exact percentiles to this JSON file")


def _send(client_id: str, data: dict[str, Any]) -> None:
    data[_MESSAGE] = HISTOGRAMS.take()


def _receive(client_id: str, data: dict[str, Any]) -> None:
    HISTOGRAMS.merge(data.get(_MESSAGE, {}))


def _start(environment: Environment, **_: Any) -> None:
    HISTOGRAMS.clear()


def _judge(environment: Environment, **_: Any) -> None:
    """Prints the exact percentiles and sets the exit code: 0 within all limits, 2 otherwise."""
    if isinstance(environment.runner, WorkerRunner) or environment.parsed_options is None:
        return
    options = environment.parsed_options
    wrong = broken(
        (
            Threshold("first audio", 0.5, options.limit_first_audio_p50),
            Threshold("first audio", 0.99, options.limit_first_audio_p99),
            Threshold("barge-in", 0.99, options.limit_barge_in_p99),
        ),
        HISTOGRAMS,
    )
    failed = environment.stats.total.fail_ratio
    if failed > options.limit_failures:
        wrong.append(f"failed requests: {failed:.2%}, the limit is {options.limit_failures:.2%}")
    _print(wrong)
    if options.results:
        _write(Path(options.results), wrong)
    environment.process_exit_code = 2 if wrong else 0


def _rows() -> dict[str, dict[str, float]]:
    quantiles = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {
        name: {
            "count": HISTOGRAMS.count(name),
            **{label: HISTOGRAMS.ms(name, q) for label, q in quantiles.items()},
        }
        for name in HISTOGRAMS.names()
    }


def _print(wrong: list[str]) -> None:
    lines = ["", "exact percentiles (ms), first audio from the intended end of speech"]
    for name, row in _rows().items():
        figures = "  ".join(f"{label} {value:8.1f}" for label, value in row.items() if label != "count")
        lines.append(f"  {name:<12} {row['count']:>7.0f}  {figures}")
    lines += [f"  LIMIT BROKEN: {line}" for line in wrong] or ["  all limits kept"]
    print("\n".join(lines), flush=True)  # noqa: T201 the report of a command-line tool


def _write(path: Path, wrong: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"percentiles_ms": _rows(), "limits_broken": wrong}, indent=2))


def _listen(hooks: Any) -> None:
    hooks.init_command_line_parser.add_listener(_options)
    hooks.report_to_master.add_listener(_send)
    hooks.worker_report.add_listener(_receive)
    hooks.test_start.add_listener(_start)
    hooks.quitting.add_listener(_judge)


_listen(events)
