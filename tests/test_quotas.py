"""Quotas, rotation and expiry of keys: exact to the second with a clock that is set by hand."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.errors import Conflict, NotAuthenticated, OverQuota, SettingsError, Unrecorded
from door import quotas
from door.keys import DAY_S, MAX_PREVIOUS, KeyStore, Quotas
from door.quotas import BYTES_PER_TOKEN, Meter, Tally
from tests.open_door import OpenDoor, client, opened, train_body

NOON = 20_000 * DAY_S + DAY_S / 2


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path)


class Clocks:
    """A day's and a minute's clock, which move together."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def meter(tmp_path: Path, clocks: Clocks) -> Meter:
    return Meter(tmp_path, clocks, clocks)


def record(key: str = "k", **limits: int) -> dict[str, Any]:
    return {"id": key, "quotas": limits}


# Rotation and expiry.


def test_after_a_rotation_both_secrets_are_one_key_until_the_overlap_ends(
    keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, now = keys.add("teach"), time.time()
    (made,) = keys.records()
    new = keys.rotate(made["id"], overlap_s=60)
    assert new is not None and new != old
    running = KeyStore(keys._path.parent)
    assert running.check(f"Bearer {old}", "teach") == running.check(f"Bearer {new}", "teach")
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert running.check(f"Bearer {new}", "teach") == made["id"]
    with pytest.raises(NotAuthenticated):
        running.check(f"Bearer {old}", "teach")
    assert old.removeprefix("rv-") not in keys._path.read_text()


def test_without_an_overlap_the_old_secret_is_refused_at_once(keys: KeyStore) -> None:
    old = keys.add("use")
    keys.rotate(keys.records()[0]["id"], overlap_s=0)
    with pytest.raises(NotAuthenticated):
        keys.check(f"Bearer {old}", "use")


def test_a_key_rotated_many_times_has_a_bounded_number_of_secrets(keys: KeyStore) -> None:
    secrets = [keys.add("use")]
    key_id = keys.records()[0]["id"]
    secrets += [str(keys.rotate(key_id)) for _ in range(MAX_PREVIOUS + 2)]
    taken = []
    for secret in secrets:
        try:
            keys.check(f"Bearer {secret}", "use")
            taken.append(secret)
        except NotAuthenticated:
            continue
    assert taken == secrets[-1 - MAX_PREVIOUS :]
    assert keys.rotate("none") is None


def test_an_expired_key_is_refused_and_says_so(
    keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, now = keys.add("use", expires_in_s=60), time.time()
    assert keys.check(f"Bearer {key}", "use")
    monkeypatch.setattr(time, "time", lambda: now + 61)
    with pytest.raises(NotAuthenticated, match="expired"):
        keys.check(f"Bearer {key}", "use")


def test_a_file_from_before_there_were_quotas_is_read_and_kept_as_it_was(
    keys: KeyStore, tmp_path: Path
) -> None:
    key = keys.add("use")
    stored = json.loads((tmp_path / "keys.json").read_text())
    assert set(stored["keys"][0]) == {"id", "scope", "sha256", "created"}
    assert keys.find(f"Bearer {key}", "use") == stored["keys"][0]
    key_id = stored["keys"][0]["id"]
    assert keys.limit(key_id, {"tokens_per_day": 5}) == Quotas(tokens_per_day=5)
    assert keys.records()[0]["quotas"] == {"tokens_per_day": 5}
    both = keys.limit(key_id, {"ongoing": 2})
    assert both == Quotas(tokens_per_day=5, ongoing=2), "what is not named stays"
    assert keys.limit(key_id, {"tokens_per_day": None}) == Quotas(ongoing=2)
    with pytest.raises(SettingsError, match="ongoing=0"):
        keys.limit(key_id, {"ongoing": 0})
    assert keys.records()[0]["quotas"] == {"ongoing": 2}
    assert keys.limit("none", {}) is None


@pytest.mark.parametrize(
    "more",
    [
        {"quotas": {"tokens_per_week": 1}},
        {"quotas": {"tokens_per_day": "many"}},
        {"quotas": {"requests_per_minute": 0}},
        {"quotas": [1]},
        {"expires": "soon"},
        {"previous": [{"sha256": 3, "until": 1}]},
        {"previous": [{"until": 1}]},
    ],
)
def test_a_record_that_is_not_understood_lets_nobody_in(
    keys: KeyStore, tmp_path: Path, more: dict[str, Any]
) -> None:
    key = keys.add("teach")
    stored = json.loads((tmp_path / "keys.json").read_text())
    stored["keys"][0] |= more
    (tmp_path / "keys.json").write_text(json.dumps(stored))
    for _ in range(2):
        with pytest.raises(SettingsError, match=r"keys\.json cannot be read"):
            keys.check(f"Bearer {key}", "use")


# Counting.


def test_no_more_than_the_quota_in_any_sixty_seconds(meter: Meter, clocks: Clocks) -> None:
    asked = []
    for second in range(300):
        clocks.now = NOON + second
        try:
            meter.enter(record(requests_per_minute=7))()
            asked.append(second)
        except OverQuota as error:
            assert error.param == "requests_per_minute" and error.retry_after_s is not None
            meter.enter(record("other"))()
    assert all(sum(0 <= b - a < 60 for b in asked) <= 7 for a in asked) and len(asked) == 35


def test_retry_after_is_when_it_succeeds(meter: Meter, clocks: Clocks) -> None:
    meter.enter(record(requests_per_minute=1))
    clocks.now += 20.5
    with pytest.raises(OverQuota) as refused:
        meter.enter(record(requests_per_minute=1))
    assert refused.value.retry_after_s == 40
    clocks.now += 40
    meter.enter(record(requests_per_minute=1))


def test_requests_at_once_are_bounded_and_given_back(meter: Meter) -> None:
    leave = meter.enter(record(ongoing=1))
    with pytest.raises(OverQuota, match="1 ongoing"):
        meter.enter(record(ongoing=1))
    meter.enter(record("other", ongoing=1))
    leave()
    meter.enter(record(ongoing=1))


async def test_tokens_are_refused_from_the_quota_on_until_midnight(
    meter: Meter, clocks: Clocks
) -> None:
    of = record(tokens_per_day=10)
    for _ in range(2):
        meter.enter(of)()
        tally = meter.tally(of, b"")
        assert tally is not None
        tally.take(b'{"usage": {"total_tokens": 6}}')
        tally.end(False)
    with pytest.raises(OverQuota) as refused:
        meter.enter(of)
    assert (refused.value.param, refused.value.retry_after_s) == ("tokens_per_day", 43_200)
    clocks.now += DAY_S / 2
    meter.enter(of)


async def test_samples_that_were_refused_are_not_counted(meter: Meter) -> None:
    of = record(samples_per_day=4)
    for error in (Conflict("twice"), Unrecorded("full")):
        with pytest.raises(type(error)), meter.samples(of, 3):
            raise error
    with meter.samples(of, 3):
        pass
    with pytest.raises(OverQuota, match="4 samples per day"), meter.samples(of, 2):
        raise AssertionError("it was not to come to this")
    with meter.samples(None, 10**9):
        pass


async def test_a_restart_knows_the_day_and_another_day_begins_at_nothing(
    tmp_path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "WRITE_INTERVAL_S", 0.01)
    meter = Meter(tmp_path, clocks, clocks)
    with meter.samples(record(samples_per_day=4), 3):
        pass
    assert not (tmp_path / "usage.json").exists(), "no request waits for the disk"
    await asyncio.wait_for(meter._writing or asyncio.sleep(0), 10)
    assert (tmp_path / "usage.json").stat().st_mode & 0o777 == 0o600
    assert Meter(tmp_path, clocks).used("k", "samples_per_day") == 3
    clocks.now += DAY_S
    assert Meter(tmp_path, clocks).used("k", "samples_per_day") == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1, "day": 1}', "7"])
def test_a_damaged_file_of_uses_is_no_reason_to_refuse(
    tmp_path: Path, clocks: Clocks, text: str
) -> None:
    (tmp_path / "usage.json").write_text(text)
    assert Meter(tmp_path, clocks).used("k", "tokens_per_day") == 0


# What counts the tokens of an answer.


def counted(parts: list[bytes], *, asked: int = 0, is_stream: bool = True) -> int:
    found: list[int] = []
    tally = Tally(asked, found.append)
    for part in parts:
        tally.take(part)
    tally.end(is_stream)
    return sum(found)


STREAM = b'data: {"a": 1}\n\n' * 5 + b"data: [DONE]\n\n"
NAMED = STREAM[:-14] + b'data: {"usage": {"total_tokens": 123}}\n\n' + STREAM[-14:]


@pytest.mark.parametrize("size", [1, 7, 31, 32, 33, 1000])
def test_an_answer_counts_the_same_however_it_is_cut(size: int) -> None:
    def cut(text: bytes) -> list[bytes]:
        return [text[at : at + size] for at in range(0, len(text), size)]

    assert counted(cut(STREAM), asked=40 * BYTES_PER_TOKEN) == 46
    assert counted(cut(NAMED), asked=40 * BYTES_PER_TOKEN) == 123
    assert counted(cut(b'{"usage": {"total_tokens": 9}}'), is_stream=False) == 9


def test_words_of_the_model_or_of_the_client_are_no_usage() -> None:
    said = json.dumps({"content": '"total_tokens": 999999', "usage": {"total_tokens": 5}})
    assert counted([said.encode()], is_stream=False) == 5
    told = '{"tools": {"total_tokens": 0}, "usage": {"total_tokens": 8}}'
    assert counted([told.encode()], is_stream=False) == 8
    assert counted([b'{"tokens": [1, 2]}'], is_stream=False) == 0


# Through the door.


@contextmanager
def limited(door: OpenDoor, **limits: int) -> Iterator[str]:
    yield door._keys.add("teach", Quotas(**limits))


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[OpenDoor]:
    async with opened(tmp_path / "home") as made:
        yield made


async def test_each_quota_is_said_by_its_name_with_retry_after(door: OpenDoor) -> None:
    for limits, num_taken, ask in (
        ({"requests_per_minute": 2}, 2, ("GET", "/status", None)),
        ({"samples_per_day": 2}, 2, ("POST", "/train", train_body())),
        ({"tokens_per_day": 10}, 2, ("POST", "/v1/chat/completions", {"messages": []})),
    ):
        with limited(door, **limits) as key:
            async with client(key) as http:
                answers = [await http.request(*ask[:2], json=ask[2]) for _ in range(num_taken + 1)]
        assert [each.status_code for each in answers[:-1]] == [answers[0].status_code] * num_taken
        assert answers[0].status_code < 300
        error = answers[-1].json()["error"]
        assert answers[-1].status_code == 429 and error["param"] == next(iter(limits))
        assert error["type"] == "rate_limit_error"
        assert int(answers[-1].headers["retry-after"]) >= 1


async def test_a_request_that_has_ended_however_it_did_leaves_room(door: OpenDoor) -> None:
    with limited(door, ongoing=1) as key:
        async with client(key) as http:
            for route in ("/status", "/train/jobs/none", "/nowhere", "/candidates?state=odd") * 2:
                assert (await http.get(route)).status_code != 429
            body = {"messages": [], "stream": True}
            for _ in range(3):
                assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert door._meter._ongoing == {}
