"""A real Chromium, and a server for the page: scripted, or any running one named in CONSOLE_URL.

CONSOLE_URL=http://localhost:8004/ runs the conversation tests against that server; CONSOLE_WAV=question.wav is then
what is spoken into the microphone. CHROMIUM names the browser where it is not on the PATH.
"""

from __future__ import annotations

import array
import importlib.util
import math
import os
import shutil
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.console.scripted_agent import Agent
from tests.console.scripted_server import ByHand, ScriptedServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.console.page import Console

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
MICROPHONE_HERTZ = 440
_WAV_RATE = 48_000


def _missing(what: str, how: str) -> None:
    line = f"the console page was not tested: {what} is missing ({how})"
    if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
        pytest.fail(line, pytrace=False)
    pytest.skip(line)


@pytest.fixture(scope="session")
def chromium() -> str:
    if importlib.util.find_spec("playwright") is None:
        _missing("the Python package playwright", "pip install playwright")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None or not Path(found).is_file():
        _missing("Chromium", "apt-get install chromium, or set CHROMIUM to its path")
    assert found is not None
    return found


def _voice(seconds: float) -> list[int]:
    """A tone that swells four times a second: a steady one would be taken for noise and suppressed."""
    return [
        round(9000 * (0.6 + 0.4 * math.sin(8 * math.pi * i / _WAV_RATE)) * math.sin(
            2 * math.pi * MICROPHONE_HERTZ * i / _WAV_RATE))
        for i in range(round(seconds * _WAV_RATE))
    ]  # fmt: skip


def _silence(seconds: float) -> list[int]:
    return [0] * round(seconds * _WAV_RATE)


@pytest.fixture(scope="session")
def microphone_wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the fake microphone hears: a second of voice, a pause, and another second over the answer."""
    given = os.environ.get("CONSOLE_WAV")
    if given:
        return Path(given)
    path = tmp_path_factory.mktemp("microphone") / "voice.wav"
    samples = [*_silence(0.3), *_voice(1.0), *_silence(1.4), *_voice(1.0), *_silence(3.0)]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_WAV_RATE)
        file.writeframes(array.array("h", samples).tobytes())
    return path


@pytest.fixture(scope="module")
def browser(chromium: str, microphone_wav: Path) -> Iterator[Browser]:
    """One a module: Playwright's synchronous loop must not outlive the tests that expect none to run."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=[*FLAGS, f"--use-file-for-fake-audio-capture={microphone_wav}%noloop"],
        )
        yield browser
        browser.close()


OpenConsole = Callable[..., "Console"]


@pytest.fixture
def open_console(browser: Browser) -> Iterator[OpenConsole]:
    """Opens the page at a URL. `tolerate` are parts of console errors that the test brings about itself."""
    from tests.console.page import Console

    opened: list[tuple[Console, tuple[str, ...]]] = []

    def open_one(url: str, query: str = "", *, connected: bool = True, tolerate: tuple[str, ...] = (),
                 width: int = 1280) -> Console:  # fmt: skip
        context = browser.new_context(viewport={"width": width, "height": 800})
        console = Console(context.new_page(), url)
        opened.append((console, tolerate))
        return console.open(query, connected)

    yield open_one
    for console, _ in opened:
        console.page.context.close()
    problems = [
        problem
        for console, tolerate in opened
        for problem in console.problems
        if not any(part in problem for part in tolerate)
    ]
    assert problems == []


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A server that only greets; the test says the rest."""
    with ScriptedServer(ByHand()) as running:
        yield running


@pytest.fixture
def console_url() -> Iterator[str]:
    """A server that converses: the one in CONSOLE_URL, else the scripted agent."""
    given = os.environ.get("CONSOLE_URL")
    if given:
        yield given.rstrip("/") + "/"
        return
    with ScriptedServer(Agent()) as running:
        yield running.url
