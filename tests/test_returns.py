"""Forgetting in a cell of real actors: bit for bit as if the sample had never been there."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import Conflict, NotFound, Unavailable
from actors.ledger import Ledger
from actors.messages import TakeBack
from actors.past import Removal
from actors.posted import RollbackRequest
from actors.trainer import Trainer
from apollo.journal.disk import DiskFull, RealDisk
from apollo.journal.journal import Journal
from apollo.journal.retention import Retention, thin
from tests.small_cell import SmallCell, adopt, boot

BEFORE, WITH, AFTER = ("a", "b"), ("c", "x", "d"), ("e", "f")
EXPECTED = ["a", "b", "c", "d", "c", "d", "e", "f"]
"""In this order, if "x" had never been there."""


def live(cell: SmallCell, *, has_item: bool) -> None:
    """A life with two generations; "x" is first learned after the first of them."""
    cell.teach(*BEFORE)
    cell.settle()
    cell.commit()
    cell.teach(*(name for name in WITH if has_item or name != "x"), epochs=2)
    cell.settle()
    if has_item:
        cell.commit()
    cell.teach(*AFTER)
    cell.settle()


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights and moments of a life that never had the item."""
    home = tmp_path_factory.mktemp("without")
    adopt(home)
    with boot(home, home / "run") as cell:
        live(cell, has_item=False)
        assert cell.order() == EXPECTED
        return cell.state()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    adopt(tmp_path)
    return tmp_path


@pytest.fixture
def cell(home: Path) -> Iterator[SmallCell]:
    with boot(home, home / "run") as made:
        yield made


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_weights_and_moments_are_those_of_a_life_without_the_item(
    cell: SmallCell, without: dict[str, torch.Tensor]
) -> None:
    live(cell, has_item=True)
    before = cell.state()
    done = cell.forget("x")
    assert (done.generation, done.returned_to, done.has_optimizer) == (3, 1, True)
    assert (done.undone_steps, done.steps_to_learn_again, done.samples_to_learn_again) == (8, 6, 4)
    assert (len(done.undone_jobs), done.steps_lost) == (2, 0)
    cell.settle()
    assert cell.order() == EXPECTED
    assert_same(cell.state(), without)
    changed = [
        name for name, tensor in cell.state().items() if not torch.equal(tensor, before[name])
    ]
    assert changed, "else this would prove nothing"
    with pytest.raises(NotFound, match="'x' is forgotten already"):
        cell.forget("x")


def dies_before(place: type, name: str) -> Callable[..., Any]:
    """Kill -9 in the place of a call."""

    def die(*arguments: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(place, name, die)
    return die


def child(home: Path, where: str) -> None:
    """Forget the item, and be killed at a place on the way."""
    with boot(home, home / "run") as cell:
        live(cell, has_item=True)
        if where == "before the way back":
            dies_before(Journal, "roll_back")
        elif where == "before it is public":
            dies_before(Journal, "publish")
        elif where == "before the trainer has it":
            dies_before(Trainer, "restore")
        elif where == "before the ledger has it":
            dies_before(Ledger, "undo")
        elif where == "before the trainer goes on":
            dies_before(Trainer, "release")
        else:
            made, num_steps = cell.trainer._learner.step, [0]

            def step(*arguments: Any, **more: Any) -> Any:
                num_steps[0] += 1
                if num_steps[0] == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                return made(*arguments, **more)

            cell.trainer._learner.step = step
        cell.forget("x")
        cell.settle()


@pytest.mark.parametrize(
    "where",
    [
        "before the way back",
        "before it is public",
        "before the trainer has it",
        "before the ledger has it",
        "before the trainer goes on",
        "in the middle of learning again",
    ],
)
def test_killed_on_the_way_it_ends_as_if_it_had_not_been(
    where: str, home: Path, without: dict[str, torch.Tensor]
) -> None:
    code = f"from tests.test_returns import *; child(Path({str(home)!r}), {where!r})"
    root = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=180)
    assert ended.returncode == -signal.SIGKILL
    with boot(home, home / "again") as cell:
        cell.settle()
        if where == "before the way back":
            assert "x" in cell.order(), "it was not answered, and nothing has happened"
            cell.forget("x")
            cell.settle()
        assert cell.order() == EXPECTED, "each of the others once an epoch"
        assert_same(cell.state(), without)
        with pytest.raises(Conflict, match="never learned again"):
            cell.teach("x")


def test_an_item_of_the_job_in_hand_is_taken_out_before_its_turn(cell: SmallCell) -> None:
    """The training thread has read the whole job when the item is forgotten."""
    names = [f"s{number}" for number in range(40)]
    cell.teach(*names)
    cell.wait(lambda: len(cell.order()) >= 2)
    done = cell.forget("s39")
    assert (done.generation, done.undone_steps) == (None, 0)
    cell.settle()
    assert cell.order() == names[:-1]
    assert cell.ledger.jobs(1)[0].status == "done"


def test_nothing_is_taken_out_without_a_hold(cell: SmallCell) -> None:
    cell.teach("a")
    with pytest.raises(Unavailable, match="hold has ended and nothing was forgotten"):
        cell.trainer.remove(Removal("somebody else", ("a",)))
    cell.settle()
    assert cell.order() == ["a"]


def test_what_was_never_committed_is_undone_to_the_newest_generation(cell: SmallCell) -> None:
    live(cell, has_item=True)
    assert cell.forget("f").returned_to == 2
    cell.settle()
    assert cell.order() == ["a", "b", "c", "x", "d", "c", "x", "d", "e"]


def test_without_kept_moments_learning_begins_with_new_ones_and_says_so(cell: SmallCell) -> None:
    live(cell, has_item=True)
    cell.commit()
    done = cell.forget("x")
    assert (done.returned_to, done.has_optimizer) == (1, False)
    cell.settle()
    assert cell.order() == EXPECTED


def test_nobody_returns_to_what_is_forgotten_and_it_is_not_kept_for_long(cell: SmallCell) -> None:
    live(cell, has_item=True)
    cell.commit(publish=True)
    cell.forget("x")
    for generation in (2, 3):
        with pytest.raises(
            Conflict, match=f"generation {generation} has learned what is forgotten"
        ):
            cell.checkpoint.roll_back(RollbackRequest(generation=generation))
    cell.settle()
    cell.commit(publish=True)
    assert [each.generation for each in cell.checkpoint.history()] == [5, 4, 1, 0]
    with pytest.raises(NotFound, match="generation 2 is not kept; nearest: 1 and 4"):
        cell.checkpoint.roll_back(RollbackRequest(generation=2))
    assert cell.checkpoint.show(4).drift.num_changed == 0, "nor are the deltas that taught it"
    assert cell.checkpoint.verify().lost_generations == ()
    made = cell.checkpoint.roll_back(RollbackRequest(generation=1))
    assert made.generation == 6


def test_an_item_from_before_all_that_is_kept_cannot_be_forgotten(cell: SmallCell) -> None:
    live(cell, has_item=True)
    for name in "gh":  # So that no model directory holds an older one.
        cell.teach(name)
        cell.settle()
        cell.commit(publish=True)
    thin(cell.checkpoint._journal, 1e12, Retention(0, 0, 1.0))
    assert [each.generation for each in cell.checkpoint.history()] == [4, 3]
    with pytest.raises(Conflict, match=r"before 'x' was learned is kept, the oldest is 3"):
        cell.forget("x")
    assert "x" in cell.order() and cell.trainer._barrier._token is None


def test_a_dream_on_trial_is_judged_before_anything_is_forgotten(cell: SmallCell) -> None:
    cell.teach("a")
    cell.settle()
    cell.commit()
    cell.teach("client")
    cell.settle()
    cell.teach("dream", round_id="round-1")
    cell.settle()
    with pytest.raises(Unavailable, match="round-1 is on trial.*DELETE /dream"):
        cell.forget("a")
    cell.checkpoint.take_back(TakeBack(("dream",)))
    cell.settle()
    assert cell.order() == ["a", "client"]
    newest = cell.checkpoint._journal.newest.generation
    cell.checkpoint.take_back(TakeBack(("dream",)))
    assert cell.checkpoint._journal.newest.generation == newest, "once is enough"
    cell.forget("a")
    cell.settle()
    assert cell.order() == ["client"]


def test_what_a_generation_has_learned_is_shown_with_losses_and_drift(cell: SmallCell) -> None:
    live(cell, has_item=True)
    shown = cell.checkpoint.show(2)
    assert (shown.generation.parent, shown.learned.num_steps) == (1, 6)
    assert [(item.id, item.source, item.position) for item in shown.learned.items] == [
        ("c", "test", 0),
        ("x", "test", 1),
        ("d", "test", 2),
    ]
    losses = cell.ledger.job(shown.learned.items[0].job_id).loss_history
    assert (shown.learned.first_loss, shown.learned.last_loss) == (losses[0], losses[-1])
    assert shown.learned.mean_loss == pytest.approx(sum(losses) / 6)
    elements = sum(tensor.numel() for tensor in cell.checkpoint._tensors.values())
    assert shown.drift.num_elements == elements > shown.drift.num_changed > 0
    done = cell.forget("x")
    back = cell.checkpoint.show(done.generation)
    assert (back.learned.num_steps, back.forgotten, back.is_learned_again) == (0, ("x",), True)
    assert [item.is_forgotten for item in cell.checkpoint.show(2).learned.items] == [0, 1, 0]
    assert cell.checkpoint.show(0).drift.num_changed == 0
    with pytest.raises(NotFound, match="generation 9 is not kept; nearest: 3"):
        cell.checkpoint.show(9)


def test_a_disk_without_room_forgets_nothing(
    cell: SmallCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise DiskFull("no space left")

    live(cell, has_item=True)
    before = cell.state()
    with monkeypatch.context() as patch:
        patch.setattr(RealDisk, "write", full)
        with pytest.raises(Exception, match="no space left"):
            cell.forget("x")
    assert_same(cell.state(), before)
    assert cell.checkpoint.report().reason is None
    cell.forget("x")
    cell.settle()
    assert cell.order() == EXPECTED
