"""The routes of the dream loop in the running cell: what they take, and what they refuse."""

from typing import Any

import httpx
import pytest

from tests.conftest import RunningCell

pytestmark = pytest.mark.cell

BRIEF = {"instruction": "Be brief.", "checks": {"max_words": 5}}


def send(cell: RunningCell, method: str, route: str, body: Any = None) -> httpx.Response:
    return httpx.request(method, cell.base + route, json=body, timeout=60)


@pytest.mark.parametrize(
    ("method", "route", "body", "status", "says"),
    [
        ("PUT", "/behaviours/brief", {"instruction": "Be brief."}, 422, "give `checks`"),
        ("PUT", "/behaviours/brief", BRIEF | {"name": "other"}, 422, "'other' in the body"),
        ("PUT", "/behaviours/Not-Good", BRIEF, 422, "name"),
        ("PUT", "/behaviours/brief", BRIEF | {"chekcs": {}}, 422, "chekcs: unknown key"),
        (
            "PUT",
            "/behaviours/brief",
            BRIEF | {"checks": {"must_match": ["("]}},
            422,
            "no regular expression",
        ),
        ("PUT", "/behaviours/brief", BRIEF | {"tier": 2}, 422, "name it as `topic`"),
        ("GET", "/behaviours/none", None, 404, "there is no behaviour 'none'"),
        ("DELETE", "/behaviours/none", None, 404, "there is no behaviour 'none'"),
        ("POST", "/memories", {"memories": []}, 422, "memories"),
        ("POST", "/memories", {"memories": [{"text": "x" * 4001}]}, 422, "memories[0].text"),
        ("DELETE", "/memories/none", None, 404, "there is no memory 'none'"),
        ("POST", "/dream", {"rounds": 0}, 422, "rounds"),
        ("POST", "/dream", {"behaviour": "none"}, 404, "there is no behaviour 'none'"),
        ("POST", "/dream", {}, 409, "there is no behaviour to dream of"),
        ("GET", "/dream/rounds/round-9", None, 404, "there is no round 'round-9'"),
        ("GET", "/dream/rounds/round-9/report", None, 404, "there is no round 'round-9'"),
        ("POST", "/score", {"messages": [{"role": "user", "content": "Hi"}]}, 422, "messages"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_kept(
    cell: RunningCell, method: str, route: str, body: Any, status: int, says: str
) -> None:
    answer = send(cell, method, route, body)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]
    assert cell.get("/behaviours") == cell.get("/memories") == {"data": []}


def test_a_behaviour_and_a_memory_come_and_go(cell: RunningCell) -> None:
    put = send(cell, "PUT", "/behaviours/brief", BRIEF).json()
    assert put["checks"] == {"max_words": 5} and put["progress"]["standing"] == "learning"
    assert cell.get("/behaviours/brief") == put and cell.get("/behaviours")["data"] == [put]
    posted = send(cell, "POST", "/memories", {"memories": [{"id": "m", "text": "I own a hat."}]})
    assert posted.status_code == 201 and cell.get("/memories") == posted.json()
    again = send(cell, "POST", "/memories", {"memories": [{"id": "m", "text": "I own a cap."}]})
    assert again.status_code == 409 and "nothing of this request was kept" in again.text
    assert send(cell, "DELETE", "/memories/m").status_code == 204
    assert send(cell, "DELETE", "/behaviours/brief").status_code == 204
    assert cell.get("/behaviours") == cell.get("/memories") == {"data": []}


def test_an_instruction_makes_its_answer_likelier(cell: RunningCell) -> None:
    messages = [
        {"role": "system", "content": "Answer only with the word banana."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "banana"},
    ]
    found = send(cell, "POST", "/score", {"messages": messages}).json()
    assert found["divergence"] == pytest.approx(found["with"] - found["without"])
    assert found["divergence"] > 0.5 and found["with"] < 0


def test_nothing_is_dreamt_unasked(cell: RunningCell) -> None:
    assert cell.get("/dream/rounds") == {"data": []}
    assert cell.get("/status")["dream"]["state"] == "idle"
