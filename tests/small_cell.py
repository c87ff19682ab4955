"""Trainer and checkpoint actor in one process, over a small Llama in shared memory, without Ray.

    boot(home, run) -> SmallCell        as a cell boots, from whatever is on disk there
    teach, settle, commit, forget ...   as clients would

The actors are the real ones, with their ledger, journal and learner; only what carries calls
between them is replaced by a direct call.
"""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import ray
import torch

from actors.checkpoint import Checkpointer
from actors.ledger import Ledger
from actors.messages import CellPaths, Checkpoint, TrainingSample
from actors.past import Forgotten
from actors.posted import CheckpointRequest, ForgetRequest, TrainConfig
from actors.recall import begin_from_public
from actors.settings import JournalSettings, Settings, TrainerSettings
from actors.traffic import Traffic
from actors.trainer import Trainer
from actors.versions import VersionCounter
from apollo.journal.disk import RealDisk
from apollo.journal.recovery import open_journal
from apollo.learning.noting import note_changes
from apollo.learning.step import Learner
from apollo.weights import manifest
from apollo.weights.attach import attach
from apollo.weights.layout import WeightLayout
from apollo.weights.manifest import Manifest
from apollo.weights.memory import Mapping
from tests.test_attach import recorded, saved_llama

NAME = "llama"
TIMEOUT_S = 60


def adopt(home: Path) -> None:
    """Put the model where a cell finds it."""
    directory = home / "models" / NAME
    directory.parent.mkdir(parents=True)
    saved_llama(directory, is_tied=False)
    manifest.write(directory, Manifest(NAME, "float32", manifest.sizes(directory)))


class Direct:
    """An actor's handle: `handle.method.remote(...)` calls it here and now."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


def sample(name: str) -> TrainingSample:
    """A sample whose tokens follow from its name."""
    ids = tuple(3 + (ord(letter) * 7 + at * 11) % 250 for at, letter in enumerate(name * 3))
    return TrainingSample(name, ids[:2], (*ids[2:], 9, 5), content_hash=name, source="test")


@dataclass
class SmallCell:
    """One boot."""

    trainer: Any
    checkpoint: Any
    paths: CellPaths
    layout: Any

    @property
    def ledger(self) -> Ledger:
        ledger: Ledger = self.trainer._ledger
        return ledger

    def teach(self, *names: str, epochs: int = 1, round_id: str | None = None) -> str:
        config = TrainConfig(learning_rate=1e-3, epochs=epochs)
        accepted = self.ledger.accept([sample(name) for name in names], config, 1000, round_id)
        self.trainer._wake.set()
        return accepted.job_id

    def settle(self) -> None:
        """Wait until nothing is queued."""
        self.wait(lambda: self.ledger.next_job() is None)

    def wait(self, is_so: Any) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_so():
            assert self.trainer._reason is None, self.trainer._reason
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def commit(self, *, publish: bool = False) -> Checkpoint:
        made: Checkpoint = self.checkpoint.commit(CheckpointRequest(publish=publish))
        return made

    def forget(self, name: str) -> Forgotten:
        done: Forgotten = self.checkpoint.forget(ForgetRequest(item=name))
        return done

    def order(self) -> list[str]:
        """Samples in the order in which the weights have learned them."""
        with self.ledger._lock:
            rows = self.ledger._db.execute("SELECT sample_id FROM steps ORDER BY version")
            return [row["sample_id"] for row in rows]

    def state(self) -> dict[str, torch.Tensor]:
        """The live weights and the optimizer's moments, copied."""
        live = Mapping(self.layout, is_writable=False).tensors()
        optimizer = self.trainer._learner.optimizer
        moments = {
            f"{optimizer.name_of(param)}/{key}": value
            for param, state in optimizer.state.items()
            for key, value in state.items()
        }
        return {name: tensor.clone() for name, tensor in (live | moments).items()}


@contextmanager
def boot(
    home: Path, run: Path, *, moves: Literal["all", "changed"] = "all", **trainer: Any
) -> Iterator[SmallCell]:
    """Boot over what is on disk in `home`; `run` is a new directory, as the shared memory is.

    If it is that of an earlier boot, only what is around the engine boots again.
    """
    has_stale_weights = run.exists()
    run.mkdir(exist_ok=True)
    settings = Settings(
        home=home,
        trainer=TrainerSettings(nice=0, rank=4, update_proj_gap=3, duty=1.0, **trainer),
        journal=JournalSettings(keep_all_s=10**6, moves=moves),
    )
    open_journal(RealDisk(home), NAME)
    model_dir = home / "models" / NAME
    paths = CellPaths(str(model_dir), str(run), str(home / "state" / NAME / "ledger.sqlite"))
    if not has_stale_weights:
        recorded(model_dir, Path(paths.weights)).save(Path(paths.layout))
        VersionCounter.create(paths.versions)
        Traffic.create(paths.traffic)
    layout = WeightLayout.load(Path(paths.layout))
    made: Any = Trainer(settings, paths)
    made._learner = Learner(
        attach(layout, model_dir),
        rank=4,
        update_proj_gap=3,
        seed=settings.trainer.seed,
        breathe=made._throttle.breathe,
    )
    made._ledger = Ledger(paths.ledger)
    found = made._learner.optimizer, made._ledger, made._versions
    generation = begin_from_public(home, paths, *found, has_stale_weights=has_stale_weights)
    checkpoint: Any = Checkpointer(settings, paths, Direct(made))  # type: ignore[arg-type]
    checkpoint._tensors = Mapping(layout, is_writable=False).tensors()
    checkpoint._journal = open_journal(RealDisk(home), NAME).journal
    if moves == "changed":
        note_changes(made._learner, layout, Path(paths.changed), generation)
    checkpoint._open_maps()
    answered, ray.get = ray.get, lambda answer, timeout=None: answer
    try:
        with closing(made._ledger):
            made._thread.start()
            yield SmallCell(made, checkpoint, paths, layout)
            made._stopping.set()
            made._wake.set()
            made._thread.join(TIMEOUT_S)
    finally:
        ray.get = answered
