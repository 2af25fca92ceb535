"""A connection's write queue: everything in order, audio out again on demand, the size always true."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.server.write_queue import WriteQueue
from orchestrator.wire.frames import binary_frame_header, text_frame_header

PIECES = st.tuples(st.sampled_from(["raw", "text", "audio", "drop", "take"]), st.binary(min_size=1, max_size=200))


@given(st.lists(PIECES, max_size=30))
def test_it_holds_what_a_list_of_frames_would(steps: list[tuple[str, bytes]]) -> None:
    queue = WriteQueue()
    expected: list[tuple[str, bytes]] = []
    for kind, data in steps:
        if kind == "raw":
            queue.add(data)
            expected.append((kind, data))
        elif kind == "text":
            queue.add_text(data)
            expected.append((kind, text_frame_header(len(data)) + data))
        elif kind == "audio":
            queue.add_audio(memoryview(data))
            expected.append((kind, binary_frame_header(len(data)) + data))
        elif kind == "drop":
            queue.drop_audio()
            expected = [piece for piece in expected if piece[0] != "audio"]
        else:
            assert queue.take() == b"".join(piece for _, piece in expected)
            expected = []
        assert queue.size == sum(len(piece) for _, piece in expected)
        assert bool(queue) is bool(expected)
    assert queue.take() == b"".join(piece for _, piece in expected)
