"""HTTP on real sockets: the pages, and every refusal before the upgrade."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.server.pools import RunningPool, parse_response, until
from tests.server.test_head import head

pytestmark = pytest.mark.server

SECRET = "a secret that is long enough for HS256"
StartPool = Callable[..., RunningPool]


def answer(pool: RunningPool, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    return parse_response(pool.exchange(raw))


def test_health_is_what_the_readme_prints_then_more(fake_pool: RunningPool):
    status, headers, body = fake_pool.ask("/health")
    health = json.loads(body)
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert list(health) == [
        "status", "service", "active_sessions", "redis_connected", "uptime_seconds", "workers", "draining", "version",
    ]  # fmt: skip
    assert (health["status"], health["service"], health["active_sessions"]) == ("healthy", "orchestrator", 0)
    assert (health["redis_connected"], health["workers"], health["draining"]) == (True, 2, False)
    assert health["uptime_seconds"] > 0


def test_deep_health_names_the_services(fake_pool: RunningPool):
    assert json.loads(fake_pool.ask("/health?deep=1")[2])["services"] == {"intent": "closed"}


def test_probes(fake_pool: RunningPool):
    assert fake_pool.ask("/livez")[0] == 200
    assert fake_pool.ask("/readyz")[0] == 200


def test_head_requests_have_no_body(fake_pool: RunningPool):
    status, headers, body = fake_pool.ask("/health", method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 100


def test_a_load_balancers_old_probe_is_answered(fake_pool: RunningPool):
    assert answer(fake_pool, b"GET /health HTTP/1.0\r\n\r\n")[0] == 200


def test_a_client_that_closes_its_side_first_is_still_answered(fake_pool: RunningPool):
    with socket.create_connection(("127.0.0.1", fake_pool.port), timeout=5) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := client.recv(65536):
            received += chunk
    assert parse_response(received)[0] == 200


def test_metrics_count_all_workers(start_fake_pool: StartPool):
    pool = start_fake_pool(workers=3)
    for number in range(12):
        with connect(f"{pool.url}?session_id=counted-{number}") as client:
            client.recv()
    status, headers, body = pool.ask("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    values = {
        (sample.name, sample.labels.get("result")): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    sent, local = (values.get(("orchestrator_handoffs_total", result), 0) for result in ("sent", "local"))
    assert sent + local == 12
    assert sent == values.get(("orchestrator_handoffs_total", "received"), 0)


def test_a_session_is_described_by_its_owner_whoever_is_asked(fake_pool: RunningPool):
    with connect(f"{fake_pool.url}?session_id=described") as client:
        slot = json.loads(client.recv())["slot"]
        for _ in range(6):
            status, _, body = fake_pool.ask("/sessions/described")
            described = json.loads(body)
            assert (status, described["slot"], described["attached"]) == (200, slot, True)
    assert fake_pool.ask("/sessions/unknown")[0] == 404


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (head("/orchestrate"), 400),
        (head("/orchestrate?session_id="), 400),
        (head("/orchestrate?session_id=a&session_id=b"), 400),
        (head("/orchestrate?session_id=a%0d%0ab"), 400),
        (head(Sec_WebSocket_Key="bad"), 400),
        (head(extra="Host: again\r\n"), 400),
        (head(extra="Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"), 400),
        (head("/nothing"), 404),
        (head(method="POST"), 405),
        (head(method="POST", extra="Content-Length: 100000\r\n") + b"x" * 100_000, 405),
        (head(Upgrade=None, Connection=None), 426),
        (head(Sec_WebSocket_Version="12"), 426),
        (head(extra="X: " + "y" * 9000 + "\r\n"), 431),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000, 431),
        (b"\x16\x03\x01\x00\xa5\x01\r\n\r\n", 400),
        (head() + b"\x00" * 20_000, 400),
    ],
)
def test_refusals(fake_pool: RunningPool, raw, expected):
    status, headers, body = answer(fake_pool, raw)
    assert status == expected
    assert headers["connection"] == "close"
    assert body.count(b"\n") == 1


def test_a_head_that_does_not_come_is_closed_without_a_word(fake_pool: RunningPool):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", fake_pool.port), timeout=10) as client:
        client.sendall(b"GET /health HTTP/1.1\r\n")
        assert client.recv(100) == b""
    assert time.monotonic() - began > 1.9


def test_a_head_may_come_in_pieces(fake_pool: RunningPool):
    with socket.create_connection(("127.0.0.1", fake_pool.port), timeout=5) as client:
        for byte in head("/orchestrate?session_id=pieces"):
            client.sendall(bytes((byte,)))
        received = client.recv(4096)
    assert received.startswith(b"HTTP/1.1 101 ")


def test_a_full_server_refuses_the_new_and_takes_the_known(start_fake_pool: StartPool):
    pool = start_fake_pool({"MAX_CONCURRENT_SESSIONS": "3"}, workers=2)
    with contextlib.ExitStack() as clients:

        def enter(session_id: str) -> tuple[ClientConnection, dict[str, Any]]:
            client = clients.enter_context(connect(f"{pool.url}?session_id={session_id}"))
            return client, json.loads(client.recv())

        first = [enter(f"s{number}")[0] for number in range(3)]
        status, headers, _ = answer(pool, head("/orchestrate?session_id=s4"))
        assert status == 503
        assert int(headers["retry-after"]) > 0
        assert enter("s1")[1]["resumed"] is True
        assert json.loads(pool.ask("/health")[2])["active_sessions"] == 3
        first[0].close()
        until(lambda: json.loads(pool.ask("/health")[2])["active_sessions"] == 2, 5, "the place is not given back")
        enter("s5")


def test_tokens_and_origins(start_fake_pool: StartPool):
    pool = start_fake_pool({"AUTH_JWT_SECRET": SECRET, "ALLOWED_ORIGINS": "https://app.example.org"}, workers=2)
    good = jwt.encode({"exp": time.time() + 600, "session_id": "mine"}, SECRET, "HS256")
    url = f"{pool.url}?session_id=mine"

    def refused(target: str, **options: object) -> int:
        with pytest.raises(InvalidStatus) as failure:
            connect(target, **options)  # type: ignore[arg-type]
        return failure.value.response.status_code

    assert refused(url) == 401
    assert refused(f"{url}&token=nonsense") == 401
    assert refused(f"{pool.url}?session_id=yours&token={good}") == 403
    assert refused(f"{url}&token={good}", origin="https://evil.example.org") == 403
    assert pool.ask("/sessions/mine")[0] == 401
    with connect(f"{url}&token={good}", origin="https://app.example.org") as client:
        client.recv()
        assert pool.ask("/sessions/mine", headers=f"Authorization: Bearer {good}\r\n")[0] == 200
    with connect(url, additional_headers={"Authorization": f"Bearer {good}"}) as client:
        client.recv()
    with connect(url, subprotocols=[f"bearer.{good}"]) as client:  # type: ignore[list-item]
        client.recv()
        assert client.subprotocol == f"bearer.{good}"
    short = jwt.encode({"exp": time.time() + 1.2}, SECRET, "HS256")
    with connect(f"{url}&token={short}") as client:
        client.recv()
        with pytest.raises(Exception, match="4401"):
            client.recv(timeout=5)
    assert good not in pool.log
    assert short not in pool.log


def test_without_a_store_health_says_degraded(start_fake_pool: StartPool):
    pool = start_fake_pool({"REDIS_URL": "redis://down:6379/0"})
    status, _, body = pool.ask("/health")
    health = json.loads(body)
    assert (status, health["status"], health["redis_connected"]) == (200, "degraded", False)
