"""Settings: every knob has a documented, valid default, and whatever is wrong is named."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from actors.errors import SettingsError
from actors.settings import CellSettings, EngineSettings, LimitSettings, Settings, TrainerSettings

GROUPS = (Settings, EngineSettings, TrainerSettings, LimitSettings, CellSettings)


def test_defaults_are_valid_and_stay_on_this_machine(tmp_path: Path) -> None:
    settings = Settings.from_pairs({"home": str(tmp_path)})
    assert settings.is_loopback and settings.home == tmp_path
    assert Settings.model_validate(settings.model_dump()) == settings


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_default_passes_its_own_check(group: type[BaseModel]) -> None:
    defaults = {name: field.get_default() for name, field in group.model_fields.items()}
    given = {name: value for name, value in defaults.items() if value is not None}
    group.model_validate(given)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_field_is_explained(group: type[BaseModel]) -> None:
    for name, field in group.model_fields.items():
        inner = field.annotation
        is_group = isinstance(inner, type) and issubclass(inner, BaseModel)
        explanation = inner.__doc__ if is_group else field.description
        assert explanation and explanation.strip().endswith((".", ").")), f"{name}: {explanation}"


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REVERIE_HOME", str(tmp_path))
    assert Settings.from_pairs({}).home == tmp_path
    monkeypatch.delenv("REVERIE_HOME")
    assert Settings.from_pairs({}).home == Path.home() / ".reverie"


def test_a_word_of_a_command_line_turns_off_what_may_be_absent() -> None:
    settings = Settings.from_pairs({"trainer.latency_budget_ms": "none", "trainer.clip": "none"})
    assert settings.trainer.latency_budget_ms is None and settings.trainer.clip is None
    with pytest.raises(SettingsError, match="rank"):
        Settings.from_pairs({"trainer.rank": "none"})


def test_dotted_pairs_of_strings_reach_their_fields() -> None:
    settings = Settings.from_pairs(
        {
            "port": "9001",
            "engine.threads": "2",
            "engine.enforce_eager": "false",
            "trainer.duty": "0.5",
            "trainer.beta2": 0.95,
            "model": "org/name",
            "host": "::1",
        }
    )
    assert (settings.port, settings.model, settings.is_loopback) == (9001, "org/name", True)
    assert (settings.engine.threads, settings.engine.enforce_eager) == (2, False)
    assert (settings.trainer.duty, settings.trainer.beta2) == (0.5, 0.95)
    assert settings.trainer.rank == TrainerSettings().rank


@pytest.mark.parametrize(
    ("pairs", "named"),
    [
        ({"modle": "x"}, "unknown setting modle"),
        ({"engine.thread": 2}, "unknown setting engine.thread"),
        ({"trainer.engine.threads": 2}, "unknown setting trainer.engine"),
        ({"": 1}, "unknown setting"),
        ({"port": "many"}, "port='many'"),
        ({"port": 0}, "port=0"),
        ({"port": 65536}, "port=65536"),
        ({"trainer.duty": 0}, "trainer.duty=0"),
        ({"trainer.duty": 1.5}, "trainer.duty=1.5"),
        ({"trainer.duty": "nan"}, "trainer.duty='nan'"),
        ({"trainer.rank": 0}, "trainer.rank=0"),
        ({"trainer.rounding": "up"}, "trainer.rounding='up'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"host": "example.org"}, "host='example.org' is not an IP address; use 127.0.0.1"),
        ({"host": ""}, "host='' is not an IP address"),
        ({"engine": 3}, "engine=3"),
        ({"engine": 3, "engine.threads": 2}, "engine.threads: 'engine' is not a group"),
        ({"port.x": 1, "port": 2}, "port"),
        ({"model.name": "x"}, "model="),
    ],
    ids=str,
)
def test_wrong_pair_is_named(pairs: dict[str, Any], named: str) -> None:
    if named == "port":
        assert Settings.from_pairs(pairs).port == 2, "the later pair of one key wins"
        return
    with pytest.raises(SettingsError) as refused:
        Settings.from_pairs(pairs)
    assert named in str(refused.value)


def test_every_wrong_pair_is_named_at_once() -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_pairs({"modle": "x", "trainer.rank": 0})
    assert "modle" in str(refused.value) and "trainer.rank" in str(refused.value)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
    ],
)
def test_only_this_machine_counts_as_loopback(host: str, is_loopback: bool) -> None:
    assert Settings.from_pairs({"host": host}).is_loopback is is_loopback


def test_settings_cannot_be_rewritten() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1
    with pytest.raises(ValidationError, match="frozen"):
        settings.engine.threads = 4


def test_settings_of_dreams_are_read_from_words_and_checked_together() -> None:
    assert Settings.from_pairs({"dream.canaries": "16"}).dream.canaries == 16
    with pytest.raises(SettingsError, match="dream.canaries='12'.*choose 8, 16, 32 or 64"):
        Settings.from_pairs({"dream.canaries": "12"})
    assert Settings.from_pairs({"dream.budgets.max_kl": "0.1"}).dream.budgets.max_kl == 0.1
    with pytest.raises(SettingsError, match="min_divergence=4 is not below max_divergence=3"):
        Settings.from_pairs({"dream.min_divergence": "4"})
