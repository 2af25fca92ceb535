"""Who is let in, and who serves a session, as one worker decides it from the slot table."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.ring import owner
from orchestrator.server.auth import Authenticator, Grant
from orchestrator.server.head import ParsedHead, Refusal, parse_head
from orchestrator.server.http import CONSOLE_POLICY, MetricsPage, Response, answer, load_assets
from orchestrator.server.hub import MAX_HOPS, Hub, Shared
from orchestrator.server.slots import STALE_NS, SlotTable
from orchestrator.settings import load_settings
from orchestrator.telemetry.observer import Observer
from tests.server.test_head import head

MakeHub = Callable[..., Hub]


class Counting(Observer):
    def __init__(self) -> None:
        self.rejected: list[str] = []
        self.lags: list[float] = []

    def session_rejected(self, reason: str) -> None:
        self.rejected.append(reason)

    def loop_lag(self, seconds: float) -> None:
        self.lags.append(seconds)


class FakeConnection:
    def __init__(self, session_id: str) -> None:
        self.session_id = session_id


@pytest.fixture
def table() -> Iterator[SlotTable]:
    table = SlotTable(time.monotonic_ns())
    yield table
    table.close()


@pytest.fixture
def make_hub(table: SlotTable) -> Iterator[MakeHub]:
    loop = asyncio.new_event_loop()

    def make(slot: int = 0, workers: int = 2, **environ: str) -> Hub:
        now = time.monotonic_ns()
        table.reserve(workers, now)
        for _ in range(workers):
            taken = table.take(now)
            assert taken is not None
            table.go_live(taken, now)
        settings = load_settings(environ)
        assets = load_assets(Path("nowhere"))
        shared = Shared(settings, table, slot, Authenticator(settings), assets, MetricsPage("nowhere", table))
        return Hub(shared, Counting(), loop)

    yield make
    loop.close()


def request(session_id: str, extra: str = "") -> ParsedHead:
    parsed = parse_head(head(f"/orchestrate?session_id={session_id}", extra=extra))
    assert isinstance(parsed, ParsedHead)
    return parsed


def enter(hub: Hub, session_id: str) -> Any:
    assert isinstance(hub.admit(request(session_id)), Grant)
    connection: Any = FakeConnection(session_id)
    hub.enter(connection)
    return connection


def refused(hub: Hub, session_id: str, extra: str = "") -> str:
    verdict = hub.admit(request(session_id, extra))
    assert isinstance(verdict, Refusal)
    assert verdict.status in (403, 503)
    assert (verdict.status == 503) is ("Retry-After" in dict(verdict.headers))
    return hub.observer.rejected[-1]  # type: ignore[attr-defined]


def test_the_owner_is_who_the_ring_names_until_it_hangs(make_hub: MakeHub, table: SlotTable):
    hub = make_hub(workers=3)
    assert [hub.place(f"s{n}", 0) for n in range(20)] == [owner(f"s{n}", range(3)) for n in range(20)]
    table.beat(1, time.monotonic_ns() - STALE_NS, redis_connected=True)
    assert [hub.place(f"s{n}", 0) for n in range(20)] == [owner(f"s{n}", [0, 2]) for n in range(20)]


def test_what_was_handed_here_is_served_here_even_if_the_ring_changed_meanwhile(make_hub: MakeHub):
    hub = make_hub(slot=0)
    foreign = next(f"s{n}" for n in range(50) if owner(f"s{n}", range(2)) == 1)
    assert hub.place(foreign, 0) == 1
    assert hub.place(foreign, 1) == 0


def test_a_draining_worker_hands_on_but_not_for_ever(make_hub: MakeHub, table: SlotTable):
    hub = make_hub(slot=0)
    table.go_draining(0, time.monotonic_ns())
    hub.draining = True
    assert {hub.place(f"s{n}", 1) for n in range(20)} == {1}
    assert hub.place("s1", MAX_HOPS) == 0
    table.go_draining(1, time.monotonic_ns())
    assert hub.place("s1", 0) == 0
    assert refused(hub, "s1") == "draining"


def test_the_limit_counts_the_sessions_of_all_workers(make_hub: MakeHub, table: SlotTable):
    hub = make_hub(MAX_CONCURRENT_SESSIONS="5")
    table.set_attached(1, 3)
    enter(hub, "a")
    connection = enter(hub, "b")
    assert refused(hub, "c") == "full"
    assert table.total_attached() == 5
    enter(hub, "b")
    assert table.total_attached() == 5
    hub.leave(connection)
    assert table.total_attached() == 5
    hub.leave(hub.connections["a"])
    enter(hub, "c")
    assert table.total_attached() == 5


def test_a_late_loop_takes_no_new_sessions_until_it_has_recovered(make_hub: MakeHub):
    hub = make_hub(LOOP_LAG_LIMIT_MS="200")
    hub.lag_s = 0.3
    assert refused(hub, "a") == "lag"
    hub.lag_s = 0.1
    enter(hub, "a")


def test_the_heartbeat_measures_how_late_it_is(make_hub: MakeHub, table: SlotTable):
    hub = make_hub()
    hub.sessions = type(
        "Sessions", (), {"store_connected": True, "idle": False, "shed": lambda self, overloaded: None}
    )()
    before = table.view(0).heartbeat_ns

    def beat(late: float) -> None:
        hub._next_beat = time.monotonic() - late
        hub._on_beat()
        hub.stop_heartbeat()

    beat(late=0.5)
    assert hub.observer.lags[-1] >= 0.5  # type: ignore[attr-defined]
    assert hub.lag_s == 0.0, "one pause is no overload"
    beat(late=0.3)
    assert 0.3 <= hub.lag_s < 0.5
    beat(late=-1.0)
    assert hub.lag_s == 0.0
    assert table.view(0).heartbeat_ns > before
    assert table.view(0).redis_connected is True


@pytest.mark.parametrize(
    ("origin", "accepted"),
    [
        ("https://app.example.org", True),
        ("https://app.example.org/", True),
        ("https://other.example.org", True),
        ("http://app.example.org", False),
        ("https://app.example.org.evil.org", False),
        ("null", False),
        (None, True),
    ],
)
def test_origins(make_hub: MakeHub, origin, accepted):
    hub = make_hub(ALLOWED_ORIGINS="https://app.example.org, https://other.example.org")
    extra = f"Origin: {origin}\r\n" if origin is not None else ""
    if accepted:
        assert isinstance(hub.admit(request("a", extra)), Grant)
    else:
        assert refused(hub, "a", extra) == "origin"


def test_pings_of_many_connections_are_spread(make_hub: MakeHub):
    hub = make_hub()
    delays = [hub.first_ping_delay() for _ in range(400)]
    assert len(set(delays)) == 40
    assert 5.0 <= min(delays) < max(delays) < 10.0


def test_the_consoles_files_are_served_with_their_types_and_a_policy(make_hub: MakeHub, tmp_path: Path):
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "console.js").write_text("'use strict'")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "icon.svg").write_text("<svg/>")
    hub = make_hub()
    hub.assets = load_assets(tmp_path)
    assert set(hub.assets) == {"/", "/index.html", "/console.js", "/parts/icon.svg"}
    for path, kind in (("/", "text/html; charset=utf-8"), ("/console.js", "text/javascript; charset=utf-8")):
        parsed = parse_head(head(path), hub.assets)
        assert isinstance(parsed, ParsedHead)
        response = answer(hub, parsed)
        assert isinstance(response, Response)
        assert (response.status, response.content_type) == (200, kind)
        assert ("Content-Security-Policy", CONSOLE_POLICY) in response.headers
    for path in ("/../index.html", "/parts", "/parts/%2e%2e/index.html", "/console.js/"):
        assert isinstance(parse_head(head(path), hub.assets), Refusal)


def test_without_an_index_there_is_no_console(tmp_path: Path):
    (tmp_path / "console.js").write_text("")
    assert load_assets(tmp_path) == {}
