"""The page in a real Chromium, over the running cell: ask, correct, see it learned, undo it.

The pictures are kept with the test's files; REVERIE_UI_PICTURE names a file for the widest one:

    REVERIE_UI_PICTURE=docs/ui.png .venv/bin/python -m pytest tests/test_page_cell.py
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from door.feed import MAX_LISTENERS
from tests.browser import MIDDLE, NARROW, WIDE, Scheme, answer, ask, chromium, overflow, watched
from tests.conftest import RunningCell

pytestmark = [pytest.mark.cell, pytest.mark.timeout(900)]

QUESTION: Final = "What is your name?"
TAUGHT: Final = "I am Reverie, and I learn while I answer."
LEARN_MS: Final = 240_000
WORK_MS: Final = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


def picture(page: Page, tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"ui-{name}.png"
    page.screenshot(path=path)
    return path


def drawn_loss(page: Page) -> int:
    """Points of the loss in the timeline."""
    path = page.locator("#plot path.loss")
    return (path.get_attribute("d") or "").count("L") + 1 if path.count() else 0


@pytest.mark.usefixtures("untaught")
def test_an_answer_is_corrected_learned_asked_again_kept_and_forgotten(
    browser: Browser, cell: RunningCell, tmp_path: Path
) -> None:
    with watched(browser, cell.base) as (page, seen):
        before = ask(page, QUESTION)
        version = cell.get("/status")["weights_version"]
        expect(page.locator(".turn.model .chip")).to_have_text(f"v{version}")
        assert before and before != TAUGHT
        assert_streamed(page, cell)

        page.locator("#span").select_option(label="all")
        page.evaluate("() => new Promise(requestAnimationFrame)")
        points = drawn_loss(page)
        page.get_by_role("button", name="Correct").first.click()
        page.get_by_label("What it should have said").fill(TAUGHT)
        page.get_by_role("button", name="Teach").click()
        lesson = page.locator(".lesson")
        expect(lesson).to_contain_text("Learning: step", timeout=WORK_MS)
        expect(page.locator("#health")).to_have_text("learning")
        lesson.and_(page.locator("[data-status=done]")).wait_for(timeout=LEARN_MS)
        expect(lesson).to_contain_text(f"Learned in 12 steps, version {version + 12}")
        expect(page.locator("#version")).to_have_text(str(version + 12))
        assert drawn_loss(page) == points + 12, "every step is a point of the loss"

        asked = page.locator(".turn.model").count()
        lesson.get_by_role("button", name="Ask again").click()
        assert answer(page, asked) == TAUGHT
        expect(page.locator(".turn.model .chip").last).to_have_text(f"v{version + 12}")

        panel = page.get_by_role("tabpanel", name="Learned")
        expect(panel).to_contain_text("Not kept yet")
        expect(panel).to_contain_text(TAUGHT)
        panel.get_by_role("button", name="Keep now").click()
        expect(page.locator("#notice")).to_contain_text("is kept and public", timeout=WORK_MS)
        generation = cell.get("/checkpoints")["data"][0]
        assert generation["weights_version"] == version + 12
        expect(page.locator("#plot svg")).to_contain_text(f"g{generation['generation']}")
        page.get_by_text(f"Generation {generation['generation']}", exact=True).click()
        expect(panel.get_by_role("button", name="Forget page-")).to_be_visible()
        page.get_by_role("button", name="Dismiss").click()
        keep_pictures(browser, page, cell, tmp_path)

        panel.get_by_role("button", name="Forget page-").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("is undone and never learned again")
        dialog.get_by_role("button", name="Forget it").click()
        expect(page.locator("#notice")).to_contain_text("12 steps undone", timeout=WORK_MS)
        newest = cell.get("/checkpoints")["data"][0]
        assert newest["returns_to"] is not None
        assert ask(page, QUESTION) != TAUGHT
        assert seen.num_feeds == 1, "one stream of events, that was never cut"
        seen.check()


def test_memory_is_shown_by_role_and_the_weights_once(browser: Browser, cell: RunningCell) -> None:
    deadline = time.monotonic() + 60
    while len(memory := cell.get("/status")["memory"]) < 4:
        assert time.monotonic() < deadline, memory
        time.sleep(0.5)
    weights = cell.get("/status")["trainer"]["weights_bytes"]
    assert memory["trainer"]["shared_bytes"] >= weights, "they are mapped, not copied"
    with watched(browser, cell.base) as (page, seen):
        page.get_by_role("tab", name="Cell").click()
        panel = page.get_by_role("tabpanel", name="Cell")
        expect(panel).to_contain_text("weights, one copy")
        for role in ("engine", "trainer", "checkpoint", "dream"):
            expect(panel).to_contain_text(f"{role}, its own")
        seen.check()


def assert_streamed(page: Page, cell: RunningCell) -> None:
    """A long answer is seen while it grows; Stop ends it for the engine, too."""
    page.get_by_label("Your question").fill("Tell me a long story about the sea.")
    page.get_by_role("button", name="Send").click()
    said = page.locator(".turn.model .said").nth(1)
    lengths: set[int] = set()
    deadline = time.monotonic() + 60
    while len(lengths) < 5 and time.monotonic() < deadline:
        lengths.add(len(said.inner_text()))
    assert len(lengths) >= 5
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn.model").nth(1)).to_contain_text("stopped")
    while cell.get("/status")["ingress"]["ongoing_requests"]:
        assert time.monotonic() < deadline, "the engine goes on for nobody"
        time.sleep(0.2)


def keep_pictures(browser: Browser, page: Page, cell: RunningCell, tmp_path: Path) -> None:
    page.get_by_label("Conversation").evaluate("log => (log.scrollTop = log.scrollHeight)")
    page.mouse.move(0, 0)
    kept = picture(page, tmp_path, "1440-light")
    if goal := os.environ.get("REVERIE_UI_PICTURE"):
        shutil.copy(kept, goal)
    page.emulate_media(color_scheme="dark")
    picture(page, tmp_path, "1440-dark")
    page.emulate_media(color_scheme="light")
    schemes: tuple[Scheme, ...] = ("light", "dark")
    for size in (NARROW, MIDDLE):
        for scheme in schemes:
            with watched(browser, cell.base, size, scheme) as (other, seen):
                expect(other.locator("#plot path.loss")).to_be_visible()
                assert overflow(other) <= 0
                picture(other, tmp_path, f"{size[0]}-{scheme}")
                seen.check()
    assert WIDE[0] == 1440


def test_listeners_are_bounded_and_their_places_given_back(cell: RunningCell) -> None:
    with ExitStack() as open_ones:
        client = open_ones.enter_context(httpx.Client(base_url=cell.base, timeout=30))
        taken, reading = 0, []
        while taken <= MAX_LISTENERS:
            answered = open_ones.enter_context(client.stream("GET", "/events"))
            if answered.status_code == 429:
                break
            assert answered.status_code == 200
            assert answered.headers["content-type"].startswith("text/event-stream")
            reading.append(answered.iter_lines())  # Kept: without its reader, a stream is closed.
            assert next(reading[-1]) == "event: you"
            taken += 1
        assert 0 < taken <= MAX_LISTENERS and answered.status_code == 429
        assert answered.headers["retry-after"]
    deadline = time.monotonic() + 30
    while not is_let_in(cell):
        assert time.monotonic() < deadline, "listeners that went away keep their places"
        time.sleep(0.2)


def is_let_in(cell: RunningCell) -> bool:
    with httpx.stream("GET", f"{cell.base}/events", timeout=30) as answered:
        return answered.status_code == 200


def test_a_change_is_told_without_being_asked_for(cell: RunningCell) -> None:
    """A request that is inside is in the next snapshot."""
    told = threading.Event()

    def listen() -> None:
        with httpx.stream("GET", f"{cell.base}/events", timeout=60) as answered:
            for line in answered.iter_lines():
                if '"ongoing_requests": 1' in line:
                    told.set()
                    return

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    body = {
        "model": cell.get("/status")["model"],
        "messages": [{"role": "user", "content": "Tell me a long story."}],
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{cell.base}/v1/chat/completions", json=body, timeout=60) as made:
        for _ in made.iter_lines():
            if told.is_set():
                break
    assert told.is_set()
    listening.join(10)
