"""One client's WebSocket: frames in, messages to the session; the session's messages out, joined per loop tick.

The `websockets` engine parses, checks and answers control frames. Data frames to the client need none of it: they have
a fixed header and are encoded here. The connection knows nothing of turns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from websockets.frames import Frame, Opcode
from websockets.protocol import SERVER, State
from websockets.protocol import Protocol as Engine

from orchestrator.conversation.registry import ConnectQuery
from orchestrator.errors import BadMessage
from orchestrator.server import limits
from orchestrator.server.limits import TokenBucket
from orchestrator.server.wheel import NOT_SCHEDULED
from orchestrator.server.write_queue import WriteQueue
from orchestrator.wire.messages import decode_message

if TYPE_CHECKING:
    from orchestrator.conversation.session import Session
    from orchestrator.server.hub import Hub

UNSUPPORTED_DATA: Final = 1003
INVALID_DATA: Final = 1007
POLICY_VIOLATION: Final = 1008
TOO_BIG: Final = 1009
INTERNAL_ERROR: Final = 1011
BAD_MESSAGES: Final = 4400
TOKEN_EXPIRED: Final = 4401
NOT_READING: Final = 4408
TOO_MANY_MESSAGES: Final = 4429

log = logging.getLogger(__name__)
# The engine reports every opened and closed connection at INFO.
_engine_log = logging.getLogger("orchestrator.server.engine")
_engine_log.setLevel(logging.WARNING)


class Connection(asyncio.Protocol):
    """The session's Link. Made when the request is admitted; `begin` starts it on its transport."""

    __slots__ = (
        "_bad_messages", "_closing", "_control_frames", "_early", "_end_stream", "_engine", "_flush_due",
        "_fragments", "_hub", "_last_received", "_left", "_messages", "_opening", "_out", "_ping_payload",
        "_ping_sent_at", "_pings", "_query", "_receiving", "_session", "_transport", "_write_paused",
        "connection_id", "session_id", "wheel_tick",
    )  # fmt: skip

    def __init__(self, hub: Hub, session_id: str, query: ConnectQuery, connection_id: str) -> None:
        now = hub.loop.time()
        self.connection_id = connection_id
        self.session_id = session_id
        self.wheel_tick = NOT_SCHEDULED
        self._hub = hub
        self._query = query
        self._engine = Engine(SERVER, state=State.OPEN, max_size=hub.settings.max_message_bytes, logger=_engine_log)
        self._transport: asyncio.Transport | None = None
        self._session: Session | None = None
        self._early: bytes | None = None
        self._opening = True
        self._closing = False
        self._left = False
        self._receiving = False
        self._out = WriteQueue()
        self._flush_due = False
        self._end_stream = False
        self._write_paused = False
        self._fragments: tuple[Opcode, list[bytes | bytearray]] | None = None
        self._messages = TokenBucket(limits.MESSAGES_PER_SECOND, limits.MESSAGE_BURST, now)
        self._control_frames: TokenBucket | None = None
        self._bad_messages = 0
        self._last_received = now
        self._pings = 0
        self._ping_payload: bytes | None = None
        self._ping_sent_at = 0.0

    # The transport's side.

    def begin(self, transport: asyncio.Transport, handshake: bytes, rest: bytes) -> None:
        """Answer the handshake and open the session; `rest` is what the client sent after its request head."""
        self._transport = transport
        self._hub.transports.change(1)
        transport.set_write_buffer_limits(high=limits.WRITE_HIGH_WATER, low=limits.WRITE_LOW_WATER)
        self._early = rest or None
        self._out.add(handshake)
        self._hub.enter(self)
        self._hub.spawn(self._open())
        # After the task's first step: a session that is in memory says `connected` in the same write.
        self._flush_soon()
        first_wake = self._hub.first_ping_delay()
        if self._query.token_expires_at is not None:
            first_wake = min(first_wake, self._query.token_expires_at - time.time())
        self._hub.wheel.schedule(self, self._last_received + first_wake)

    async def _open(self) -> None:
        try:
            session = await self._hub.sessions.open(self.session_id, self, self._query)
        except Exception:
            log.exception("session could not be opened", extra={"session_id": self.session_id})
            self._opening = False
            self._fail(INTERNAL_ERROR, "the session could not be opened")
            return
        self._opening = False
        self._session = session
        if self._left:
            session.detach(self)
            self._session = None
        early, self._early = self._early, None
        if self._transport is not None:
            self._transport.resume_reading()
            if early:
                self.data_received(early)

    def data_received(self, data: bytes) -> None:
        if self._opening:
            # Nothing is lost and nothing piles up: one read at most, the rest waits in the kernel.
            self._early = data if self._early is None else self._early + data
            if self._transport is not None:
                self._transport.pause_reading()
            return
        self._last_received = self._hub.loop.time()
        engine = self._engine
        engine.receive_data(data)
        if engine.events:
            self._receiving = True
            try:
                for frame in engine.events_received():
                    if self._closing:
                        break
                    assert isinstance(frame, Frame)
                    self._take_frame(frame)
            except Exception:
                log.exception("a message broke its session", extra={"session_id": self.session_id})
                self._fail(INTERNAL_ERROR, "internal error")
            finally:
                self._receiving = False
        if engine.writes:
            self._collect()
        if engine.close_sent is not None:
            self._start_closing()
        if self._out or self._end_stream:
            self.flush()

    def eof_received(self) -> None:
        if not self._opening:
            self._engine.receive_eof()
            self._engine.data_to_send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._closing = True
        self._out.clear()
        self._early = None
        self._hub.wheel.cancel(self)
        self._hub.transports.change(-1)
        self._leave()
        # The parser is a generator whose frame refers to the engine: a cycle only the collector would find.
        self._engine.parser.close()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._out or self._end_stream:
            self._flush_soon()
        if self._session is not None and not self._closing:
            try:
                self._session.resume_writing()
            except Exception:
                log.exception("a session failed to go on writing", extra={"session_id": self.session_id})
                self._fail(INTERNAL_ERROR, "internal error")

    # What comes in.

    def _take_frame(self, frame: Frame) -> None:
        opcode = frame.opcode
        if opcode is Opcode.TEXT or opcode is Opcode.BINARY:
            if frame.fin:
                self._take_message(opcode, frame.data)
            else:
                self._fragments = (opcode, [_owned(frame.data)])
        elif opcode is Opcode.CONT:
            self._take_fragment(frame)
        elif opcode is not Opcode.CLOSE:
            self._take_control(frame)

    def _take_fragment(self, frame: Frame) -> None:
        if self._fragments is None:
            return
        opcode, pieces = self._fragments
        pieces.append(_owned(frame.data))
        if frame.fin:
            self._fragments = None
            self._take_message(opcode, b"".join(pieces))
        elif len(pieces) >= limits.MAX_FRAGMENTS:
            self._fail(TOO_BIG, f"a message in more than {limits.MAX_FRAGMENTS} fragments")

    def _take_control(self, frame: Frame) -> None:
        if frame.opcode is Opcode.PONG and self._ping_payload is not None and frame.data == self._ping_payload:
            self._ping_payload = None
            return
        if self._control_frames is None:
            self._control_frames = TokenBucket(
                limits.CONTROL_FRAMES_PER_SECOND, limits.CONTROL_FRAME_BURST, self._last_received
            )
        if not self._control_frames.take(self._last_received):
            self._fail(POLICY_VIOLATION, "too many pings")

    def _take_message(self, opcode: Opcode, data: bytes | bytearray | memoryview) -> None:
        session = self._session
        if session is None:
            return
        if not self._messages.take(self._last_received):
            self._fail(TOO_MANY_MESSAGES, f"over {limits.MESSAGES_PER_SECOND:.0f} messages a second")
            return
        if opcode is Opcode.BINARY:
            if self._hub.sessions.accepts_audio:
                session.receive_audio(bytes(data))
            else:
                self._fail(UNSUPPORTED_DATA, "no speech-to-text service is configured for audio")
            return
        try:
            message = decode_message(data, self.session_id)
        except BadMessage as error:
            self._take_bad_message(session, data, str(error))
            return
        session.receive(message)

    def _take_bad_message(self, session: Session, data: bytes | bytearray | memoryview, reason: str) -> None:
        try:
            bytes(data).decode()
        except UnicodeDecodeError as error:
            self._fail(INVALID_DATA, f"invalid UTF-8 at byte {error.start}")
            return
        session.reject("bad_message", reason)
        self._bad_messages += 1
        if self._bad_messages >= limits.MAX_BAD_MESSAGES:
            self._fail(BAD_MESSAGES, f"{limits.MAX_BAD_MESSAGES} bad messages")

    # The session's side.

    @property
    def writable(self) -> bool:
        """False while the client reads more slowly than we write."""
        return not self._write_paused

    def send_text(self, payload: bytes) -> None:
        """Queue a JSON text frame for this tick's write."""
        if self._closing:
            return
        self._out.add_text(payload)
        self._queued()

    def send_audio(self, pcm: bytes | memoryview) -> None:
        """Queue a binary frame for this tick's write."""
        if self._closing:
            return
        self._out.add_audio(pcm)
        self._queued()

    def drop_audio(self) -> None:
        """Forget the binary frames that were not yet given to the transport."""
        self._out.drop_audio()

    def flush(self) -> None:
        """Give the transport what is queued, in one write; while it is over its limit, keep it here."""
        transport = self._transport
        if transport is None or self._write_paused:
            return
        out = self._out
        if out:
            transport.write(out.take())
        if self._end_stream and not out and not transport.is_closing():
            self._end_stream = False
            transport.write_eof()

    def close(self, code: int, reason: str) -> None:
        """Start the closing handshake; what was queued goes out before the close frame. More calls change nothing."""
        if self._closing or self._transport is None:
            self._closing = True
            return
        if self._engine.state is State.OPEN:
            self._engine.send_close(code, _short(reason))
            self._collect()
        self._start_closing()
        self._flush_soon()

    def on_timer(self, now: float) -> None:
        """The nearest of: end of the closing time, expiry of the token, missing pong, next ping."""
        transport = self._transport
        if transport is None:
            return
        if self._closing:
            transport.abort()
            return
        expires = self._query.token_expires_at
        wait = limits.PING_INTERVAL_S
        if expires is not None:
            wait = min(wait, expires - time.time())
            if wait <= 0.0:
                self.close(TOKEN_EXPIRED, "the token has expired")
                return
        if self._ping_payload is not None:
            if now - self._ping_sent_at >= limits.PONG_TIMEOUT_S:
                self._fail(INTERNAL_ERROR, f"no pong within {limits.PONG_TIMEOUT_S:.0f} s")
                self._flush_soon()
                return
            wait = min(wait, self._ping_sent_at + limits.PONG_TIMEOUT_S - now)
        elif now - self._last_received >= limits.PING_INTERVAL_S - 0.5:
            self._ping(now)
        else:
            wait = min(wait, self._last_received + limits.PING_INTERVAL_S - now)
        self._hub.wheel.schedule(self, now + wait)

    def _ping(self, now: float) -> None:
        self._pings += 1
        self._ping_payload = self._pings.to_bytes(4, "big")
        self._ping_sent_at = now
        self._engine.send_ping(self._ping_payload)
        self._collect()
        self._flush_soon()

    # Common parts.

    def _queued(self) -> None:
        """A frame was queued: see that it goes out, and that a client that does not read costs no more."""
        if self._out.size > limits.MAX_QUEUED_BYTES and self._write_paused:
            self._out.clear()
            self._fail(NOT_READING, "the client does not read")
        if not self._receiving:
            self._flush_soon()

    def _collect(self) -> None:
        """Queue the engine's control frames behind what is queued; an empty chunk means the end of the stream."""
        for chunk in self._engine.data_to_send():
            if chunk:
                self._out.add(chunk)
            else:
                self._end_stream = True

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._hub.loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flush_due = False
        self.flush()

    def _fail(self, code: int, reason: str) -> None:
        """Close because of what the client did or left undone: close frame, end of our stream, no more reading."""
        if self._closing:
            return
        self._engine.fail(code, _short(reason))
        self._collect()
        self._start_closing()
        if not self._receiving:
            self._flush_soon()

    def _start_closing(self) -> None:
        if self._closing:
            return
        self._closing = True
        hub = self._hub
        hub.wheel.schedule(self, hub.loop.time() + limits.CLOSING_TIMEOUT_S)
        # Not at once: the session itself may be in the middle of the call that closes.
        hub.loop.call_soon(self._leave)

    def _leave(self) -> None:
        if self._left:
            return
        self._left = True
        self._hub.leave(self)
        session, self._session = self._session, None
        if session is not None:
            try:
                session.detach(self)
            except Exception:
                log.exception("a session failed to detach", extra={"session_id": self.session_id})


def _short(reason: str) -> str:
    """A close frame carries at most 123 bytes of reason (RFC 6455 section 5.5)."""
    return reason.encode()[:123].decode(errors="ignore")


def _owned(data: bytes | bytearray | memoryview) -> bytes | bytearray:
    return data.tobytes() if isinstance(data, memoryview) else data
