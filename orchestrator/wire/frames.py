"""Server-to-client WebSocket data frames (RFC 6455 section 5.2): unmasked, unfragmented, no extensions."""

from __future__ import annotations

import struct

_TEXT = 0x81
_BINARY = 0x82
_MEDIUM = struct.Struct("!BBH").pack
_LONG = struct.Struct("!BBQ").pack


def text_frame_header(length: int) -> bytes:
    """The header of a final text frame with `length` payload bytes."""
    return _header(_TEXT, length)


def binary_frame_header(length: int) -> bytes:
    """The header of a final binary frame with `length` payload bytes."""
    return _header(_BINARY, length)


def _header(first: int, length: int) -> bytes:
    if length < 126:
        return bytes((first, length))
    if length < 65_536:
        return _MEDIUM(first, 126, length)
    return _LONG(first, 127, length)
