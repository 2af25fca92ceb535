"""The request head: the refusal table, one row a case, and that no bytes at all raise."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.server.head import MAX_HEAD_BYTES, ParsedHead, Refusal, parse_head

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = {
    "Host": "localhost:8004",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}
TARGET = "/orchestrate?session_id=test_001"


def head(
    target: str = TARGET, method: str = "GET", version: str = "1.1", extra: str = "", **changes: str | None
) -> bytes:
    fields = {**UPGRADE, **{name.replace("_", "-"): value for name, value in changes.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"{method} {target} HTTP/{version}\r\n{lines}{extra}\r\n".encode("latin-1")


def parsed(raw: bytes) -> ParsedHead:
    request = parse_head(raw)
    assert isinstance(request, ParsedHead), request
    return request


def status(raw: bytes) -> int:
    refusal = parse_head(raw)
    assert isinstance(refusal, Refusal), refusal
    assert "\n" not in refusal.reason
    return refusal.status


def test_a_websocket_request():
    request = parsed(head("/orchestrate?session_id=test_001&events=state,progress&last_seq=17&token=abc"))
    assert (request.route, request.session_id) == ("orchestrate", "test_001")
    assert (request.last_seq, request.token) == (17, "abc")
    assert request.events == {"state", "progress"}
    assert request.key == KEY.encode()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("session_id=6f1c2a4e-8f5b-4b52-9a57-6a2f0b1f4c11", "6f1c2a4e-8f5b-4b52-9a57-6a2f0b1f4c11"),
        ("session_id=a%3Ab.c", "a:b.c"),
        ("session%5Fid=x", "x"),
        ("session_id=" + "x" * 128, "x" * 128),
        ("&&session_id=x&unknown=1", "x"),
    ],
)
def test_session_ids(query, expected):
    assert parsed(head(f"/orchestrate?{query}")).session_id == expected


@pytest.mark.parametrize(
    "query",
    [
        "",
        "session_id=",
        "session_id",
        "session_id=a&session_id=a",
        "session_id=a&session%5fid=b",
        "session_id=" + "x" * 129,
        "session_id=a%20b",
        "session_id=a+b",
        "session_id=a%0Ab",
        "session_id=a%00",
        "session_id=a/b",
        "session_id=%C3%A4",
        "session_id=%ff",
        "session_id=%zz",
        "session_id=a%",
        "session_id=..%2Fetc",
        "session_id=a&last_seq=-1",
        "session_id=a&last_seq=1.5",
        "session_id=a&last_seq=1&last_seq=2",
        "session_id=a&last_seq=99999999999999999999",
        "session_id=a&events=audio",
        "session_id=a&token=x&token=y",
    ],
)
def test_a_query_that_is_not_accepted_is_400(query):
    assert status(head(f"/orchestrate?{query}")) == 400


def test_events_all_stands_for_every_event():
    assert parsed(head(f"{TARGET}&events=all")).events == {"state", "progress"}
    assert parsed(head(f"{TARGET}&events=")).events == frozenset()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (head(Sec_WebSocket_Key=None), 400),
        (head(Sec_WebSocket_Key="short"), 400),
        (head(Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ"), 400),
        (head(extra=f"Sec-WebSocket-Key: {KEY}\r\n"), 400),
        (head(Host=None), 400),
        (head(extra="Host: other\r\n"), 400),
        (head(extra="Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), 400),
        (head(extra="Content-Length: 5\r\n"), 400),
        (head(extra="Content-Length: 0\r\nContent-Length: 0\r\n"), 400),
        (head(extra="Content-Length: -1\r\n"), 400),
        (head(extra="Transfer-Encoding: chunked\r\n"), 400),
        (head(extra="Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"), 400),
        (head(extra=" folded: line\r\n"), 400),
        (head(extra="Bad Name: x\r\n"), 400),
        (head(extra="Name : x\r\n"), 400),
        (head(extra="X: a\x00b\r\n"), 400),
        (head(extra="X: a\nY: b\r\n"), 400),
        (head("/orchestrate?session_id=a#b"), 400),
        (head("orchestrate"), 400),
        (head("*"), 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (head("/nothing"), 404),
        (head("/nothing", method="POST"), 404),
        (head("/orchestrate/"), 404),
        (head("/sessions/a/b"), 404),
        (head("/sessions/"), 400),
        (head("/sessions/a%20b"), 400),
        (head(method="POST"), 405),
        (head(method="POST", extra="Content-Length: 5\r\n"), 405),
        (head("/health", method="DELETE"), 405),
        (head(Upgrade=None, Connection=None), 426),
        (head("/orchestrate", Upgrade=None), 426),
        (head(Upgrade="h2c"), 426),
        (head(Connection="keep-alive"), 426),
        (head(Sec_WebSocket_Version="8"), 426),
        (head(Sec_WebSocket_Version=None), 426),
        (head(version="1.0"), 426),
        (head(method="HEAD"), 426),
        (head(version="2.0"), 505),
        (b"PRI * HTTP/2.0\r\n\r\n", 505),
        (head(extra="X: " + "y" * MAX_HEAD_BYTES + "\r\n"), 431),
        (head(extra="X: y\r\n" * 120), 431),
    ],
)
def test_the_refusal_table(raw, expected):
    assert status(raw) == expected


def test_refusals_tell_what_would_be_accepted():
    upgrade = parse_head(head(Sec_WebSocket_Version="7"))
    assert isinstance(upgrade, Refusal)
    assert ("Sec-WebSocket-Version", "13") in upgrade.headers
    method = parse_head(head(method="PUT"))
    assert isinstance(method, Refusal)
    assert ("Allow", "GET, HEAD") in method.headers


def test_header_names_and_upgrade_tokens_ignore_case_and_lists():
    raw = head(Upgrade="WebSocket", Connection="keep-alive, Upgrade").replace(b"Host:", b"HOST:")
    assert parsed(raw).session_id == "test_001"


@pytest.mark.parametrize("scheme", ["http", "HTTPS"])
def test_a_proxy_may_send_the_whole_url(scheme):
    assert parsed(head(f"{scheme}://example.org:80{TARGET}")).session_id == "test_001"
    assert status(head(f"{scheme}://example.org?session_id=a")) == 404


def test_pages():
    assert parsed(b"GET /health HTTP/1.0\r\n\r\n").route == "health"
    assert parsed(head("/health?deep=1")).deep is True
    assert parsed(head("/metrics", method="HEAD")).head_only is True
    assert parsed(head("/sessions/test%5F001?token=t")).session_id == "test_001"
    asset = parse_head(head("/app.js"), assets=("/", "/app.js"))
    assert isinstance(asset, ParsedHead)
    assert (asset.route, asset.path) == ("asset", "/app.js")


def test_where_a_token_may_stand():
    assert parsed(head(extra="Authorization: Bearer abc.def\r\n")).token == "abc.def"
    by_protocol = parsed(head(extra="Sec-WebSocket-Protocol: other, bearer.abc.def\r\n"))
    assert (by_protocol.token, by_protocol.subprotocol) == ("abc.def", "bearer.abc.def")
    assert parsed(head(extra="Authorization: Basic abc\r\n")).token is None
    assert parsed(head(extra="Sec-WebSocket-Protocol: chat\r\n")).subprotocol is None


def test_the_largest_accepted_head():
    room = MAX_HEAD_BYTES - len(head(extra="X: \r\n"))
    assert parsed(head(extra="X: " + "y" * room + "\r\n")).session_id == "test_001"
    assert status(head(extra="X: " + "y" * (room + 1) + "\r\n")) == 431


@given(st.binary(max_size=600))
@example(b"GET /orchestrate?session_id=%F0%9F%98%80 HTTP/1.1\r\nHost: x\r\n\r\n")
def test_any_bytes_are_parsed_or_refused(raw):
    for candidate in (raw, raw + b"\r\n\r\n"):
        assert isinstance(parse_head(candidate), ParsedHead | Refusal)


@given(st.integers(0, len(head()) - 1), st.binary(max_size=3), st.integers(0, 8))
def test_any_damage_to_a_good_head_is_parsed_or_refused(at, inserted, removed):
    raw = head()
    assert isinstance(parse_head(raw[:at] + inserted + raw[at + removed :]), ParsedHead | Refusal)


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_query_and_header_text_is_parsed_or_refused(query, value):
    raw = head("/orchestrate?" + query).replace(b"localhost:8004", b"x") if query.isascii() else head()
    assert isinstance(parse_head(raw + value.encode() + b"\r\n\r\n"), ParsedHead | Refusal)
