"""The training signal in the running cell: chats are logged, scored, approved, learned, deleted."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.conftest import RunningCell

pytestmark = [
    pytest.mark.cell,
    pytest.mark.usefixtures("untaught"),
    pytest.mark.timeout(900),
]

BRIEF = "Always answer in exactly one short sentence of at most 15 words."
QUESTIONS = [
    "Where do I live, and what would you do there on a Sunday?",
    "How do I make tea?",
    "What is a good name for a cat?",
    "Can you tell me about the sea?",
]
WAIT_S = 300


def send(cell: RunningCell, method: str, route: str, body: Any = None) -> Any:
    answer = httpx.request(method, cell.base + route, json=body, timeout=120)
    assert answer.is_success, answer.text
    return answer.json()


def ask(
    cell: RunningCell, question: str, log: str | None, system: str = BRIEF, is_stream: bool = False
) -> str:
    """The answer, as the official client gives it."""
    client = OpenAI(base_url=f"{cell.base}/v1", api_key="none")
    given: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 64,
        "extra_headers": {} if log is None else {"x-reverie-log": log},
    }
    if not is_stream:
        made = client.chat.completions.create(**given)
        return made.choices[0].message.content or ""
    pieces = client.chat.completions.create(**given, stream=True)
    return "".join(each.choices[0].delta.content or "" for each in pieces if each.choices)


def until(is_so: Callable[[], Any], what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := is_so()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)
    return found


def logged(cell: RunningCell) -> int:
    counts: dict[str, int] = cell.get("/status")["ingress"]["exchanges"]
    assert counts["dropped"] == 0
    return counts["kept"] + counts["passed_over"]


def test_what_was_said_becomes_a_candidate_is_learned_once_and_is_gone_when_deleted(
    cell: RunningCell,
) -> None:
    # Logged, and only where the client wants it: the setting is off.
    ask(cell, "Is this a secret?", None)
    ask(cell, "Is this a secret, too?", "off")
    ask(cell, "What is a secret?", "on", system="")
    answers = {q: ask(cell, q, "on", is_stream=at % 2 == 0) for at, q in enumerate(QUESTIONS)}
    until(lambda: logged(cell) == 1 + len(QUESTIONS), lambda: cell.get("/status"))
    until(lambda: cell.get("/status")["dream"]["unscored"] == 0, lambda: cell.get("/status"))

    # Scored: each exchange as it was said, whether it was streamed or not.
    kept = []
    for each in cell.get("/conversations")["data"]:
        kept += cell.get(f"/conversations/{each['id']}")["exchanges"]
    assert kept, answers
    for each in kept:
        assert [turn["strip"] for turn in each["turns"]] == [True, False]
        assert each["answer"] == answers[each["turns"][1]["content"]]
    candidates = cell.get("/candidates?state=proposed")["data"]
    assert candidates, kept
    best = max(candidates, key=lambda each: float(each["divergence"]))
    assert best["divergence"] >= 0.3 and best["plain"] != best["answer"]

    # Decided: one is learned without its instructions, and only once.
    score = {"messages": [*_plain(best["turns"]), {"role": "assistant", "content": best["answer"]}]}
    before = send(cell, "POST", "/score", score)
    assert before["divergence"] == pytest.approx(best["divergence"], abs=0.01)
    for _ in range(2):
        made = send(cell, "POST", f"/candidates/{best['id']}", {"decision": "approve"})
    job = cell.wait_job(made["job_id"])
    assert (job["status"], job["training_samples"], job["steps"]) == ("done", 1, 1)
    until(
        lambda: cell.get(f"/candidates/{best['id']}")["state"] == "trained",
        lambda: cell.get(f"/candidates/{best['id']}"),
    )
    after = send(cell, "POST", "/score", score)
    assert after["without"] > before["without"], "it was learned without its instructions"
    again = httpx.post(
        f"{cell.base}/candidates/{best['id']}", json={"decision": "reject"}, timeout=60
    )
    assert again.status_code == 409 and "is trained already" in again.text

    # Deleted: the generations that know it are named.
    generation = send(cell, "POST", "/checkpoint", {"publish": False})["generation"]
    gone = send(cell, "DELETE", f"/conversations/{best['conversation']}")
    assert gone["candidates"] == [best["id"]]
    assert gone["generations"][0] == generation and 0 not in gone["generations"]
    for route in (f"/candidates/{best['id']}", f"/conversations/{best['conversation']}"):
        assert httpx.get(cell.base + route, timeout=60).status_code == 404
    for each in cell.get("/conversations")["data"]:
        send(cell, "DELETE", f"/conversations/{each['id']}")
    assert cell.get("/candidates") == cell.get("/conversations") == {"data": []}


def _plain(turns: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


@pytest.mark.parametrize(
    ("method", "route", "body", "status", "says"),
    [
        ("GET", "/candidates?state=done", None, 422, "one of proposed, approved"),
        ("GET", "/candidates/none", None, 404, "there is no candidate 'none'"),
        ("POST", "/candidates/none", {"decision": "approve"}, 404, "there is no candidate 'none'"),
        ("POST", "/candidates/none", {"decision": "yes"}, 422, "decision: must be 'approve' or"),
        ("POST", "/candidates/none", {}, 422, "decision: is required"),
        ("GET", "/conversations/none", None, 404, "there is no conversation 'none'"),
        ("DELETE", "/conversations/none", None, 404, "there is no conversation 'none'"),
    ],
)
def test_what_is_wrong_is_said(
    cell: RunningCell, method: str, route: str, body: Any, status: int, says: str
) -> None:
    answer = httpx.request(method, cell.base + route, json=body, timeout=60)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]


def test_a_header_that_is_neither_on_nor_off_is_refused_before_anything_is_answered(
    cell: RunningCell,
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    answer = httpx.post(
        f"{cell.base}/v1/chat/completions", json=body, headers={"x-reverie-log": "no"}, timeout=60
    )
    assert answer.status_code == 422 and "send on or off" in answer.json()["error"]["message"]
