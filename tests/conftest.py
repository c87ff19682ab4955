"""What tests share: one home for the session, and in it the adopted default model."""

import os
from pathlib import Path

import pytest

from apollo.weights.adopt import adopt


@pytest.fixture(scope="session")
def reverie_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A REVERIE_HOME for the session; REVERIE_TEST_HOME keeps one between sessions."""
    kept = os.environ.get("REVERIE_TEST_HOME")
    return Path(kept) if kept else tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def model_dir(reverie_home: Path) -> Path:
    """The default model, adopted (some 20 s the first time). Shared: copy before changing it."""
    return adopt("smollm2-135m", reverie_home, "float32", print).directory
