"""What the soak counts: requests outside the restart windows, and memory that grows."""

import pytest

from experiments.soak import EXPECTED, Answer, Soak, Window, role_of, slopes


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
