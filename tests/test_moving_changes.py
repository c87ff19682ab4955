"""A commit that moves only what has changed keeps what a copy of everything would have kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import CheckpointFailed
from actors.keeper import Keeper
from actors.posted import RollbackRequest
from apollo.journal.changed import ChangedWords
from apollo.journal.disk import DiskFull, RealDisk
from apollo.journal.live import ChangedStaging, Staging
from apollo.optim.changes import pack
from apollo.weights.change_maps import ChangeMaps
from apollo.weights.layout import LayoutError
from apollo.weights.memory import Mapping
from tests.small_cell import SmallCell, adopt, boot
from tests.test_journal import values


@settings(deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 30),
    share=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    bits=st.sampled_from([16, 32]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_stretch_of_a_tensor_is_brought_to_what_it_is_now(
    rows: int, columns: int, share: float, bits: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 2**bits, (rows, columns), f"u{bits // 8}")
    is_changed = rng.random((rows, columns)) < share
    new = np.where(is_changed, old + old.dtype.type(1), old)
    octets_io = pack(torch.from_numpy(is_changed)).numpy()
    changed = ChangedWords(octets_io, columns, new[is_changed])
    first = data.draw(st.integers(0, rows * columns - 1))
    num = data.draw(st.integers(1, rows * columns - first))
    stretch = old.reshape(-1)[first : first + num].copy()
    where, words = changed.between(first, num)
    stretch[where] = words
    assert np.array_equal(stretch, new.reshape(-1)[first : first + num])
    assert len(where) == np.count_nonzero(is_changed.reshape(-1)[first : first + num])


class Moved:
    """How each commit has taken the weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds: list[str] = []
        choose = Keeper._staging

        def noted(keeper: Keeper) -> Staging | ChangedStaging:
            chosen = choose(keeper)
            self.kinds.append("all" if isinstance(chosen, Staging) else "changed")
            return chosen

        monkeypatch.setattr(Keeper, "_staging", noted)

    def last(self) -> str:
        (kind,), self.kinds = self.kinds, []
        return kind


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Moved:
    return Moved(monkeypatch)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    adopt(tmp_path)
    return tmp_path


@pytest.fixture
def cell(home: Path) -> Iterator[SmallCell]:
    with boot(home, home / "run", moves="changed") as made:
        yield made


def teach_and_commit(cell: SmallCell, *names: str) -> None:
    cell.teach(*names)
    cell.settle()
    cell.commit()


def assert_kept(cell: SmallCell) -> None:
    """The newest generation holds every bit of the live weights."""
    journal = cell.checkpoint._journal
    kept = values(journal, journal.newest.generation)
    for name, tensor in Mapping(cell.layout, is_writable=False).tensors().items():
        words = tensor.contiguous().view(torch.int32).numpy().view(np.uint32).reshape(-1)
        assert np.array_equal(kept[name], words), name


def test_every_commit_holds_the_live_weights_and_moves_what_changed(
    cell: SmallCell, moved: Moved
) -> None:
    for names in (("a", "b"), ("c",), ("d", "e")):
        teach_and_commit(cell, *names)
        assert moved.last() == "changed"
        assert_kept(cell)
    frozen = ChangeMaps.open(Path(cell.paths.changed)).frozen
    assert frozen == {"model.embed_tokens.weight", "lm_head.weight"}


def test_after_a_return_all_is_copied_once(cell: SmallCell, moved: Moved) -> None:
    for names in (("a",), ("x", "b")):
        teach_and_commit(cell, *names)
        assert moved.last() == "changed"
    cell.forget("x")
    cell.settle()
    cell.commit()
    assert moved.last() == "all"
    assert_kept(cell)
    teach_and_commit(cell, "c")
    assert moved.last() == "changed"
    assert_kept(cell)
    cell.checkpoint.roll_back(RollbackRequest(generation=1))
    assert_kept(cell)
    teach_and_commit(cell, "d")
    assert moved.last() == "all"
    assert_kept(cell)


def test_what_a_commit_without_room_has_taken_is_not_lost(
    cell: SmallCell, moved: Moved, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise DiskFull("no space left")

    teach_and_commit(cell, "a")
    with monkeypatch.context() as patch:
        patch.setattr(RealDisk, "write", full)
        cell.teach("b")
        cell.settle()
        with pytest.raises(CheckpointFailed, match="no space left"):
            cell.commit()
    moved.kinds.clear()
    teach_and_commit(cell, "c")
    assert moved.last() == "all"
    assert_kept(cell)
    teach_and_commit(cell, "d")
    assert moved.last() == "changed"
    assert_kept(cell)


def test_a_new_trainer_notes_from_the_weights_that_it_has_written_back(
    home: Path, moved: Moved
) -> None:
    with boot(home, home / "run", moves="changed") as cell:
        teach_and_commit(cell, "a")
        cell.commit(publish=True)
        cell.teach("lost")
        cell.settle()
    moved.kinds.clear()
    with boot(home, home / "run", moves="changed") as cell:
        teach_and_commit(cell, "b")
        assert moved.last() == "changed"
        assert_kept(cell)


def test_maps_that_do_not_begin_with_the_newest_generation_wait_for_a_full_copy(
    home: Path, moved: Moved
) -> None:
    with boot(home, home / "run", moves="changed") as cell:
        cell.checkpoint._noted_since = 7
        teach_and_commit(cell, "a")
        assert moved.last() == "all"
        assert_kept(cell)


def test_maps_of_an_unknown_format_are_refused(cell: SmallCell) -> None:
    described = Path(f"{cell.paths.changed}.json")
    described.write_text(described.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(LayoutError, match="changed: format 2, expected 1"):
        ChangeMaps.open(Path(cell.paths.changed))
