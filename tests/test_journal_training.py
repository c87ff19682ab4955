"""Learning goes on after a kill -9 as if nothing had been: weights and moments, bit by bit."""

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from actors.ledger import Ledger
from actors.recall import recall
from apollo.journal.chain import StoredFile
from apollo.journal.disk import RealDisk
from apollo.journal.journal import Journal
from apollo.journal.live import Staging
from apollo.journal.recovery import open_journal
from apollo.learning.samples import Example
from apollo.learning.step import Learner
from apollo.optim import state_file
from apollo.weights import manifest
from apollo.weights.manifest import Manifest
from tests.architectures import ARCHITECTURES

NAME = "llama"
BEFORE, LOST, AFTER = 5, 2, 4
"""Steps before the commit, between it and the kill, and after recovery."""
KINDS = ["float32", "bfloat16 stochastic", "bfloat16 corrected"]


def make(home: Path, dtype: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"]().to(getattr(torch, dtype))
    directory = home / "models" / NAME
    directory.mkdir(parents=True)
    model.save_pretrained(directory)
    manifest.write(directory, Manifest(NAME, dtype, manifest.sizes(directory)))


def learner_of(home: Path, rounding: str) -> Learner:
    """A learner over what is public; projections are drawn anew every third step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "models" / NAME, dtype="auto")
    return Learner(model, rank=4, update_proj_gap=3, rounding=rounding or "stochastic", seed=7)


def learn(learner: Learner, first: int, count: int) -> None:
    for step in range(first, first + count):
        learner.step(Example((1, 2, 3), (4 + step % 7, 5, 6, 9 + step % 5)), 1e-3)


def live(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in learner.module.named_parameters()}


def commit(journal: Journal, learner: Learner, version: int, home: Path) -> None:
    staging = Staging(live(learner))
    staging.copy()
    state_file.save(learner.optimizer, home / "state.safetensors")
    state = (home / "state.safetensors").read_bytes()
    journal.commit(staging.words(), version, state, learner.optimizer.num_steps)


def child(home: Path, rounding: str) -> None:
    """Learn, commit, learn on, and be killed with the last steps in memory only."""
    learner = learner_of(home, rounding)
    journal = open_journal(RealDisk(home), NAME).journal
    learn(learner, 0, BEFORE)
    commit(journal, learner, BEFORE, home)
    learn(learner, BEFORE, LOST)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_goes_on_bit_by_bit_after_a_kill(kind: str, tmp_path: Path) -> None:
    dtype, _, rounding = kind.partition(" ")
    make(tmp_path, dtype)
    whole = learner_of(tmp_path, rounding)
    learn(whole, 0, BEFORE + AFTER)

    code = (
        f"from tests.test_journal_training import *; child(Path({str(tmp_path)!r}), {rounding!r})"
    )
    root = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120)
    assert ended.returncode == -signal.SIGKILL

    recovered = open_journal(RealDisk(tmp_path), NAME)
    assert recovered.published == 1
    newest = recovered.journal.newest
    assert (newest.weights_version, newest.step) == (BEFORE, BEFORE)
    again = learner_of(tmp_path, rounding)
    assert newest.optimizer is not None
    stored = tmp_path / "state" / NAME / "journal" / newest.optimizer.name
    state_file.load(again.optimizer, stored)
    learn(again, BEFORE, AFTER)

    expected, found = live(whole), live(again)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    for one, other in zip(states(whole), states(again), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def states(learner: Learner) -> list[dict[str, Any]]:
    return [learner.optimizer.state[p] for g in learner.optimizer.param_groups for p in g["params"]]


def test_state_of_other_settings_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    make(tmp_path, "float32")
    one = learner_of(tmp_path, "")
    learn(one, 0, 2)
    path = tmp_path / "state.safetensors"
    state_file.save(one.optimizer, path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "models" / NAME)
    other = Learner(model, rank=8, update_proj_gap=3, seed=7)
    with pytest.raises(state_file.OtherOptimizer, match="settings have changed"):
        state_file.load(other.optimizer, path)
    assert not other.optimizer.state and other.optimizer.num_steps == 0
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(state_file.OtherOptimizer, match="cannot be read"):
        state_file.load(one.optimizer, path)
    assert one.optimizer.num_steps == 2 and one.optimizer.state


@pytest.mark.parametrize(("is_damaged", "is_checked"), [(False, True), (True, True), (True, False)])
def test_the_trainer_takes_back_whole_moments_only(
    tmp_path: Path, is_damaged: bool, is_checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged ones begin anew; the step count does not, so that no noise is drawn twice."""
    make(tmp_path, "float32")
    first = learner_of(tmp_path, "")
    journal = open_journal(RealDisk(tmp_path), NAME).journal
    learn(first, 0, BEFORE)
    commit(journal, first, BEFORE, tmp_path)
    stored = journal.newest.optimizer
    assert stored is not None
    if is_damaged:
        path = tmp_path / "state" / NAME / "journal" / stored.name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    open_journal(RealDisk(tmp_path), NAME)
    again = learner_of(tmp_path, "")
    if not is_checked:
        monkeypatch.setattr(StoredFile, "holds", lambda *_: True)
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        recall(tmp_path, NAME, again.optimizer, ledger)
    assert again.optimizer.num_steps == BEFORE
    if is_damaged:
        assert bool(again.optimizer.state) == (not is_checked), "the check is what finds it out"
        return
    for one, other in zip(states(first), states(again), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
