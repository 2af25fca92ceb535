"""What speech-to-text publishes over Redis, for deployments where it does not answer on the microphone's connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

import msgspec
from redis.asyncio.client import PubSub, Redis

from orchestrator.store.redis_client import REDIS_ERRORS, make_client

CONNECT_SECONDS = 1.0
MAX_TEXT_BYTES = 4096
_HEALTH_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.1
_LAST_PAUSE_SECONDS = 2.0

EventT = TypeVar("EventT")
EventT_co = TypeVar("EventT_co", covariant=True)
log = logging.getLogger(__name__)


class MakeFragment(Protocol[EventT_co]):
    """Makes the event of a fragment. `timestamp` is Unix seconds."""

    def __call__(self, text: str, is_final: bool, timestamp: float | None) -> EventT_co: ...


class _Published(msgspec.Struct):
    session_id: str
    text: str
    is_final: bool = False
    timestamp: float | None = None


_decoder = msgspec.json.Decoder(_Published)


class SttEvents(Generic[EventT]):
    """Delivers fragments published on `channel` to `deliver(session_id, event)`, whichever worker owns the session.

    Subscribes in the background and again whenever Redis was gone; what was published meanwhile is lost, as pub/sub has
    it. Messages that are none are counted in `dropped`. Raises SettingsError for a URL it cannot use.
    """

    def __init__(
        self,
        redis_url: str,
        channel: str,
        make: MakeFragment[EventT],
        deliver: Callable[[str, EventT], None],
    ) -> None:
        self._url = redis_url
        self._channel = channel
        self._make = make
        self._deliver = deliver
        self._task: asyncio.Task[None] | None = None
        self._client = make_client(redis_url, timeout=CONNECT_SECONDS, for_pubsub=True)
        self.subscribed = False
        self.dropped = 0

    async def start(self) -> None:
        """Begin to subscribe; Redis need not be there."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Unsubscribe and disconnect."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.aclose()

    async def _run(self) -> None:
        assert isinstance(self._client, Redis)
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                async with aclosing(self._client.pubsub(ignore_subscribe_messages=False)) as pubsub:
                    await pubsub.subscribe(self._channel)
                    await self._listen(pubsub)
            except REDIS_ERRORS as error:
                if self.subscribed:
                    log.warning("stt events: the subscription was lost: %.200r", str(error))
                    pause = _FIRST_PAUSE_SECONDS
                self.subscribed = False
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LAST_PAUSE_SECONDS)

    async def _listen(self, pubsub: PubSub) -> None:
        """Until the connection fails. A ping in every silence finds out whether it has."""
        waiting_for_pong = False
        while True:
            message = await pubsub.get_message(timeout=_HEALTH_SECONDS)
            if message is None:
                if waiting_for_pong:
                    raise ConnectionError("no answer to a ping")
                waiting_for_pong = True
                await pubsub.ping()
                continue
            waiting_for_pong = False
            if message["type"] == "subscribe":
                self.subscribed = True
            elif message["type"] == "message":
                self._take(message["data"])

    def _take(self, data: bytes) -> None:
        try:
            published = _decoder.decode(data)
            if len(published.text) * 4 > MAX_TEXT_BYTES and len(published.text.encode()) > MAX_TEXT_BYTES:
                raise ValueError("text too long")
        except (ValueError, RecursionError):
            self.dropped += 1
            log.debug("stt events: a message of %d bytes that is none was dropped", len(data))
            return
        event = self._make(published.text, published.is_final, published.timestamp)
        self._deliver(published.session_id, event)
