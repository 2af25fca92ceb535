"""Incremental parsing of line-based streams: server-sent events and newline-delimited JSON. Pure."""

from __future__ import annotations

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineTooLong(ValueError):
    """A line, or the data of one event, is longer than accepted."""


class LineSplitter:
    """Splits bytes into lines ended by LF, CRLF or CR, however they are cut into chunks. `max_bytes` bounds a line."""

    __slots__ = ("_after_cr", "_max_bytes", "_tail")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._tail = b""
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their ends. Raises LineTooLong."""
        if self._after_cr and data:
            self._after_cr = False
            if data[0] == 0x0A:
                data = data[1:]
        if b"\r" in data:
            self._after_cr = data[-1] == 0x0D
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = data.split(b"\n")
        if self._tail:
            lines[0] = self._tail + lines[0]
        self._tail = lines.pop()
        limit = self._max_bytes
        if len(self._tail) > limit:
            raise LineTooLong(f"a line of more than {limit} bytes")
        for line in lines:
            if len(line) > limit:
                raise LineTooLong(f"a line of more than {limit} bytes")
        return lines

    @property
    def between_lines(self) -> bool:
        """Nothing is held back: what comes next begins a line."""
        return not self._tail and not self._after_cr

    def finish(self) -> bytes:
        """The last line, where the stream ended without ending it."""
        tail, self._tail = self._tail, b""
        return tail


class SseParser:
    """The `data` of server-sent events (WHATWG HTML, section 9.2.6), independent of how the bytes are cut.

    Event names, ids, retry times and comments are dropped: a completion stream says everything in its data. `max_bytes`
    bounds a line and an event's data.
    """

    __slots__ = ("_data", "_lines", "_max_bytes", "_size", "_start")

    def __init__(self, max_bytes: int) -> None:
        self._lines = LineSplitter(max_bytes)
        self._max_bytes = max_bytes
        self._data: list[bytes] = []
        self._size = 0
        self._start = True

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that `data` completes. Raises LineTooLong."""
        if self._lines.between_lines and not self._data and _is_one_event(data, self._max_bytes):
            self._start = False
            return [data[6:-2]]
        events: list[bytes] = []
        for line in self._lines.feed(data):
            self._line(line, events)
        return events

    def finish(self) -> list[bytes]:
        """The event that the stream's end cut off before its blank line, if there is one.

        The standard drops it; some services end on `data: [DONE]` without a blank line, and mean it.
        """
        events: list[bytes] = []
        self._line(self._lines.finish(), events)
        self._line(b"", events)
        return events

    def _line(self, line: bytes, events: list[bytes]) -> None:
        if self._start:
            self._start = False
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line:
            if self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
                self._size = 0
        elif line.startswith(b"data:"):
            value = line[6:] if line[5:6] == b" " else line[5:]
            self._size += len(value) + 1
            if self._size > self._max_bytes + 1:
                raise LineTooLong(f"an event of more than {self._max_bytes} bytes")
            self._data.append(value)
        elif line == b"data":
            self._size += 1
            self._data.append(b"")


def _is_one_event(data: bytes, max_bytes: int) -> bool:
    """Whether `data` is just one event of one line, as it is when a token comes by itself."""
    return (
        data.endswith(b"\n\n")
        and data.startswith(b"data: ")
        and data.count(b"\n") == 2
        and b"\r" not in data
        and len(data) <= max_bytes
    )
