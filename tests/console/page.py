"""The console page in a browser, as a user sees it, with a record of what went over its WebSockets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from playwright.sync_api import ConsoleMessage, Locator, Page, Request, WebSocket, expect

PATIENCE_MS = 15_000


class Console:
    """One open page. `problems` are console errors, exceptions and requests to other hosts; a test ends without any."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.problems: list[str] = []
        self.sent: list[dict[str, Any]] = []
        self.sent_audio: list[bytes] = []
        self.received: list[dict[str, Any]] = []
        self.received_audio: list[bytes] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", self._note_console)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("request", self._note_request)
        page.on("websocket", self._note_websocket)

    def open(self, query: str = "", connected: bool = True) -> Console:
        self.page.goto(self.url + query)
        if connected:
            self.expect_connected()
        return self

    def find(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def expect_connected(self) -> None:
        self.expect_attribute("#connection", "data-phase", "open")

    def expect_state(self, state: str) -> None:
        self.expect_attribute(".states .here", "data-state", state)

    def expect_text(self, selector: str, text: str) -> None:
        expect(self.find(selector)).to_have_text(text, timeout=PATIENCE_MS)

    def expect_contains(self, selector: str, text: str) -> None:
        expect(self.find(selector)).to_contain_text(text, timeout=PATIENCE_MS)

    def expect_value(self, selector: str, value: str) -> None:
        expect(self.find(selector)).to_have_value(value, timeout=PATIENCE_MS)

    def expect_attribute(self, selector: str, name: str, value: str) -> None:
        expect(self.find(selector)).to_have_attribute(name, value, timeout=PATIENCE_MS)

    def expect_count(self, selector: str, count: int) -> None:
        expect(self.find(selector)).to_have_count(count, timeout=PATIENCE_MS)

    def expect_seen(self, selector: str) -> None:
        expect(self.find(selector)).to_be_visible(timeout=PATIENCE_MS)

    def expect_hidden(self, selector: str) -> None:
        expect(self.find(selector)).to_be_hidden(timeout=PATIENCE_MS)

    def ask(self, text: str) -> None:
        self.find("#text").fill(text)
        self.find("#text").press("Enter")

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def milliseconds(self, selector: str) -> float:
        return float(self.find(selector).get_attribute("data-ms") or 0.0)

    def level(self, selector: str) -> float:
        level: float = self.find(selector).evaluate("meter => meter.value")
        return level

    def sent_of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.sent if message["type"] == kind]

    def received_of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.received if message["type"] == kind]

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """The first true value of `condition`, while the browser's events go on arriving."""
        for _ in range(PATIENCE_MS // 20):
            value = condition()
            if value:
                return value
            self.page.wait_for_timeout(20)
        raise AssertionError(f"no {what} within {PATIENCE_MS / 1000:g} s")

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text}")

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith(self.url):
            self.problems.append(f"request to another host: {request.url}")

    def _note_websocket(self, socket: WebSocket) -> None:
        socket.on("framesent", lambda frame: self._keep(frame, self.sent, self.sent_audio))
        socket.on("framereceived", lambda frame: self._keep(frame, self.received, self.received_audio))

    @staticmethod
    def _keep(frame: bytes | str, texts: list[dict[str, Any]], audio: list[bytes]) -> None:
        if isinstance(frame, bytes):
            audio.append(frame)
        else:
            texts.append(json.loads(frame))
