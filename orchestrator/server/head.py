"""The request head: bytes in, a checked request or a refusal out. Pure, and total: no input raises.

Rules come from RFC 9112 (message syntax), RFC 6455 section 4 (WebSocket handshake) and the protocol's refusal table.
Whatever two parsers could read differently (duplicate Host, Content-Length with Transfer-Encoding, folded lines, a bare
line feed) is refused rather than interpreted.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

MAX_HEAD_BYTES: Final = 8192
HEAD_END: Final = b"\r\n\r\n"
EVENTS: Final = frozenset({"state", "progress"})
BEARER_SUBPROTOCOL: Final = "bearer."

Route = Literal["orchestrate", "health", "livez", "readyz", "metrics", "session", "asset"]

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ABSOLUTE_FORM = re.compile(r"https?://[^/?]+", re.IGNORECASE)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ESCAPES = re.compile(rb"%([0-9A-Fa-f]{2})")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_DIGITS = re.compile(r"[0-9]{1,15}")
_MAX_HEADERS = 100
_SINGLE_HEADERS = (
    "host", "content-length", "sec-websocket-key", "sec-websocket-version", "origin", "authorization",
)  # fmt: skip
_FIXED_ROUTES: dict[str, Route] = {
    "/orchestrate": "orchestrate",
    "/health": "health",
    "/livez": "livez",
    "/readyz": "readyz",
    "/metrics": "metrics",
}
_SESSION_PREFIX = "/sessions/"
_SESSION_RULE = "session_id: 1 to 128 of A-Z a-z 0-9 . _ : - are accepted"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer other than the one asked for. `reason` is one line for the client."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedHead:
    """A request that may be served. `key` is the WebSocket key, `token` a credential as sent."""

    route: Route
    path: str
    head_only: bool = False
    session_id: str = ""
    deep: bool = False
    events: frozenset[str] = frozenset()
    last_seq: int | None = None
    token: str | None = None
    key: bytes = b""
    origin: str | None = None
    subprotocol: str | None = None


class _Refused(Exception):
    def __init__(self, status: int, reason: str, *headers: tuple[str, str]) -> None:
        self.refusal = Refusal(status, reason, headers)


def parse_head(head: bytes, assets: Collection[str] = ()) -> ParsedHead | Refusal:
    """The request in `head`, which ends with an empty line; `assets` are the paths of static files.

    A refusal carries the status of the protocol's refusal table.
    """
    try:
        return _parse(head, assets)
    except _Refused as refused:
        return refused.refusal


def _parse(head: bytes, assets: Collection[str]) -> ParsedHead:
    if len(head) > MAX_HEAD_BYTES:
        raise _Refused(431, f"the request head has more than {MAX_HEAD_BYTES} bytes")
    if not head.endswith(HEAD_END):
        raise _Refused(400, "the request head does not end with an empty line")
    lines = head[: -len(HEAD_END)].split(b"\r\n")
    matched = _REQUEST_LINE.fullmatch(lines[0])
    if matched is None:
        raise _Refused(400, "the request line is not METHOD TARGET HTTP/1.1")
    method = matched[1].decode("ascii")
    if matched[3] != b"1":
        raise _Refused(505, "only HTTP/1.1 is spoken here")
    old_http = matched[4] == b"0"
    headers = _parse_headers(lines[1:])
    _check_framing(headers, old_http)
    path, query = _split_target(matched[2].decode("ascii"))
    route, session_id = _find_route(path, assets)
    if method not in ("GET", "HEAD"):
        raise _Refused(405, "only GET is accepted here", ("Allow", "GET, HEAD"))
    if headers.get("content-length", ["0"])[0].strip("0") or "transfer-encoding" in headers:
        raise _Refused(400, "a request body is not accepted here")
    fields = _parse_query(query)
    subprotocol = _bearer_subprotocol(headers)
    token = _find_token(headers, fields, subprotocol)
    if route != "orchestrate":
        return ParsedHead(
            route=route,
            path=path,
            head_only=method == "HEAD",
            session_id=session_id,
            deep=fields.get("deep", [""])[-1] in ("1", "true"),
            token=token,
        )
    _check_upgrade(headers, method, old_http)
    return ParsedHead(
        route=route,
        path=path,
        session_id=_one_session_id(fields),
        events=_parse_events(fields),
        last_seq=_parse_last_seq(fields),
        token=token,
        key=_websocket_key(headers),
        origin=headers["origin"][0] if "origin" in headers else None,
        subprotocol=subprotocol,
    )


def _parse_headers(lines: list[bytes]) -> dict[str, list[str]]:
    if len(lines) > _MAX_HEADERS:
        raise _Refused(431, f"the request has more than {_MAX_HEADERS} header fields")
    headers: dict[str, list[str]] = {}
    for line in lines:
        matched = _HEADER_LINE.fullmatch(line)
        if matched is None:
            raise _Refused(400, "a header field is not NAME: VALUE")
        name = matched[1].decode("ascii").lower()
        headers.setdefault(name, []).append(matched[2].decode("latin-1").strip(" \t"))
    for name in _SINGLE_HEADERS:
        if len(headers.get(name, ())) > 1:
            raise _Refused(400, f"the header field {name} is repeated")
    return headers


def _check_framing(headers: dict[str, list[str]], old_http: bool) -> None:
    if "host" not in headers and not old_http:
        raise _Refused(400, "the header field host is missing")
    if "transfer-encoding" in headers and "content-length" in headers:
        raise _Refused(400, "content-length beside transfer-encoding is not accepted")
    if not _DIGITS.fullmatch(headers.get("content-length", ["0"])[0]):
        raise _Refused(400, "the header field content-length is not a number")


def _split_target(target: str) -> tuple[str, str]:
    absolute = _ABSOLUTE_FORM.match(target)
    if absolute is not None:
        target = target[absolute.end() :]
        if not target.startswith("/"):
            target = "/" + target
    if not target.startswith("/") or "#" in target:
        raise _Refused(400, "the request target is not a path")
    path, _, query = target.partition("?")
    return _unescape(path, "the path"), query


def _find_route(path: str, assets: Collection[str]) -> tuple[Route, str]:
    fixed = _FIXED_ROUTES.get(path)
    if fixed is not None:
        return fixed, ""
    if path.startswith(_SESSION_PREFIX):
        session_id = path[len(_SESSION_PREFIX) :]
        if "/" in session_id:
            raise _Refused(404, "there is nothing at this path")
        if not _SESSION_ID.fullmatch(session_id):
            raise _Refused(400, _SESSION_RULE)
        return "session", session_id
    if path in assets:
        return "asset", ""
    raise _Refused(404, "there is nothing at this path")


def _parse_query(query: str) -> dict[str, list[str]]:
    fields: dict[str, list[str]] = {}
    for part in query.split("&"):
        if part:
            name, _, value = part.partition("=")
            fields.setdefault(_unescape(name.replace("+", " "), "the query"), []).append(
                _unescape(value.replace("+", " "), "the query")
            )
    return fields


def _unescape(text: str, where: str) -> str:
    if "%" not in text:
        return text
    if _BAD_ESCAPE.search(text):
        raise _Refused(400, f"{where} has a % that is no escape")
    raw = _ESCAPES.sub(lambda escape: bytes((int(escape[1], 16),)), text.encode("ascii"))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refused(400, f"{where} is not UTF-8") from None


def _one(fields: dict[str, list[str]], name: str) -> str | None:
    values = fields.get(name)
    if values is None:
        return None
    if len(values) > 1:
        raise _Refused(400, f"{name} is repeated")
    return values[0]


def _one_session_id(fields: dict[str, list[str]]) -> str:
    session_id = _one(fields, "session_id")
    if session_id is None or not _SESSION_ID.fullmatch(session_id):
        raise _Refused(400, _SESSION_RULE)
    return session_id


def _parse_events(fields: dict[str, list[str]]) -> frozenset[str]:
    names = frozenset(name.strip() for name in (_one(fields, "events") or "").split(",") if name.strip())
    if "all" in names:
        names = (names - {"all"}) | EVENTS
    if not names <= EVENTS:
        raise _Refused(400, "events: a comma list of state, progress, or all is accepted")
    return names


def _parse_last_seq(fields: dict[str, list[str]]) -> int | None:
    raw = _one(fields, "last_seq")
    if raw is None:
        return None
    if not _DIGITS.fullmatch(raw):
        raise _Refused(400, "last_seq: a whole number from 0 is accepted")
    return int(raw)


def _check_upgrade(headers: dict[str, list[str]], method: str, old_http: bool) -> None:
    wanted = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))
    upgrade = _list_of(headers, "upgrade")
    if method != "GET" or old_http or upgrade != ["websocket"] or "upgrade" not in _list_of(headers, "connection"):
        raise _Refused(426, "/orchestrate is a WebSocket endpoint", *wanted)
    if headers.get("sec-websocket-version") != ["13"]:
        raise _Refused(426, "only WebSocket version 13 is spoken here", *wanted)


def _list_of(headers: dict[str, list[str]], name: str) -> list[str]:
    return [part.strip().lower() for value in headers.get(name, ()) for part in value.split(",") if part.strip()]


def _websocket_key(headers: dict[str, list[str]]) -> bytes:
    key = headers.get("sec-websocket-key", [""])[0].encode("latin-1")
    try:
        usable = len(base64.b64decode(key, validate=True)) == 16
    except binascii.Error:
        usable = False
    if not usable:
        raise _Refused(400, "sec-websocket-key: 16 bytes in base64 are accepted")
    return key


def _bearer_subprotocol(headers: dict[str, list[str]]) -> str | None:
    for value in headers.get("sec-websocket-protocol", ()):
        for part in value.split(","):
            name = part.strip()
            if name.startswith(BEARER_SUBPROTOCOL) and _TOKEN.fullmatch(name):
                return name
    return None


def _find_token(headers: dict[str, list[str]], fields: dict[str, list[str]], subprotocol: str | None) -> str | None:
    scheme, _, credential = headers.get("authorization", [""])[0].partition(" ")
    if scheme.lower() == "bearer" and credential.strip():
        return credential.strip()
    if subprotocol is not None:
        return subprotocol[len(BEARER_SUBPROTOCOL) :]
    return _one(fields, "token") or None
