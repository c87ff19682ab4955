"""What the soak counts: requests outside the restart windows, and memory that grows."""

from typing import Any

import httpx
import pytest

from experiments.kill_nine import outcome
from experiments.soak import EXPECTED, Answer, Soak, Window, faults, role_of, slopes

TOKEN = b'data: {"choices": [{"delta": {"content": "One"}, "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
ERROR = b'data: {"error": {"message": "the engine died"}}\n\n'
DONE = b"data: [DONE]\n\n"
VERSIONS = b": weights_version first=1 last=2\n\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (TOKEN + LAST + DONE + VERSIONS, "200"),
        (TOKEN + LAST, "200 cut short"),
        (TOKEN + DONE, "200 cut short"),
        (DONE, "200 cut short"),
        (TOKEN + LAST[:20], "200 cut short"),
        (TOKEN + ERROR + DONE, "200 with an error inside"),
        (TOKEN + LAST + ERROR + DONE, "200 with an error inside"),
    ],
)
def test_a_stream_is_answered_if_a_token_ended_it_and_no_error(body: bytes, said: str) -> None:
    answer = httpx.Response(200, headers={"content-type": "text/event-stream; charset=utf-8"})
    assert outcome(answer, body) == said


def test_a_refusal_says_when_to_come_back_and_others_whose_they_are() -> None:
    assert outcome(httpx.Response(202), b"{}") == "202"
    assert outcome(httpx.Response(503, headers={"retry-after": "3"}), b"") == "503"
    assert outcome(httpx.Response(503), b"") == "503 without Retry-After"
    assert outcome(httpx.Response(500), b"Internal Server Error") == "500 b'Internal Server Error'"


def test_a_run_that_killed_too_little_or_asked_too_little_is_not_a_good_one() -> None:
    outside = dict.fromkeys(EXPECTED, 3)
    good: dict[str, Any] = {"troubles": [], "never_killed": [], "outside_windows": outside}
    good["chats_within_windows"] = {"engine": {"503": 4}, "trainer": {"200": 9}}
    assert faults(good) == []
    for change, words in (
        ({"never_killed": ["engine", "proxy"]}, "never killed: engine, proxy; give it more"),
        ({"outside_windows": {**outside, "chat 503": 1}}, "'chat 503': 1"),
        ({"outside_windows": {"chat 200": 9}}, "never seen"),
        ({"chats_within_windows": {"trainer": {"200": 9, "503": 1}}}, "while the trainer"),
        ({"troubles": ["teach: it broke"]}, "it broke"),
    ):
        (found,) = faults(good | change)
        assert words in found


def test_only_what_overlaps_no_restart_is_held_against_the_cell() -> None:
    soak = Soak("http://127.0.0.1:1")
    soak.windows = [Window("engine", 10, 20), Window("proxy", 40)]
    soak.answers = [
        Answer("chat", 1, 9, "200"),
        Answer("chat", 9, 11, "200 cut short"),
        Answer("chat", 12, 13, "503"),
        Answer("teach", 19, 25, "ReadError"),
        Answer("chat", 21, 22, "500"),
        Answer("chat", 39, 41, "503"),
        Answer("dream", 50, 51, "ConnectError"),
    ]
    assert soak.outside() == {"chat 200": 1, "chat 500": 1}
    assert set(soak.outside()) - EXPECTED == {"chat 500"}
    assert soak.chats_within() == {"engine": {"200 cut short": 1, "503": 1}, "proxy": {"503": 1}}


def test_a_slope_is_that_of_one_process_since_a_time_and_the_largest_of_a_role() -> None:
    def seen(pid: int, per_minute: float, jump: int = 0) -> list[tuple[str, int, float, int]]:
        return [
            ("trainer", pid, 10.0 * at, round(1e9 + 1e6 * per_minute * at / 6) + jump * (at < 3))
            for at in range(20)
        ]

    assert slopes(seen(1, 0.0), 0) == {"trainer": pytest.approx(0)}
    assert slopes(seen(1, 3.0) + seen(2, 5.0), 0) == {"trainer": pytest.approx(5)}
    assert slopes(seen(1, 3.0, jump=10**8), 30) == {"trainer": pytest.approx(3)}
    assert slopes(seen(1, 3.0)[:4], 0) == {}, "too few to tell"


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["ray::TrainerActor"], "TrainerActor"),
        (["ray::ServeReplica:reverie:ingress"], "ServeReplica"),
        (["ray::IDLE"], None),
        (["VLLM::EngineCore"], "VLLM::EngineCore"),
        (["/usr/bin/python3", "-u", "/x/ray/dashboard/dashboard.py", "--port=1"], "dashboard"),
        (["/x/ray/core/src/ray/raylet/raylet", "--node=1"], "raylet"),
        ([], None),
    ],
)
def test_a_process_is_called_what_ps_calls_it(command: list[str], role: str | None) -> None:
    assert role_of(command) == role
