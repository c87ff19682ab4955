"""A round as a page: everything is in it, and nothing in it is run."""

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from actors.dream.records import Attempt, Item, Round
from actors.dream.report import page
from command.dream_progress import summary

HOSTILE = '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>'


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def a_round() -> Round:
    measured = {"kl": 0.25, "kl_short": 0.2, "kl_long": 0.3, "entropy": 2.0, "repetition": 0.1}
    measured |= {"facts": 0.75, "pushback": 0.5}
    attempts = [
        Attempt(2e-5, "job-1", (3.0, 2.0, 1.0), measured, {"brief": 0.5}, ("KL is too high",)),
        Attempt(1e-5, "job-2", (3.0, 2.5, 2.0), measured, {"brief": 0.4}, ()),
    ]
    return Round(
        "round-1",
        1,
        "brief",
        0.0,
        "taken back",
        1.0,
        before=measured,
        success_before={"brief": 0.0},
        attempts=attempts,
        counts={"scenarios": 2, "kept": 1},
        seconds={"imagining": 12.0},
        reason=HOSTILE,
    )


def read(items: list[Item]) -> Tags:
    tags = Tags()
    tags.feed(page(a_round(), items))
    return tags


def item(**more: Any) -> Item:
    made = Item("i", "round-1", "brief", "new", "Why?", "So.", is_kept=True)
    return replace(made, **more)


def test_kept_and_dropped_items_are_there_with_their_reasons() -> None:
    dropped = item(is_kept=False, reason="21 words, at most 20")
    shown = read([item(shown=-1.0, hidden=-2.5), dropped])
    for text in ("Why?", "So.", "1.50", "21 words, at most 20", "KL is too high", "0.250", "job"):
        assert (text in shown.text) == (text != "job"), text
    assert {"svg", "polyline"} <= shown.tags


def test_what_a_model_wrote_is_text_and_the_page_fetches_nothing() -> None:
    shown = read([item(situation=HOSTILE, answer=HOSTILE)])
    assert not shown.tags & {"script", "img", "link", "iframe", "object", "form", "a", "base"}
    assert not {name for name in shown.attributes if name.startswith("on") or name == "src"}
    assert shown.text.count("evil.example") == 3


def test_the_terminal_says_it_in_a_few_lines() -> None:
    lines = summary(a_round().as_json()).splitlines()
    assert lines[0].startswith(
        "round-1  brief  taken back  2 scenarios, 1 kept, 3 steps, loss 3.00"
    )
    assert "gate: brief 0% to 40%; KL 0.250, facts 75%, pushback 0.50" in lines[1]
    assert summary({**a_round().as_json(), "attempts": [], "reason": None}).count("\n") == 0
