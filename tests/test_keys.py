"""Keys: who may use, who may teach, and what lies on the disk."""

import stat
from pathlib import Path

import pytest

from actors.errors import (
    NotAuthenticated,
    NotPermitted,
    SettingsError,
)
from door.keys import KeyStore, Scope


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path)


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_without_keys_there_is_no_id_to_report(keys: KeyStore) -> None:
    assert keys.records() == []
    assert keys.check(None, "teach") is None


def test_use_key_may_use_and_not_teach(keys: KeyStore) -> None:
    key = keys.add("use")
    assert keys.check(bearer(key), "use") == keys.records()[0]["id"]
    with pytest.raises(NotPermitted, match="--scope teach"):
        keys.check(bearer(key), "teach")


def test_teach_key_may_do_both(keys: KeyStore) -> None:
    keys.add("use")
    key = keys.add("teach")
    scopes: tuple[Scope, ...] = ("use", "teach")
    for scope in scopes:
        assert keys.check(bearer(key), scope) == keys.records()[1]["id"]
    assert keys.check(f"bearer  {key} ", "teach") == keys.records()[1]["id"]


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer rv-wrong", "Basic {key}", "{key}", "Bearer {key}x"],
)
def test_other_header_is_not_authenticated(keys: KeyStore, header: str | None) -> None:
    key = keys.add("teach")
    with pytest.raises(NotAuthenticated, match="reverie keys add"):
        keys.check(header.format(key=key) if header else header, "use")


def test_hash_of_a_key_is_no_key(keys: KeyStore) -> None:
    keys.add("teach")
    with pytest.raises(NotAuthenticated):
        keys.check(bearer(keys.records()[0]["sha256"]), "use")


def test_key_is_hashed_at_rest_and_the_file_is_private(keys: KeyStore, tmp_path: Path) -> None:
    key = keys.add("use")
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]
    assert key.removeprefix("rv-") not in (tmp_path / "keys.json").read_text()
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600


def test_keys_change_while_serving(keys: KeyStore, tmp_path: Path) -> None:
    first = keys.add("use")
    command_line = KeyStore(tmp_path)
    second = command_line.add("use")
    first_id = keys.check(bearer(first), "use")
    assert keys.check(bearer(second), "use") != first_id
    assert command_line.remove(str(first_id))
    with pytest.raises(NotAuthenticated):
        keys.check(bearer(first), "use")
    keys.check(bearer(second), "use")
    assert not command_line.remove(str(first_id)), "it is gone already"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 2, "keys": []}', '{"keys": []}', '{"format": 1}']
)
def test_damaged_file_lets_nobody_in(keys: KeyStore, tmp_path: Path, text: str) -> None:
    key = keys.add("teach")
    (tmp_path / "keys.json").write_text(text)
    for store in (keys, KeyStore(tmp_path)):
        with pytest.raises(SettingsError, match=r"keys\.json cannot be read"):
            store.check(bearer(key), "use")
