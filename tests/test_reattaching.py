"""A trainer that dies leaves half a step in memory that an engine goes on reading; a new one mends.

The memory of the killed process is left as it is, as an engine's would be, and the next trainer and
checkpoint actor begin over it. The oracle is a life that nothing has interrupted.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.versions import VersionCounter
from apollo.weights.layout import WeightLayout
from apollo.weights.memory import Mapping
from tests.small_cell import SmallCell, adopt, boot

ROOT = Path(__file__).parents[1]
SAMPLES = ("a", "b", "c", "d")
TENSORS_WRITTEN = 3
"""Of the step that is cut."""


def live(cell: SmallCell, *, cut_in_step: int | None = None) -> None:
    """Two samples are kept, two more are learned; perhaps the process dies within a step."""
    optimizer: Any = cell.trainer._learner.optimizer
    step_parameter, written = optimizer.step_parameter, [0]

    def step_one(*arguments: Any, **more: Any) -> Any:
        is_last = cut_in_step is not None and optimizer.num_steps >= cut_in_step
        written[0] += is_last
        if written[0] > TENSORS_WRITTEN:
            os.kill(os.getpid(), signal.SIGKILL)
        return step_parameter(*arguments, **more)

    optimizer.step_parameter = step_one
    cell.teach(*SAMPLES[:2])
    cell.settle()
    cell.commit()
    cell.teach(*SAMPLES[2:], epochs=2)
    cell.settle()


def child(home: Path, cut_in_step: int) -> None:
    with boot(home, home / "run") as cell:
        live(cell, cut_in_step=cut_in_step)


def memory(run: Path) -> dict[str, torch.Tensor]:
    live = Mapping(WeightLayout.load(run / "layout.json"), is_writable=False).tensors()
    return {name: tensor.clone() for name, tensor in live.items()}


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.mark.parametrize("cut_in_step", [1, 2, 4])
def test_half_a_step_is_gone_and_what_was_not_kept_is_learned_once_more(
    tmp_path: Path, cut_in_step: int
) -> None:
    whole = tmp_path / "whole"
    adopt(whole)
    with boot(whole, whole / "run") as cell:
        live(cell)
        expected, order = cell.state(), cell.order()

    home = tmp_path / "cut"
    adopt(home)
    code = f"from tests.test_reattaching import *; child(Path({str(home)!r}), {cut_in_step})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=180)
    assert ended.returncode == -signal.SIGKILL
    left = memory(home / "run")
    counter = VersionCounter(str(home / "run" / "versions"))
    seen = counter.newest_version, counter.epoch
    assert counter.half_steps % 2 == 1, "it died within a step"

    with boot(home, home / "run") as cell:
        assert counter.half_steps % 2 == 0 and counter.epoch > seen[1]
        assert counter.weights_version > seen[0], "a number that half a step had is not used again"
        if cut_in_step <= len(SAMPLES[:2]):  # The client had not come to the rest.
            cell.settle()
            cell.commit()
            cell.teach(*SAMPLES[2:], epochs=2)
        cell.settle()
        assert cell.order() == order, "each sample once an epoch"
        assert is_same(cell.state(), expected)
        assert not is_same(left, memory(home / "run")), "else this would prove nothing"


def test_the_memory_is_that_of_the_newest_generation_before_anything_is_learned(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    adopt(home)
    with boot(home, home / "run") as cell:
        cell.teach("a")
        cell.settle()
        cell.commit()
        kept = memory(home / "run")
    live = Mapping(WeightLayout.load(home / "run" / "layout.json"), is_writable=True).tensors()
    for tensor in live.values():
        tensor.data.fill_(7.0)
    with boot(home, home / "run"):
        assert is_same(memory(home / "run"), kept)
