"""What a connection has to write: frames and raw bytes of one loop tick, joined into one write."""

from __future__ import annotations

from orchestrator.wire.frames import binary_frame_header, text_frame_header


class WriteQueue:
    """Bytes in order. `size` is how many; audio can be taken out again as long as it is here."""

    __slots__ = ("_audio_at", "_parts", "size")

    def __init__(self) -> None:
        self._parts: list[bytes | memoryview] = []
        self._audio_at: list[int] | None = None
        self.size = 0

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, data: bytes) -> None:
        """Bytes that are framed already."""
        self._parts.append(data)
        self.size += len(data)

    def add_text(self, payload: bytes) -> None:
        """One text frame."""
        self._add_frame(text_frame_header(len(payload)), payload)

    def add_audio(self, pcm: bytes | memoryview) -> None:
        """One binary frame."""
        if self._audio_at is None:
            self._audio_at = [len(self._parts)]
        else:
            self._audio_at.append(len(self._parts))
        self._add_frame(binary_frame_header(len(pcm)), pcm)

    def drop_audio(self) -> None:
        """Forget the binary frames."""
        if self._audio_at is None:
            return
        for index in reversed(self._audio_at):
            self.size -= len(self._parts[index]) + len(self._parts[index + 1])
            del self._parts[index : index + 2]
        self._audio_at = None

    def take(self) -> bytes:
        """All of it, in one piece; the queue is empty then."""
        data = b"".join(self._parts)
        self.clear()
        return data

    def clear(self) -> None:
        """Forget everything."""
        self._parts.clear()
        self._audio_at = None
        self.size = 0

    def _add_frame(self, header: bytes, payload: bytes | memoryview) -> None:
        self._parts.append(header)
        self._parts.append(payload)
        self.size += len(header) + len(payload)
