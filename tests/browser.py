"""A real Chromium that looks at the page, and remembers everything that it should not have seen.

    watched(browser, base) -> page, seen    console errors, policy violations, requests elsewhere

Debian's own build is driven (packages `chromium` and any font); where there is none, tests that
need it are skipped and say so.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_MS: Final = 20_000
WIDE: Final = (1440, 900)
MIDDLE: Final = (768, 1024)
NARROW: Final = (360, 740)

Scheme = Literal["light", "dark"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """One browser. While it runs, this thread has no room for another event loop."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium here; on Debian: apt-get install chromium fonts-inter")
    # Root may not use the sandbox, and nothing from elsewhere is opened.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Seen:
    """What a page said and asked for while it was open."""

    host: str
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    num_feeds: int = 0
    """How often the page began to listen."""

    def note_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text}")

    def note_request(self, request: Any) -> None:
        address = urlsplit(request.url)
        self.num_feeds += address.path == "/events"
        if address.scheme not in ("blob", "about") and address.netloc != self.host:
            self.elsewhere.append(request.url)

    def check(self) -> None:
        """Nothing was complained of, and nobody else was asked."""
        assert self.errors == [] and self.elsewhere == [], self


@contextmanager
def watched(
    browser: Browser,
    base: str,
    size: tuple[int, int] = WIDE,
    scheme: Scheme = "light",
    key: str | None = None,
) -> Iterator[tuple[Page, Seen]]:
    """The page, opened and connected, in a session of its own; with a key, it is entered."""
    context = browser.new_context(
        viewport=ViewportSize(width=size[0], height=size[1]), color_scheme=scheme
    )
    context.set_default_timeout(TIMEOUT_MS)
    seen = Seen(urlsplit(base).netloc)
    context.on("console", seen.note_console)
    context.on("request", seen.note_request)
    context.on("weberror", lambda error: seen.errors.append(str(error.error)))
    page = context.new_page()
    try:
        page.goto(f"{base}/ui")
        if key is not None:
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Open").click()
        page.locator("#health[data-state=ready], #health[data-state=learning]").wait_for()
        yield page, seen
    finally:
        context.close()


def ask(page: Page, question: str) -> str:
    """Ask as somebody would, and wait for the whole answer; its text."""
    before = page.locator(".turn.model").count()
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Send").click()
    return answer(page, before)


def answer(page: Page, before: int) -> str:
    """The text of the next answer, when it is whole."""
    turn = page.locator(".turn.model").nth(before)
    turn.get_by_role("button", name="Ask again").first.wait_for(timeout=120_000)
    return turn.locator(".said").inner_text().strip()


def overflow(page: Page) -> int:
    """By how many pixels the page is wider than the window."""
    return int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))
