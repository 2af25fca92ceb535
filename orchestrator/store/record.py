"""What the store keeps of a session, and its JSON form."""

from __future__ import annotations

import msgspec

RECORD_VERSION = 1
"""Raised only when a reader of the old layout would misread the new one; added fields do not raise it."""


class HistoryEntry(msgspec.Struct, frozen=True):
    """One thing that was said and heard. `role` is `user` or `assistant`."""

    role: str
    text: str
    turn_number: int = 0


class SessionRecord(msgspec.Struct, kw_only=True):
    """A session at one moment. `created_at` and `updated_at` are Unix seconds.

    `utterance` holds the fixed pieces of what the user is saying and `partial` the piece still open; `seq` is the
    number of the last message sent. `epoch` is the fencing number of the ownership that wrote the record. It stands
    before everything a user can fill, because the fenced write looks for it in the first bytes of the stored JSON.
    """

    version: int = RECORD_VERSION
    session_id: str
    epoch: int = 0
    state: str = "IDLE"
    turn_number: int = 0
    seq: int = 0
    created_at: float = 0.0
    updated_at: float = 0.0
    utterance: list[str] = []
    partial: str = ""
    history: list[HistoryEntry] = []


class ForeignRecord(ValueError):
    """A stored value that is no record of this session."""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(SessionRecord)


def encode_record(record: SessionRecord) -> bytes:
    """The record as JSON."""
    return _encoder.encode(record)


def decode_record(session_id: str, value: bytes) -> SessionRecord:
    """The record in `value`. Raises ForeignRecord for anything that is not a record of `session_id`."""
    try:
        record = _decoder.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ForeignRecord(f"not a session record: {error}") from None
    if record.version != RECORD_VERSION:
        raise ForeignRecord(f"record version {record.version}; this program reads {RECORD_VERSION}")
    if record.session_id != session_id:
        raise ForeignRecord("a record of another session")
    return record
