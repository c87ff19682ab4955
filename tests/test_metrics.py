"""What `/metrics` says: parsed by Prometheus' own library, from the records that actors report."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.distribution import NOTHING, SECONDS
from actors.messages import (
    CellReport,
    CheckpointReport,
    DreamReport,
    Footprint,
    SampleState,
    TrainerReport,
)
from actors.settings import Settings
from actors.versions import VersionCounter
from door.latencies import Latencies
from door.metrics import STATES, Metrics
from door.ray_metrics import RayMetrics
from tests.open_door import OpenDoor, client, opened

SAMPLES: dict[SampleState, int] = {"queued": 2, "trained": 5, "failed": 0, "cancelled": 0}


def report(**more: Any) -> CellReport:
    trainer = TrainerReport(
        1, 7, queued_samples=2, last_loss=0.5, learned_tokens=40, samples=SAMPLES,
        step_seconds=NOTHING.plus(0.15).plus(1.2).plus(10_000.0),
    )  # fmt: skip
    checkpoint = CheckpointReport(
        2, 3, 7, 2, changed_share=0.01, commit_bytes=77, commit_seconds=NOTHING.plus(4.0)
    )
    known: dict[str, Any] = {
        "trainer": trainer,
        "checkpoint": checkpoint,
        "dream": DreamReport(3, kl=0.25),
        "memory": {"trainer": Footprint(10, 20)},
    }
    return CellReport(0, "ready", None, None, (), 1, 1, **(known | more))


def values(text: str) -> dict[str, float]:
    """Samples by name and labels, as in `name{label=value}`."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def scrape(of: CellReport | None) -> dict[str, float]:
    return values(Metrics(Settings(), of, None, 4, Latencies()).text())


def test_every_number_of_the_reports_is_told() -> None:
    told = scrape(report())
    expected = {
        "reverie_ready": 1,
        "reverie_ongoing_requests": 4,
        "reverie_duty_limit": 1,
        "reverie_restarts_total": 1,
        "reverie_cell_state{state=ready}": 1,
        "reverie_cell_state{state=failed}": 0,
        "reverie_private_bytes{role=trainer}": 10,
        "reverie_steps_total": 3,
        "reverie_learned_tokens_total": 40,
        "reverie_step_seconds_bucket{le=0.1}": 0,
        "reverie_step_seconds_bucket{le=0.2}": 1,
        "reverie_step_seconds_bucket{le=600.0}": 2,
        "reverie_step_seconds_bucket{le=+Inf}": 3,
        "reverie_step_seconds_count": 3,
        "reverie_loss": 0.5,
        "reverie_duty": 1,
        "reverie_queued_samples": 2,
        "reverie_ledger_samples{state=trained}": 5,
        "reverie_ledger_samples{state=failed}": 0,
        "reverie_generation": 3,
        "reverie_public_generation": 2,
        "reverie_drift_changed_share": 0.01,
        "reverie_drift_kl_nats": 0.25,
        "reverie_commit_bytes_total": 77,
        "reverie_commit_seconds_sum": 4,
        "reverie_commit_stall_seconds_count": 0,
    }
    assert expected.items() <= told.items(), expected.items() - told.items()
    assert sum(told[f"reverie_cell_state{{state={state}}}"] for state in STATES) == 1


def test_what_is_not_known_is_left_out_and_not_zero() -> None:
    nothing = scrape(None)
    assert nothing["reverie_ready"] == 0 and "reverie_restarts_total" not in nothing
    away = scrape(report(trainer=None, dream=None))
    assert "reverie_loss" not in away and "reverie_generation" in away
    assert "reverie_drift_kl_nats" not in scrape(report(dream=DreamReport(3)))


def test_a_distribution_counts_at_its_bounds_and_changes_no_older_one() -> None:
    first = NOTHING.plus(SECONDS[0])
    both = first.plus(SECONDS[0] + 1e-9)
    assert (first.counts[:2], both.counts[:2]) == ((1, 0), (1, 1))
    assert NOTHING.counts == (0,) * len(NOTHING.counts) and sum(both.counts) == 2


def scraped(text: str) -> dict[str, float]:
    """Without what the made-up engine adds, which is none."""
    return values("".join(line for line in text.splitlines(keepends=True) if line[0] in "#r"))


# Latencies.


@pytest.fixture
def versions(tmp_path: Path) -> VersionCounter:
    return VersionCounter.create(str(tmp_path / "versions"))


def counts(latencies: Latencies) -> dict[tuple[str, str], int]:
    told = values(Metrics(Settings(), None, None, 0, latencies).text())
    return {
        (name, during): int(told[f"reverie_{name}_token_seconds_count{{during={during}}}"])
        for name in ("first", "inter")
        for during in ("idle", "training")
    }


def test_a_wait_is_training_if_a_step_was_computed_in_any_part_of_it(
    versions: VersionCounter,
) -> None:
    latencies = Latencies()
    pace = latencies.pace(versions)
    pace.first()
    pace.gap(0.01)  # Between the role and the first token.
    pace.gap(0.01)
    with versions.step():
        pace.gap(0.01)
    pace.gap(0.01)
    pace.gap(0.01)
    with versions.step():
        pass
    pace.gap(0.01)
    assert counts(latencies) == {
        ("first", "idle"): 1,
        ("first", "training"): 0,
        ("inter", "idle"): 2,
        ("inter", "training"): 3,
    }
    with versions.step():
        pace = latencies.pace(versions)
    pace.first()
    assert counts(latencies)["first", "training"] == 1


def test_a_step_that_breaks_off_is_over(versions: VersionCounter) -> None:
    with pytest.raises(ZeroDivisionError), versions.step():
        assert versions.half_steps % 2 == 1
        raise ZeroDivisionError
    assert versions.half_steps % 2 == 0


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[OpenDoor]:
    async with opened(tmp_path / "home") as made:
        yield made


async def test_streams_are_measured_and_whole_answers_are_not(door: OpenDoor) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi, and once more: hi."}]}
    async with client() as http:
        assert (await http.post("/v1/chat/completions", json=asked)).status_code == 200
        before = scraped((await http.get("/metrics")).text)
        streamed = asked | {"stream": True}
        assert (await http.post("/v1/chat/completions", json=streamed)).status_code == 200
        after = scraped((await http.get("/metrics")).text)
    first = "reverie_first_token_seconds_count{during=idle}"
    assert (before[first], after[first]) == (0, 1)


async def test_counters_do_not_go_back_with_scrapes(door: OpenDoor) -> None:
    trainer = TrainerReport(1, 0, step_seconds=NOTHING.plus(1.0), learned_tokens=3)
    door._report = report(trainer=trainer)
    async with client() as http:
        told = [scraped((await http.get("/metrics")).text) for _ in range(3)]
    assert {each["reverie_steps_total"] for each in told} == {1}
    assert {each["reverie_learned_tokens_total"] for each in told} == {3}


# Through Ray.


async def test_ray_is_told_every_sample_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self._name, self._keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == self._keys
            told[self._name + "".join(f"{{{key}={tags[key]}}}" for key in sorted(tags))] = value

    monkeypatch.setattr("door.ray_metrics.Gauge", Gauge)
    metrics = Metrics(Settings(), report(), None, 0, Latencies())
    ray = RayMetrics(600)
    await ray.tell(metrics)
    assert told["reverie_steps_total"] == 3 and told["reverie_step_seconds_bucket{le=+Inf}"] == 3
    told.clear()
    await ray.tell(metrics)
    assert not told, "it was not time"
    ray._due = 0
    await ray.tell(metrics)
    assert told


async def test_whatever_ray_has_the_door_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no Ray")

    monkeypatch.setattr("door.ray_metrics.Gauge", broken)
    await RayMetrics(1).tell(Metrics(Settings(), report(), None, 0, Latencies()))
    await RayMetrics(0).tell(Metrics(Settings(), report(), None, 0, Latencies()))
