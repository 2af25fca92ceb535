from __future__ import annotations

import pytest

from bench.fake_ws import BINARY, PING, TEXT, ClientFrames, masked_frame, unmask


@pytest.mark.parametrize("size", [0, 1, 3, 125, 126, 65_535, 65_536])
def test_client_frames_of_every_length_form_are_unmasked(size: int) -> None:
    payload = bytes(i * 7 & 255 for i in range(size))
    assert ClientFrames().feed(masked_frame(BINARY, payload)) == [(BINARY, payload)]
    key = b"\x01\x80\xff\x10"
    assert unmask(unmask(payload, key), key) == payload


def test_fragmented_message_is_joined_around_a_ping() -> None:
    first = bytes([TEXT]) + masked_frame(TEXT, b"hel")[1:]
    last = bytes([0x80]) + masked_frame(TEXT, b"lo")[1:]
    stream = first + masked_frame(PING, b"p") + last
    parser = ClientFrames()
    found = [each for i in range(len(stream)) for each in parser.feed(stream[i : i + 1])]
    assert found == [(PING, b"p"), (TEXT, b"hello")]
