"""Line splitting and server-sent events: the same, however the bytes are cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.downstream.sse import LineSplitter, LineTooLong, SseParser

LIMIT = 64

LINES = st.sampled_from(
    [b"", b"", b"data: a", b"data:b", b"data:  c", b"data", b"data: [DONE]", b": comment", b"event: error", b"id: 7",
     b"retry: 10", b"datax: no", b"data\xff: no", b"data: \xc3\xa9", b"x" * 20]
)  # fmt: skip
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
STREAMS = st.lists(st.tuples(LINES, ENDS), max_size=20).map(lambda rows: b"".join(a + b for a, b in rows))


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return [*pieces, data[at:]]


def events_of(pieces: list[bytes]) -> list[bytes]:
    parser = SseParser(LIMIT)
    return [event for piece in pieces for event in parser.feed(piece)]


def expected_events(data: bytes) -> list[bytes]:
    """The standard's algorithm on the whole text at once."""
    events: list[bytes] = []
    pending: list[bytes] = []
    data = data.removeprefix(b"\xef\xbb\xbf")
    lines = re.split(rb"\r\n|\n|\r", data)[:-1]
    for line in lines:
        if not line:
            if pending:
                events.append(b"\n".join(pending))
            pending = []
            continue
        name, _, value = line.partition(b":")
        if name == b"data":
            pending.append(value.removeprefix(b" "))
    return events


@given(STREAMS, st.lists(st.integers(0, 12)), st.booleans())
def test_any_cutting_gives_the_standards_events(data: bytes, sizes: list[int], mark: bool) -> None:
    if mark:
        # The mark's three bytes must arrive in one piece with what follows only if the cutting says so.
        data = b"\xef\xbb\xbf" + data
    assert events_of(cut(data, sizes)) == expected_events(data)


@given(STREAMS)
def test_event_by_event_is_the_same(data: bytes) -> None:
    pieces = [piece for piece in re.split(rb"(?<=\n\n)", data) if piece]
    assert events_of(pieces) == events_of([data]) == expected_events(data)


@given(STREAMS)
def test_byte_by_byte_is_the_same(data: bytes) -> None:
    assert events_of([data[i : i + 1] for i in range(len(data))]) == events_of([data])


@given(st.binary(max_size=300), st.lists(st.integers(0, 40)))
def test_any_bytes_give_events_or_the_one_error(data: bytes, sizes: list[int]) -> None:
    outcomes = []
    for pieces in (cut(data, sizes), [data]):
        try:
            outcomes.append(events_of(pieces))
        except LineTooLong:
            outcomes.append([b"too long"])
    if b"too long" not in outcomes[0]:
        assert outcomes[0] == outcomes[1]


@given(st.binary(max_size=200), st.lists(st.integers(0, 20)))
def test_lines_are_those_of_the_whole(data: bytes, sizes: list[int]) -> None:
    splitter = LineSplitter(1000)
    lines = [line for piece in cut(data, sizes) for line in splitter.feed(piece)]
    assert [*lines, splitter.finish()] == re.split(rb"\r\n|\n|\r", data)


@pytest.mark.parametrize("data", [b"data: " + b"x" * LIMIT, b"data: x\n" * LIMIT, b"x" * (LIMIT + 1)])
def test_neither_a_line_nor_an_event_grows_without_limit(data: bytes) -> None:
    parser = SseParser(LIMIT)
    with pytest.raises(LineTooLong):
        for _ in range(3):
            parser.feed(data)


def test_an_event_ended_by_the_streams_end_counts() -> None:
    parser = SseParser(LIMIT)
    assert parser.feed(b"data: a\n\ndata: [DONE]") == [b"a"]
    assert parser.finish() == [b"[DONE]"]
    assert parser.finish() == []
