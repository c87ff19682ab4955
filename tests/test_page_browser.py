"""The page in a real Chromium, over the real routes and a cell that is made up."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from door.keys import KeyStore
from tests.browser import MIDDLE, NARROW, WIDE, Scheme, answer, ask, chromium, overflow, watched
from tests.fake_door import ANSWER, PLAIN, QUESTIONS, FakeCell, served

TABS = ("Learned", "Candidates", "Dreams", "Cell")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


@pytest.fixture
def fake() -> FakeCell:
    return FakeCell()


@pytest.fixture
def base(fake: FakeCell, tmp_path: Path) -> Iterator[str]:
    with served(tmp_path / "home", fake) as address:
        yield address


def teach(page: Page, words: str) -> None:
    page.get_by_role("button", name="Correct").last.click()
    page.get_by_label("What it should have said").fill(words)
    page.get_by_role("button", name="Teach").click()
    page.locator(".lesson[data-status=done]").last.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [NARROW, MIDDLE, WIDE], ids=lambda size: str(size[0]))
def test_it_fits_and_says_nothing_wrong_at_any_width(
    browser: Browser, base: str, size: tuple[int, int], scheme: Scheme, tmp_path: Path
) -> None:
    with watched(browser, base, size, scheme) as (page, seen):
        ask(page, "What is your name?")
        page.get_by_role("button", name="Correct").click()
        page.get_by_text("Options").click()
        for name in TABS:
            page.get_by_role("tab", name=name).click()
            page.get_by_role("tabpanel", name=name).locator("> *").first.wait_for()
            assert overflow(page) <= 0, name
            page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        seen.check()


def test_dark_and_light_are_two_designs_that_can_be_read(browser: Browser, base: str) -> None:
    grounds = []
    schemes: tuple[Scheme, ...] = ("light", "dark")
    for scheme in schemes:
        with watched(browser, base, scheme=scheme) as (page, _):
            grounds.append(contrast(page))
    (light, light_ratio), (dark, dark_ratio) = grounds
    assert light > 0.8 and dark < 0.05, "the ground's luminance"
    assert min(light_ratio, dark_ratio) >= 4.5, "the weakest text on any ground"


def contrast(page: Page) -> tuple[float, float]:
    """Luminance of the ground, and the lowest contrast of a text with what lies under it."""
    ground, ratio = page.evaluate(
        """() => {
        const canvas = document.createElement("canvas").getContext("2d");
        const rgb = (color) => {
            canvas.clearRect(0, 0, 1, 1);
            canvas.fillStyle = color;
            canvas.fillRect(0, 0, 1, 1);
            return canvas.getImageData(0, 0, 1, 1).data;
        };
        const luminance = (color) => {
            const [r, g, b] = Array.from(rgb(color)).slice(0, 3).map((value) => {
                const part = value / 255;
                return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const under = (element) => {
            for (let each = element; each; each = each.parentElement) {
                const color = getComputedStyle(each).backgroundColor;
                if (rgb(color)[3] === 255) return luminance(color);
            }
            return 1;
        };
        const texts = [...document.querySelectorAll("h1,h2,h3,p,span,button,dt,dd,label,summary,b")]
            .filter((each) => each.checkVisibility() && each.innerText.trim());
        const ratios = texts.map((each) => {
            const [one, two] = [luminance(getComputedStyle(each).color), under(each)];
            return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
        });
        return [under(document.body), Math.min(...ratios)];
        }"""
    )
    return float(ground), float(ratio)


def test_a_message_is_sent_and_an_answer_corrected_by_keyboard_alone(
    browser: Browser, base: str, fake: FakeCell
) -> None:
    with watched(browser, base) as (page, seen):
        page.keyboard.press("Tab")
        while page.evaluate("document.activeElement.id") != "question":
            page.keyboard.press("Tab")
        page.keyboard.type("What is your name?")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Correct").wait_for()
        tab_to(page, "Correct")
        page.keyboard.press("Enter")
        page.keyboard.press("Control+A")
        page.keyboard.type("Reverie.")
        tab_to(page, "Teach")
        page.keyboard.press("Enter")
        page.locator(".lesson[data-status=done]").wait_for()
        ((kind, posted),) = fake.asked
        sample = posted.samples[0]
        assert (kind, sample.messages[-1].content, sample.source) == ("train", "Reverie.", "page")
        seen.check()


def tab_to(page: Page, words: str) -> None:
    for _ in range(40):
        if page.evaluate("document.activeElement.innerText") == words:
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", "what has the focus is not seen to have it"
            return
        page.keyboard.press("Shift+Tab" if words == "Correct" else "Tab")
    raise AssertionError(f"{words} is not reached with the Tab key")


def test_tabs_are_moved_between_with_arrows(browser: Browser, base: str) -> None:
    with watched(browser, base) as (page, _):
        page.get_by_role("tab", name="Learned").focus()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tab", name="Candidates")).to_be_focused()
        expect(page.get_by_role("tabpanel", name="Candidates")).to_be_visible()
        page.keyboard.press("End")
        expect(page.get_by_role("tabpanel", name="Cell")).to_contain_text("weights, one copy")


def test_an_answer_is_stopped_and_keeps_its_version(browser: Browser, base: str) -> None:
    with watched(browser, base) as (page, seen):
        page.get_by_label("Your question").fill("What is your name?")
        page.keyboard.press("Enter")
        turn = page.locator(".turn.model")
        expect(turn.locator(".said")).to_contain_text("My name")
        page.get_by_role("button", name="Stop").click()
        expect(turn).to_contain_text("stopped")
        expect(turn.locator(".chip")).to_have_text("v36")
        said = turn.locator(".said").inner_text()
        assert "whatever you would like to know" not in said
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        seen.check()


def test_what_is_taught_is_drawn_listed_kept_and_answered(browser: Browser, base: str) -> None:
    with watched(browser, base) as (page, seen):
        ask(page, "What is your name?")
        teach(page, "My name is Reverie.")
        page.locator(".lesson").get_by_role("button", name="Ask again").click()
        expect(page.locator(".turn.model .said").nth(1)).to_contain_text("My name is Reverie.")
        expect(page.locator(".turn.model .chip").nth(1)).to_have_text("v48")
        expect(page.locator("#version")).to_have_text("48")
        panel = page.get_by_role("tabpanel", name="Learned")
        expect(panel).to_contain_text("My name is Reverie.")
        panel.get_by_role("button", name="Keep now").click()
        expect(page.locator("#notice")).to_contain_text("Generation 3 is kept")
        expect(panel).not_to_contain_text("Not kept yet")
        drawn = page.locator("#plot svg")
        expect(drawn).to_contain_text("g3")
        expect(drawn).to_have_attribute("aria-label", "Version 48, loss 0.07")
        drawn.focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Home")
        expect(page.locator("#readout")).to_contain_text("Version 0")
        seen.check()


def test_what_was_answered_under_an_instruction_is_learned_without_it(
    browser: Browser, base: str, fake: FakeCell
) -> None:
    with watched(browser, base) as (page, seen):
        page.get_by_text("Options").click()
        page.get_by_label("Instruction").fill("Be brief.")
        ask(page, "Who are you?")
        teach(page, "Reverie.")
        sample = fake.asked[0][1].samples[0]
        assert [turn.role for turn in sample.messages] == ["system", "user", "assistant"]
        assert sample.strip == ["system"]
        seen.check()


def test_what_is_asked_again_further_up_leaves_the_conversation_as_it_is(
    browser: Browser, base: str, fake: FakeCell
) -> None:
    with watched(browser, base) as (page, _):
        ask(page, "One?")
        ask(page, "Two?")
        page.locator(".turn.model").first.get_by_role("button", name="Ask again").click()
        answer(page, 2)
        ask(page, "Three?")
        page.locator(".turn.model").last.get_by_role("button", name="Ask again").click()
        answer(page, 4)
        ask(page, "Four?")
        asked = [
            [turn["content"] for turn in chat if turn["role"] == "user"] for chat in fake.chats
        ]
        all_three = ["One?", "Two?", "Three?"]
        assert asked[2:] == [["One?"], all_three, all_three, [*all_three, "Four?"]]


def test_forgetting_and_rolling_back_ask_first_and_say_what_they_will_do(
    browser: Browser, base: str, fake: FakeCell
) -> None:
    with watched(browser, base) as (page, seen):
        page.get_by_role("button", name="Roll back to generation 1").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("Everything learned after version 24 is undone: example-2-1")
        expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
        page.keyboard.press("Enter")
        expect(dialog).not_to_be_visible()
        page.get_by_text("Generation 2").click()
        page.get_by_role("button", name="Forget example-2-1").click()
        expect(dialog).to_contain_text("example-2-1, from notes/garden.md, is undone")
        expect(dialog).to_contain_text("generation 1 (version 24")
        page.keyboard.press("Escape")
        expect(dialog).not_to_be_visible()
        assert fake.asked == [], "nothing is done unasked"

        page.get_by_role("button", name="Forget example-2-1").click()
        dialog.get_by_role("button", name="Forget it").click()
        expect(page.locator("#notice")).to_contain_text("example-2-1 is forgotten: generation 3")
        page.get_by_role("button", name="Roll back to generation 0").click()
        dialog.get_by_role("button", name="Roll back").click()
        expect(page.locator("#notice")).to_contain_text("has the weights of 0")
        expect(page.locator("#plot svg")).to_contain_text("g4\u21a90")
        assert [kind for kind, _ in fake.asked] == ["forget", "rollback"]
        assert fake.asked[0][1].item == "example-2-1" and fake.asked[1][1].generation == 0
        seen.check()


def test_candidates_are_decided_with_both_answers_side_by_side(
    browser: Browser, base: str, fake: FakeCell
) -> None:
    with watched(browser, base) as (page, seen):
        page.get_by_role("tab", name="Candidates").click()
        first = page.get_by_role("article", name=QUESTIONS[0])
        second = page.get_by_role("article", name=QUESTIONS[1])
        told, plain = first.locator(".side-by").all()
        expect(told).to_contain_text(ANSWER)
        expect(plain).to_contain_text(PLAIN)
        left, right = told.bounding_box(), plain.bounding_box()
        assert left is not None and right is not None
        assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
        first.get_by_role("button", name="Approve").click()
        expect(page.locator("#notice")).to_contain_text("Approved; it is learned once")
        expect(first).to_have_count(0)
        second.get_by_role("button", name="Reject").click()
        expect(page.get_by_text("Nothing to decide")).to_be_visible()
        assert [(kind, posted.decision) for kind, posted in fake.asked] == [
            ("candidates/candidate-0", "approve"),
            ("candidates/candidate-1", "reject"),
        ]
        seen.check()


def test_a_dream_is_asked_for_and_stopped(browser: Browser, base: str, fake: FakeCell) -> None:
    with watched(browser, base) as (page, seen):
        page.get_by_role("tab", name="Dreams").click()
        panel = page.get_by_role("tabpanel", name="Dreams")
        expect(panel).to_contain_text("shown 2.0 % \u2192 78 %")
        panel.get_by_role("button", name="Dream of brief").click()
        expect(panel).to_contain_text("1 round asked for")
        panel.get_by_role("button", name="Stop dreaming").click()
        expect(panel).to_contain_text("Not dreaming")
        assert [kind for kind, _ in fake.asked] == ["dream", "stop"]
        assert fake.asked[0][1].behaviour == "brief"
        seen.check()


def test_what_the_cell_says_of_itself_is_above_everything(
    browser: Browser, base: str, fake: FakeCell
) -> None:
    with watched(browser, base) as (page, _):
        banner = page.locator("#banner")
        expect(banner).to_be_hidden()
        fake.paused = "the disk is full"
        expect(banner).to_have_text("training is paused: the disk is full")
        fake.paused, fake.state, fake.reason = None, "recovering", "the engine actor died"
        expect(banner).to_contain_text("The cell is recovering: the engine actor died")
        expect(page.locator("#health")).to_have_text("recovering")
        fake.state, fake.reason = "ready", None
        expect(banner).to_be_hidden()


def test_a_key_is_asked_for_kept_in_the_session_and_never_in_the_address(
    browser: Browser, base: str, tmp_path: Path
) -> None:
    key = KeyStore(tmp_path / "home").add("teach")
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{base}/ui")
    page.get_by_label("API key").fill("rv-wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-words")).to_contain_text("a valid API key is needed")
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")
    expect(page.locator("#version")).to_have_text("36")
    assert key not in page.url and page.evaluate("localStorage.length") == 0
    page.reload()
    expect(page.locator("#version")).to_have_text("36")

    page.get_by_role("tab", name="Dreams").click()
    with page.expect_popup() as opened:
        page.get_by_role("link", name="Report of round-1").click()
    report = opened.value
    expect(report.locator("h1")).to_have_text("round-1: brief")
    expect(report.locator("body")).to_contain_text("<script>x()</script>")
    assert report.evaluate("getComputedStyle(document.querySelector('td')).textAlign") == "left"
    assert report.evaluate("getComputedStyle(document.body).maxWidth") == "900px", "styled"

    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    context.close()


def test_a_key_that_may_use_looks_and_asks_but_is_offered_nothing_to_change(
    browser: Browser, base: str, tmp_path: Path
) -> None:
    key = KeyStore(tmp_path / "home").add("use")
    with watched(browser, base, key=key) as (page, _):
        ask(page, "What is your name?")
        expect(page.locator(".turn.model .chip")).to_have_text("v36")
        assert page.get_by_role("button", name="Correct").count() == 0
        for name in TABS[:3]:
            page.get_by_role("tab", name=name).click()
            panel = page.get_by_role("tabpanel", name=name)
            expect(panel).to_contain_text("This key may ask and look")
            assert panel.get_by_role("button").count() == 0
        page.get_by_role("tab", name="Cell").click()
        expect(page.get_by_role("tabpanel", name="Cell")).to_contain_text("513 MiB")


def test_a_page_that_is_not_seen_listens_to_nothing(
    browser: Browser, base: str, fake: FakeCell
) -> None:
    hide = """is => {
        Object.defineProperty(document, "hidden", { get: () => is, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    with watched(browser, base) as (page, seen):
        with page.expect_event("requestfailed", lambda each: each.url.endswith("/events")):
            page.evaluate(hide, True)
        fake.version += 1
        with page.expect_request("**/events"):
            expect(page.locator("#version")).to_have_text("36")
            page.evaluate(hide, False)
        expect(page.locator("#version")).to_have_text("37")
        expect(page.locator("#banner")).to_be_hidden()
        seen.check()
