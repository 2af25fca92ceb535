"""Handing an accepted connection to the worker that owns its session.

The descriptor goes over the slot's SEQPACKET socket with SCM_RIGHTS, together with the request head that was already
read from it and whatever followed; nothing is proxied afterwards. The sender then drops its own descriptor without a
`shutdown`, so the client notices nothing.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from orchestrator.server.head import MAX_HEAD_BYTES

MAX_REST_BYTES: Final = 16_384
"""What may follow the head before the handshake is answered; a client has no reason to send anything."""

MAX_WAIT_NS: Final = 5_000_000_000
"""A connection that waited longer for its worker is dropped: its client has given up."""

_HEADER = struct.Struct("!BBBqH")
_MAX_PACKET = _HEADER.size + MAX_HEAD_BYTES + MAX_REST_BYTES
_FD_BYTES = array.array("i").itemsize
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_RECEIVE_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


class Kind(IntEnum):
    """What is handed over."""

    REQUEST = 1


@dataclass(frozen=True, slots=True)
class Handed:
    """A connection taken over: the socket, the complete request head, and the bytes read after it.

    `hops` counts how often it was handed on.
    """

    sock: socket.socket
    head: bytes
    rest: bytes
    hops: int


def offer(sender: socket.socket, fd: int, family: int, head: bytes, rest: bytes, *, hops: int, now_ns: int) -> bool:
    """Queue the connection `fd` for the worker behind `sender`; never blocks.

    False when its queue is full or nobody will ever read it; the connection is then still the caller's. After True the
    caller closes its own descriptor.
    """
    header = _HEADER.pack(Kind.REQUEST, hops, family, now_ns, len(head))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
    try:
        sender.sendmsg([header, head, rest], rights, _SEND_FLAGS)
    except OSError:
        return False
    return True


def take(receiver: socket.socket, now_ns: int) -> Handed | None:
    """The next connection that waits behind `receiver`, or None when none does; never blocks."""
    while True:
        try:
            packet, ancillary, flags, _ = receiver.recvmsg(_MAX_PACKET, socket.CMSG_SPACE(_FD_BYTES), _RECEIVE_FLAGS)
        except BlockingIOError:
            return None
        fds = _descriptors(ancillary)
        if not packet and not fds:
            return None
        handed = _unpack(packet, fds, now_ns) if not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) else None
        if handed is not None:
            return handed
        for fd in fds:
            os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    return list(fds)


def _unpack(packet: bytes, fds: list[int], now_ns: int) -> Handed | None:
    if len(fds) != 1 or len(packet) < _HEADER.size:
        return None
    kind, hops, family, sent_ns, head_length = _HEADER.unpack_from(packet)
    if kind != Kind.REQUEST or now_ns - sent_ns > MAX_WAIT_NS:
        return None
    end = _HEADER.size + head_length
    sock = socket.socket(family, socket.SOCK_STREAM, 0, fileno=fds[0])
    return Handed(sock, packet[_HEADER.size : end], packet[end:], hops)
