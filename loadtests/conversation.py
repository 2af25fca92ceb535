"""One WebSocket conversation under gevent: websocket-client, with a greenlet that reads."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import gevent  # type: ignore[import-untyped]
import websocket
from gevent.queue import Empty, Queue  # type: ignore[import-untyped]

QUESTIONS = (
    "what are the admission requirements",
    "when do i have to send the forms",
    "which language certificate do i need",
    "how can i reach the office today",
    "is there a deadline for international students",
)
_WORDS_PER_SECOND = 6.0
_LAST_PARTIAL_S = 0.150


class Failed(Exception):
    """Something the protocol does not allow, or that took too long."""


class Conversation:
    """A connected session. Messages come with the time they were received (perf_counter, seconds)."""

    def __init__(self, host: str, session_id: str, timeout_s: float = 10.0) -> None:
        base = host.rstrip("/").replace("http://", "ws://").replace("https://", "wss://")
        self.session_id = session_id
        self.audio_bytes = 0
        self.first_audio_at = 0.0
        self.last_audio_at = 0.0
        self._closing = False
        self._messages = Queue()
        self._ws: Any = websocket.create_connection(
            f"{base}/orchestrate?session_id={quote(session_id)}",
            timeout=timeout_s,
            skip_utf8_validation=True,
        )
        self._ws.settimeout(None)
        self._reader = gevent.spawn(self._read)
        self.greeting = self.expect("connected", timeout_s)[1]

    def _read(self) -> None:
        try:
            while True:
                opcode, data = self._ws.recv_data()
                now = time.perf_counter()
                if opcode == websocket.ABNF.OPCODE_BINARY:
                    self.audio_bytes += len(data)
                    self.first_audio_at = self.first_audio_at or now
                    self.last_audio_at = now
                elif opcode == websocket.ABNF.OPCODE_TEXT:
                    self._messages.put((now, json.loads(data)))
                elif opcode == websocket.ABNF.OPCODE_CLOSE:
                    code = int.from_bytes(data[:2], "big") if len(data) >= 2 else 1005
                    self._messages.put(Failed(f"closed with {code}"))
                    return
        except (websocket.WebSocketException, OSError, ValueError) as error:
            if not self._closing:
                self._messages.put(Failed(f"{type(error).__name__}: {error}"))

    def send(self, kind: str, **fields: object) -> None:
        try:
            self._ws.send(json.dumps({"type": kind, "session_id": self.session_id, **fields}))
        except (websocket.WebSocketException, OSError) as error:
            raise Failed(f"{type(error).__name__}: {error}") from None

    def messages(self, timeout_s: float) -> Iterator[tuple[float, dict[str, Any]]]:
        """What comes, one by one. Raises Failed after `timeout_s` in all, or when the connection ends."""
        give_up = time.perf_counter() + timeout_s
        while True:
            try:
                item = self._messages.get(timeout=max(0.0, give_up - time.perf_counter()))
            except Empty:
                raise Failed(f"nothing more within {timeout_s:g} s") from None
            if isinstance(item, Failed):
                raise item
            yield item

    def expect(self, kind: str, timeout_s: float) -> tuple[float, dict[str, Any]]:
        """The next message of that type. Raises Failed for an `error` message or after `timeout_s`."""
        for at, message in self.messages(timeout_s):
            if message["type"] == kind:
                return at, message
            if message["type"] == "error":
                raise Failed(f"error {message.get('code')}: {message.get('message')}")
        raise AssertionError("unreachable")

    def say(self, text: str) -> float:
        """Speaks: growing partials, then the final fragment and `vad_end`. Returns when `vad_end` was meant for."""
        words = text.split()
        start = time.perf_counter()
        end = start + (len(words) - 1) / _WORDS_PER_SECOND + _LAST_PARTIAL_S
        for count in range(1, len(words) + 1):
            _sleep_until(start + (count - 1) / _WORDS_PER_SECOND)
            self.send("stt_fragment", text=" ".join(words[:count]), is_final=False)
        _sleep_until(end)
        self.first_audio_at = 0.0
        self.audio_bytes = 0
        self.send("stt_fragment", text=text, is_final=True)
        self.send("vad_end", confidence=0.95)
        return end

    def drop(self) -> None:
        """Goes away without a word."""
        self._closing = True
        self._ws.shutdown()
        self._reader.kill()

    def close(self) -> None:
        """Says goodbye first."""
        self._closing = True
        with contextlib.suppress(websocket.WebSocketException, OSError):
            self._ws.send_close()
        self._ws.shutdown()
        self._reader.kill()


def _sleep_until(when: float) -> None:
    gevent.sleep(max(0.0, when - time.perf_counter()))
