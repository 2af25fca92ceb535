"""What a session says to its client: numbered messages, the few last ones kept for a reconnect."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from orchestrator.wire.messages import encode_message

MESSAGES_KEPT = 64
"""Text messages kept for a reconnect with `last_seq`: several turns' worth."""


class Link(Protocol):
    """A session's live connection; everything queued in one loop tick leaves in one write."""

    connection_id: str

    @property
    def writable(self) -> bool:
        """False while the transport's buffer is over its limit."""
        ...

    def send_text(self, payload: bytes) -> None:
        """Queue a JSON text frame."""
        ...

    def send_audio(self, pcm: bytes | memoryview) -> None:
        """Queue a binary frame."""
        ...

    def flush(self) -> None:
        """Write what is queued now."""
        ...

    def drop_audio(self) -> None:
        """Forget the binary frames that are queued and not yet written."""
        ...

    def close(self, code: int, reason: str) -> None:
        """Start the closing handshake; more calls change nothing."""
        ...


class Outbox:
    """Numbers, encodes and sends; without a link messages are dropped, since a client learns the state on reconnect."""

    __slots__ = ("_sent", "_session_id", "_wall", "events", "link", "seq")

    def __init__(self, session_id: str, wall: Callable[[], float]) -> None:
        self._session_id = session_id
        self._wall = wall
        self._sent: deque[tuple[int, bytes]] | None = None
        self.seq = 0
        self.link: Link | None = None
        self.events: frozenset[str] = frozenset()

    @property
    def writable(self) -> bool:
        return self.link is not None and self.link.writable

    def send(self, kind: str, **fields: Any) -> None:
        """One message of the protocol, with the next `seq`."""
        if self.link is None:
            return
        self.seq += 1
        payload = encode_message(kind, self._session_id, self.seq, self._wall(), fields)
        if self._sent is None:
            self._sent = deque(maxlen=MESSAGES_KEPT)
        self._sent.append((self.seq, payload))
        self.link.send_text(payload)

    def error(self, code: str, message: str, retryable: bool, turn_number: int | None = None) -> None:
        """A non-fatal `error`."""
        fields: dict[str, Any] = {"code": code, "message": message, "fatal": False, "retryable": retryable}
        if turn_number is not None:
            fields["turn_number"] = turn_number
        self.send("error", **fields)

    def notice(self, code: str, message: str) -> None:
        """Nothing wrong, nothing done."""
        self.send("notice", code=code, message=message)

    def missed_since(self, last_seq: int) -> list[bytes]:
        """The kept messages after `last_seq`, as they were sent."""
        return [payload for seq, payload in self._sent or () if seq > last_seq]

    def send_audio(self, pcm: bytes | memoryview) -> None:
        if self.link is not None:
            self.link.send_audio(pcm)

    def drop_audio(self) -> None:
        if self.link is not None:
            self.link.drop_audio()

    def flush(self) -> None:
        if self.link is not None:
            self.link.flush()

    def close(self, code: int, reason: str) -> None:
        if self.link is not None:
            self.link.close(code, reason)
