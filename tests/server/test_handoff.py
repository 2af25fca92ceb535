"""Descriptors over a socket pair: what goes in comes out, or stays the sender's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from orchestrator.server.handoff import MAX_REST_BYTES, MAX_WAIT_NS, offer, take
from orchestrator.server.head import MAX_HEAD_BYTES

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield sender, receiver
    sender.close()
    receiver.close()


@pytest.fixture
def client_and_server() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    yield client, server
    client.close()
    server.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_connection_lives_on_in_the_receiver(pair, client_and_server):
    client, server = client_and_server
    assert offer(pair[0], server.fileno(), server.family, HEAD, b"rest", hops=1, now_ns=5)
    server.close()
    handed = take(pair[1], now_ns=6)
    assert handed is not None
    assert (handed.head, handed.rest, handed.hops) == (HEAD, b"rest", 1)
    handed.sock.sendall(b"hello")
    assert client.recv(5) == b"hello"
    assert os.get_inheritable(handed.sock.fileno()) is False
    handed.sock.close()
    assert client.recv(1) == b""


def test_the_largest_head_and_rest(pair, client_and_server):
    server = client_and_server[1]
    head, rest = b"h" * MAX_HEAD_BYTES, b"r" * MAX_REST_BYTES
    assert offer(pair[0], server.fileno(), server.family, head, rest, hops=0, now_ns=0)
    handed = take(pair[1], now_ns=0)
    assert handed is not None
    assert (handed.head, handed.rest) == (head, rest)
    handed.sock.close()


def test_nothing_waits(pair):
    assert take(pair[1], now_ns=0) is None


def test_a_full_queue_leaves_the_connection_with_the_sender(pair, client_and_server):
    server = client_and_server[1]
    sent = 0
    while offer(pair[0], server.fileno(), server.family, HEAD, b"", hops=0, now_ns=0):
        sent += 1
        assert sent < 100_000
    server.getpeername()
    before = open_descriptors()
    received = 0
    while (handed := take(pair[1], now_ns=0)) is not None:
        handed.sock.close()
        received += 1
    assert received == sent > 0
    assert open_descriptors() == before


def test_without_a_receiver_the_offer_fails(pair, client_and_server):
    pair[1].close()
    server = client_and_server[1]
    assert offer(pair[0], server.fileno(), server.family, HEAD, b"", hops=0, now_ns=0) is False


def test_a_connection_that_waited_too_long_is_dropped(pair, client_and_server):
    client, server = client_and_server
    before = open_descriptors()
    assert offer(pair[0], server.fileno(), server.family, HEAD, b"", hops=0, now_ns=0)
    server.close()
    assert take(pair[1], now_ns=MAX_WAIT_NS + 1) is None
    assert client.recv(1) == b""
    assert open_descriptors() == before - 1


@pytest.mark.parametrize("packet", [b"x", b"\x00" * 13, b"\xff" * 40])
def test_a_packet_that_is_no_hand_off_is_dropped(pair, packet, client_and_server):
    server = client_and_server[1]
    before = open_descriptors()
    pair[0].send(packet)
    socket.send_fds(pair[0], [packet], [server.fileno(), server.fileno()])
    assert take(pair[1], now_ns=0) is None
    assert open_descriptors() == before
