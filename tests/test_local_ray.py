"""Ray as it is started here: its token is nobody else's to read, and it is found where it is."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.errors import SettingsError
from actors.local_ray import (
    ADDRESS,
    CLUSTER,
    MODE,
    TOKEN,
    TOKEN_PATH,
    join_here,
    require_token,
    start_here,
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)
    yield tmp_path
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_that_only_this_user_reads_whatever_the_umask(home: Path) -> None:
    environment: dict[str, str] = {}
    path = require_token(environment)
    assert path == home / ".ray" / "auth_token" and environment == {MODE: "token"}
    assert mode_of(path) == 0o600 and mode_of(path.parent) == 0o700
    made = path.read_text()
    assert len(made) == 64 and require_token({}) == path and path.read_text() == made
    assert os.listdir(path.parent) == ["auth_token"]


def test_a_token_that_others_may_read_is_closed_and_kept(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("t" * 64)
    assert mode_of(path) == 0o666
    require_token({})
    assert mode_of(path) == 0o600 and path.read_text() == "t" * 64


def test_an_empty_file_is_no_token(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.touch()
    require_token({})
    assert len(path.read_text()) == 64 and mode_of(path) == 0o600


@pytest.mark.parametrize("environment", [{MODE: "disabled"}, {TOKEN: "t"}])
def test_what_somebody_has_chosen_is_respected(home: Path, environment: dict[str, str]) -> None:
    before = dict(environment)
    assert require_token(environment) is None
    assert environment == {MODE: "token"} | before and not (home / ".ray").exists()


def test_a_file_that_is_named_is_made_there(home: Path) -> None:
    path = home / "token"
    assert require_token({TOKEN_PATH: str(path)}) == path
    assert mode_of(path) == 0o600 and not (home / ".ray").exists()


def test_where_it_cannot_be_made_the_remedy_is_said(home: Path) -> None:
    (home / ".ray").write_text("no folder")
    with pytest.raises(SettingsError, match=TOKEN_PATH):
        require_token({})


def test_it_is_started_on_the_loopback_address_with_a_token(home: Path) -> None:
    environment: dict[str, str] = {}
    start_here(environment)
    assert environment == {MODE: "token", CLUSTER: "0"}
    chosen = {MODE: "disabled", CLUSTER: "1"}
    start_here(chosen)
    assert chosen == {MODE: "disabled", CLUSTER: "1"}


@pytest.mark.parametrize(
    ("named", "noted", "is_here"),
    [
        (None, "127.0.0.1:6379", True),
        ("auto", "127.0.0.1:6379\n", True),
        (None, "192.0.2.2:6379", False),
        ("127.0.0.1:7000", "192.0.2.2:6379", True),
        ("192.0.2.2:6379", "127.0.0.1:6379", False),
        (None, None, False),
    ],
)
def test_a_node_on_the_loopback_address_is_joined_there(
    tmp_path: Path, named: str | None, noted: str | None, is_here: bool
) -> None:
    environment = {} if named is None else {ADDRESS: named}
    if noted is not None:
        (tmp_path / "current").write_text(noted)
    join_here(environment, tmp_path / "current")
    assert environment.get(CLUSTER) == ("0" if is_here else None)
