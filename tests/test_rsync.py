"""A machine without rsync is told so."""

import shutil

import pytest

from actors.errors import SettingsError
from actors.rsync import require_rsync


def test_a_missing_rsync_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SettingsError, match="there is no rsync; install it"):
        require_rsync()
