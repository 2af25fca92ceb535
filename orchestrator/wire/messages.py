"""Messages of the client's WebSocket: typed decoding of what comes in, encoding of what goes out.

orjson frames both directions; msgspec checks the types of inbound messages, so nothing behind this module checks again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import orjson

from orchestrator.errors import BadMessage

PROTOCOL_VERSION = 1
MAX_TEXT_BYTES = 4096

Confidence = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
SessionId = Annotated[str, msgspec.Meta(max_length=128)]


class _Inbound(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    session_id: SessionId | None = None


class SttFragment(_Inbound, frozen=True, tag="stt_fragment", kw_only=True):
    """A piece of transcript. `timestamp` is Unix seconds of the receipt of the audio that led to it."""

    text: str
    is_final: bool = False
    timestamp: float | None = None
    mode: Literal["replace", "append"] | None = None


class VadEnd(_Inbound, frozen=True, tag="vad_end", kw_only=True):
    """The user's turn is over."""

    confidence: Confidence = 1.0
    timestamp: float | None = None


class UserSpeaking(_Inbound, frozen=True, tag="user_speaking", kw_only=True):
    """Voice activity; a barge-in if the agent is speaking."""

    confidence: Confidence = 1.0
    timestamp: float | None = None


class PlaybackReport(_Inbound, frozen=True, tag="playback", kw_only=True):
    """What the client has really played of a turn, in milliseconds."""

    turn_number: Annotated[int, msgspec.Meta(ge=0)]
    played_ms: Annotated[float, msgspec.Meta(ge=0.0, le=86_400_000.0)]
    ended: bool = False


class Cancel(_Inbound, frozen=True, tag="cancel", kw_only=True):
    """Stop this turn."""


class Ping(_Inbound, frozen=True, tag="ping", kw_only=True):
    """Answered by `pong` with the same `id`."""

    id: Annotated[str, msgspec.Meta(max_length=128)] | int | None = None


Inbound = SttFragment | VadEnd | UserSpeaking | PlaybackReport | Cancel | Ping
INBOUND_TYPES = ("stt_fragment", "vad_end", "user_speaking", "playback", "cancel", "ping")


def decode_message(frame: bytes | bytearray | memoryview, session_id: str) -> Inbound:
    """The message in a text frame.

    Raises BadMessage with one line that names what is wrong: no JSON object, an unknown type, a field of a wrong type
    or out of range, or a `session_id` that is not the connection's own.
    """
    try:
        fields = orjson.loads(frame)
    except orjson.JSONDecodeError as error:
        raise BadMessage(f"the frame is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadMessage("the frame is not a JSON object with a 'type'")
    try:
        message: Inbound = msgspec.convert(fields, Inbound)
    except msgspec.ValidationError as error:
        raise BadMessage(_explain(fields, str(error))) from None
    if message.session_id is not None and message.session_id != session_id:
        raise BadMessage("session_id is not this connection's own")
    if type(message) is SttFragment and len(message.text) * 4 > MAX_TEXT_BYTES:
        size = len(message.text.encode())
        if size > MAX_TEXT_BYTES:
            raise BadMessage(f"text has {size} bytes; at most {MAX_TEXT_BYTES} are accepted")
    return message


def _explain(fields: dict[str, Any], error: str) -> str:
    kind = fields.get("type")
    if kind not in INBOUND_TYPES:
        shown = repr(kind)[:80] if "type" in fields else "no 'type'"
        return f"unknown message type: {shown}; accepted are {', '.join(INBOUND_TYPES)}"
    _, _, path = error.rpartition("`$.")
    name = path.rstrip("`")
    shown = f" (got {repr(fields[name])[:80]})" if name in fields else ""
    return f"{kind}: {error}{shown}"


def encode_message(kind: str, session_id: str, seq: int, timestamp: float, fields: dict[str, Any]) -> bytes:
    """The JSON text of an outbound message. `timestamp` is Unix seconds."""
    return orjson.dumps({"type": kind, "session_id": session_id, "seq": seq, "timestamp": timestamp, **fields})
