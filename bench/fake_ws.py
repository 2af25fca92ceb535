"""The server side of RFC 6455, as much of it as the fake TTS and STT services need."""

from __future__ import annotations

import base64
import hashlib

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def accept_response(key: str) -> bytes:
    """The 101 that answers a handshake with this Sec-WebSocket-Key."""
    accept = base64.b64encode(hashlib.sha1(key.encode("latin-1") + _GUID).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def frame(opcode: int, payload: bytes) -> bytes:
    """One unmasked, final frame."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65_536:
        return b"%c\x7e%s%s" % (0x80 | opcode, size.to_bytes(2, "big"), payload)
    return b"%c\x7f%s%s" % (0x80 | opcode, size.to_bytes(8, "big"), payload)


def masked_frame(opcode: int, payload: bytes) -> bytes:
    """One final client frame. The masking key is zero, so the payload goes out as it is."""
    size = len(payload)
    if size < 126:
        return b"%c%c\0\0\0\0%s" % (0x80 | opcode, 0x80 | size, payload)
    if size < 65_536:
        return b"%c\xfe%s\0\0\0\0%s" % (0x80 | opcode, size.to_bytes(2, "big"), payload)
    return b"%c\xff%s\0\0\0\0%s" % (0x80 | opcode, size.to_bytes(8, "big"), payload)


def unmask(payload: bytes, key: bytes) -> bytes:
    size = len(payload)
    if not size or key == b"\0\0\0\0":
        return payload
    stream = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")).to_bytes(size, "big")


class ClientFrames:
    """Splits what a client sends into `(opcode, payload)`; continuation frames are joined to their first."""

    def __init__(self) -> None:
        self._buffer = b""
        self._parts: list[bytes] = []
        self._opcode = 0

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        buffer = self._buffer + data if self._buffer else data
        frames: list[tuple[int, bytes]] = []
        at = 0
        while True:
            parsed = _split(buffer, at)
            if parsed is None:
                break
            first, payload, at = parsed
            opcode = first & 0x0F
            if opcode >= CLOSE:
                frames.append((opcode, payload))
                continue
            if opcode:
                self._opcode = opcode
            self._parts.append(payload)
            if first & 0x80:
                frames.append((self._opcode, b"".join(self._parts)))
                self._parts.clear()
        self._buffer = buffer[at:]
        return frames


def _split(buffer: bytes, at: int) -> tuple[int, bytes, int] | None:
    """The first byte and payload of the masked frame at `at`, and where the next one starts."""
    if len(buffer) < at + 6:
        return None
    size = buffer[at + 1] & 0x7F
    head = at + 2
    if size == 126:
        size = int.from_bytes(buffer[head : head + 2], "big")
        head += 2
    elif size == 127:
        size = int.from_bytes(buffer[head : head + 8], "big")
        head += 8
    end = head + 4 + size
    if len(buffer) < end:
        return None
    return buffer[at], unmask(buffer[head + 4 : end], buffer[head : head + 4]), end
