"""The dashboard that ships, against a real Prometheus that scrapes a real cell: no panel is empty.

Also what a trace leads to there: from a request to its job, and to the steps that have learned it.
"""

import json
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from actors.dream.store import DreamStore
from actors.events import NAME
from tests.conftest import RunningCell
from tests.prometheus import BINARY, Prometheus, watched

DASHBOARD: Final = Path(__file__).parents[1] / "observability" / "grafana.json"
TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
RAY_TIMEOUT_S: Final = 90
MEASURED: Final = {"version": -1, "measured": {"kl": 0.125}, "success": {}}
"""What the gate leaves behind; a whole dream round, for one number, would take minutes."""

pytestmark = [pytest.mark.cell, pytest.mark.timeout(600)]
needs_prometheus = pytest.mark.skipif(
    BINARY is None, reason="there is no prometheus; apt-get install prometheus"
)


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def queries() -> list[tuple[str, str]]:
    """Titles and expressions, with Grafana's own variable as Grafana would fill it in."""
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "5m"))
        for panel in panels()
        for target in panel["targets"]
    ]


def test_panels_lie_beside_each_other_and_take_their_data_from_one_source() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
        assert panel["targets"], panel["title"]


@pytest.fixture(scope="module")
def prometheus(cell: RunningCell, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with watched(cell.base, tmp_path_factory.mktemp("prometheus")) as made:
        made.wait(lambda: bool(made.ask("reverie_ready == 1")), "the first scrape")
        yield made


def ask(cell: RunningCell, tokens: int = 24) -> None:
    model = cell.get("/v1/models")["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me about the sea."}],
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{cell.base}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200 and "[DONE]" in answer.text


@pytest.fixture(scope="module")
def job(cell: RunningCell, untaught: None, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Everything that a panel tells of happens here, once, while Prometheus looks if it is here."""
    if BINARY is not None:
        request.getfixturevalue("prometheus")
    ask(cell)
    turns = [
        {"role": "user", "content": "What is the harbour called?"},
        {"role": "assistant", "content": "It is called Port Aster."},
    ]
    body = {"samples": [{"messages": turns}], "config": {"epochs": 8}}
    header = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    posted = httpx.post(f"{cell.base}/train", json=body, headers=header, timeout=60)
    assert posted.status_code == 202, posted.text
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, cell, 48)
        ended = cell.wait_job(posted.json()["job_id"])
        asking.result()
    saved = httpx.post(f"{cell.base}/checkpoint", json={}, timeout=300)
    assert saved.status_code == 200, saved.text
    (state,) = (cell.home / "state").iterdir()
    store = DreamStore(state / "dream.sqlite")
    store.write_note("last", MEASURED)
    store.close()
    return ended


@needs_prometheus
def test_every_querys_answer_has_data(
    cell: RunningCell, prometheus: Prometheus, job: dict[str, Any]
) -> None:
    def is_known() -> bool:
        steps = sum(prometheus.ask("reverie_steps_total").values())
        kept = sum(prometheus.ask("reverie_commit_seconds_count").values())
        return steps >= 8 and kept >= 1 and bool(prometheus.ask("reverie_drift_kl_nats"))

    prometheus.wait(is_known, "what was learned and kept")
    told = {query: prometheus.ask(query) for _, query in queries()}
    empty = [query for query, found in told.items() if not found]
    assert not empty, empty
    unclear = [
        (query, found)
        for query, found in told.items()
        if not any(math.isfinite(value) for value in found.values())
    ]
    assert not unclear, unclear
    during = {
        dict(labels)["during"] for labels in prometheus.ask("reverie_inter_token_seconds_count > 0")
    }
    assert during == {"idle", "training"}
    (target,) = prometheus.targets("reverie")
    assert target["health"] == "up" and not target["lastError"]


@needs_prometheus
def test_what_prometheus_keeps_is_what_the_cell_says(
    cell: RunningCell, prometheus: Prometheus, job: dict[str, Any]
) -> None:
    status = cell.get("/status")
    expected = {
        "reverie_weights_version": status["weights_version"],
        "reverie_generation": status["checkpoint"]["generation"],
        "reverie_public_generation": status["checkpoint"]["public_generation"],
        'reverie_ledger_samples{state="trained"}': status["trainer"]["samples"]["trained"],
        "reverie_drift_kl_nats": 0.125,
    }
    prometheus.wait(
        lambda: all(
            [*prometheus.ask(name).values()] == [value] for name, value in expected.items()
        ),
        str(expected),
    )
    assert "step_seconds" not in status["trainer"]


@needs_prometheus
def test_rays_exporter_has_the_same_numbers(
    cell: RunningCell, prometheus: Prometheus, job: dict[str, Any]
) -> None:
    prometheus.wait(lambda: bool(prometheus.targets("ray")), "Ray's own list of its exporters")
    version = cell.get("/status")["weights_version"]
    deadline = time.monotonic() + RAY_TIMEOUT_S
    while True:
        text = ""
        for each in prometheus.targets("ray"):
            # All clusters of a machine write the one list: it may name one that has just ended.
            with suppress(httpx.HTTPError):
                text += httpx.get(each["scrapeUrl"], timeout=30).text
        found = re.findall(r"^ray_reverie_weights_version\{.*\} ([0-9.e+]+)$", text, re.MULTILINE)
        if [float(value) for value in found] == [version]:
            break
        assert time.monotonic() < deadline, found
        time.sleep(1)
    assert re.search(
        r'^ray_reverie_step_seconds_bucket\{.*le="\+Inf".*\} [0-9.]+$', text, re.MULTILINE
    )
    assert not prometheus.ask('{__name__=~"ray_reverie_.*"}'), "they are dropped: the door has them"


def test_a_trace_leads_to_the_steps_that_have_learned_it(
    cell: RunningCell, job: dict[str, Any]
) -> None:
    assert job["status"] == "done" and job["trace"] == TRACE
    (state,) = (cell.home / "state").iterdir()
    lines = [json.loads(line) for line in (state / f"{NAME}.jsonl").read_text().splitlines()]
    ours = [line for line in lines if line.get("trace") == TRACE]
    assert [line["event"] for line in ours if line["event"] != "steps"] == [
        "accepted", "job_begun", "job_ended"
    ]  # fmt: skip
    steps = [line for line in ours if line["event"] == "steps"]
    assert (steps[0]["first_step"], steps[-1]["last_step"]) == (1, 8)
    assert steps[-1]["version"] == job["weights_version"]
    assert {line["job"] for line in ours} == {job["job_id"]}
    assert {"boot", "commit", "publication"} <= {line["event"] for line in lines}
