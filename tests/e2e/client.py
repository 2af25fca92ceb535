"""A client of the wire for end-to-end tests: reads on, remembers what came and when."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed


@dataclass
class Received:
    """One frame: a message, or `audio`. `at` is seconds on the monotonic clock."""

    at: float
    message: dict[str, Any] = field(default_factory=dict)
    audio: bytes = b""

    @property
    def kind(self) -> str:
        return "audio" if self.audio else str(self.message["type"])


class Client:
    """`async with Client(pool.url, "s1") as client`; frames are read in the background."""

    def __init__(self, url: str, session_id: str, query: str = "") -> None:
        self._url = f"{url}?session_id={session_id}{query}"
        self.frames: list[Received] = []
        self.close_code: int | None = None
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Self:
        self.connection: ClientConnection = await connect(
            self._url, max_size=None, compression=None, open_timeout=20, proxy=None
        )
        self._reader = asyncio.create_task(self._read())
        self.greeting = (await self.until("connected")).message
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.connection.close()
        await self._reader

    async def _read(self) -> None:
        try:
            async for frame in self.connection:
                now = time.monotonic()
                self.frames.append(
                    Received(now, audio=frame) if isinstance(frame, bytes) else Received(now, json.loads(frame))
                )
                self._arrived.set()
        except ConnectionClosed:
            pass
        self.close_code = self.connection.close_code
        self._arrived.set()

    async def send(self, kind: str, **fields: Any) -> None:
        await self.connection.send(json.dumps({"type": kind, **fields}))

    async def ask(self, text: str = "What are admission requirements?") -> float:
        """Type a question; when its end was sent."""
        await self.send("stt_fragment", text=text, is_final=True)
        await self.send("vad_end")
        return time.monotonic()

    async def until(self, kind: str, count: int = 1, seconds: float = 30.0) -> Received:
        """The `count`th frame of `kind`."""
        async with asyncio.timeout(seconds):
            while True:
                found = [frame for frame in self.frames if frame.kind == kind]
                if len(found) >= count:
                    return found[count - 1]
                if self.close_code is not None:
                    raise AssertionError(f"closed with {self.close_code} before {kind}: {self.kinds}")
                self._arrived.clear()
                await self._arrived.wait()

    async def until_closed(self, seconds: float = 30.0) -> int:
        async with asyncio.timeout(seconds):
            while self.close_code is None:
                self._arrived.clear()
                await self._arrived.wait()
        return self.close_code

    @property
    def kinds(self) -> list[str]:
        """What came, in order; runs of audio count once."""
        kinds: list[str] = []
        for frame in self.frames:
            if not (frame.audio and kinds[-1:] == ["audio"]):
                kinds.append(frame.kind)
        return kinds

    @property
    def audio(self) -> bytes:
        return b"".join(frame.audio for frame in self.frames)
