"""The same seed gives the same bits: twice, and across a save, a new process and a load.

    whole:   steps 1 .. 10 in this process
    resumed: steps 1 .. 6 here --torch.save--> another process, weights_only --> steps 7 .. 10

A projection is refreshed at step 9, which no checkpoint carries.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from apollo.optim.optimizer import Apollo

ROOT = Path(__file__).parents[1]
NUM_STEPS, SAVED_AFTER, GAP = 10, 6, 4
TIMEOUT_S = 240
SHAPES = {
    "lm_head.weight": (16, 40),
    "q_proj.weight": (40, 16),
    "experts": (3, 12, 10),
    "norm.weight": (33,),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "apollo": {"rank": 4},
    "mini": {"rank": 1, "norm_growth": 1.01, "clip": None},
    "scale": {"mode": "scale"},
    "adamw": {"mode": "adamw", "norm_growth": 1.5},
}
CASES = {
    f"{kind}-{precision}": (kind, precision)
    for kind in SETTINGS
    for precision in ("float32", "stochastic", "nearest", "corrected")
}
"""By name: the settings, and either float32 weights or how bfloat16 ones are rounded."""


def make(case: str, weights: dict[str, Tensor] | None = None) -> Apollo:
    """The optimizer of a case, over new parameters, or over `weights`."""
    kind, precision = CASES[case]
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    if weights is None:
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in SHAPES.items()
        }
    params = [(name, Parameter(weights[name].clone())) for name in SHAPES]
    rounding: Any = "stochastic" if precision == "float32" else precision
    return Apollo(
        params,
        1e-2,
        update_proj_gap=GAP,
        weight_decay=0.1,
        seed=3,
        rounding=rounding,
        **SETTINGS[kind],
    )


def params_of(optimizer: Apollo) -> dict[str, Parameter]:
    return {optimizer.name_of(param): param for param in optimizer.param_groups[0]["params"]}


def take_steps(optimizer: Apollo, first: int, last: int) -> None:
    """Steps `first` to `last`, counted from 1; the gradients are functions of the step."""
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for param in params_of(optimizer).values():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def snapshot(optimizer: Apollo) -> dict[str, Any]:
    weights = {name: param.detach() for name, param in params_of(optimizer).items()}
    return {"weights": weights, "optimizer": optimizer.state_dict()}


def tensors_of(saved: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers, with where it is."""
    if isinstance(saved, Tensor):
        yield place, saved
    elif isinstance(saved, dict):
        for key, value in saved.items():
            yield from tensors_of(value, f"{place}/{key}")


def assert_same_bits(ours: Any, theirs: Any) -> None:
    expected, found = dict(tensors_of(ours)), dict(tensors_of(theirs))
    assert expected.keys() == found.keys()
    for place, tensor in expected.items():
        assert tensor.dtype == found[place].dtype, place
        flat, other = tensor.reshape(-1), found[place].reshape(-1)
        assert torch.equal(flat.view(torch.uint8), other.view(torch.uint8)), place
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]


def continue_all(directory: Path) -> None:
    """What the other process does: load each case, take the steps that are left, save."""
    for case in CASES:
        saved = torch.load(directory / f"{case}.saved", weights_only=True)
        optimizer = make(case, saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        take_steps(optimizer, SAVED_AFTER + 1, NUM_STEPS)
        torch.save(snapshot(optimizer), directory / f"{case}.resumed")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what each case became in the other process: one for all, for its imports."""
    directory = tmp_path_factory.mktemp("resumed")
    for case in CASES:
        optimizer = make(case)
        take_steps(optimizer, 1, SAVED_AFTER)
        torch.save(snapshot(optimizer), directory / f"{case}.saved")
    command = [sys.executable, "-m", "tests.test_apollo_repeat", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=TIMEOUT_S)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_in_a_new_process_is_the_uninterrupted_one_bit_for_bit(
    resumed: Path, case: str
) -> None:
    whole = make(case)
    take_steps(whole, 1, NUM_STEPS)
    assert whole.skipped == ()
    assert_same_bits(snapshot(whole), torch.load(resumed / f"{case}.resumed", weights_only=True))


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_bits_twice(case: str) -> None:
    first, second = make(case), make(case)
    for optimizer in (first, second):
        take_steps(optimizer, 1, NUM_STEPS)
    assert_same_bits(snapshot(first), snapshot(second))


@pytest.mark.parametrize("case", ["apollo-float32", "adamw-stochastic"])
def test_another_seed_gives_other_bits(case: str) -> None:
    """Through the projection, and through the noise of the rounding."""
    first, second = make(case), make(case)
    second.param_groups[0]["seed"] = 4
    for optimizer in (first, second):
        take_steps(optimizer, 1, 1)
    ours, theirs = params_of(first), params_of(second)
    for name in ("lm_head.weight", "q_proj.weight", "experts"):
        assert not torch.equal(ours[name], theirs[name]), name


def test_a_tensors_bits_do_not_depend_on_its_neighbours_or_their_order() -> None:
    """So a layer can be frozen, or trained elsewhere, without a change to the others."""
    together, alone = make("apollo-stochastic"), {}
    take_steps(together, 1, NUM_STEPS)
    for name in reversed(SHAPES):
        whole = params_of(make("apollo-stochastic"))
        optimizer = Apollo(
            [(name, whole[name])], 1e-2, rank=4, update_proj_gap=GAP, weight_decay=0.1, seed=3
        )
        for step in range(1, NUM_STEPS + 1):
            generator = torch.Generator().manual_seed(step)
            grads = {at: torch.randn(shape, generator=generator) for at, shape in SHAPES.items()}
            whole[name].grad = grads[name].bfloat16()
            optimizer.step()
        alone[name] = whole[name]
    for name, param in params_of(together).items():
        assert torch.equal(param, alone[name]), name


def test_no_checkpoint_carries_a_projection_or_an_object() -> None:
    optimizer = make("apollo-corrected")
    take_steps(optimizer, 1, 1)
    state = optimizer.state_dict()

    def check(leaf: Any) -> None:
        if isinstance(leaf, dict):
            assert all(type(key) in (str, int) for key in leaf)
            for value in leaf.values():
                check(value)
        elif isinstance(leaf, (list, tuple)):
            assert type(leaf) in (list, tuple)
            for value in leaf:
                check(value)
        else:
            assert type(leaf) in (Tensor, int, float, bool, str, type(None)), type(leaf)

    check(state)
    head = state["state"][0]
    assert {key: tuple(value.shape) for key, value in head.items()} == {
        "step": (),
        "norm_mean": (),
        "exp_avg": (4, 40),
        "exp_avg_sq": (4, 40),
        "correction": (16, 40),
    }


def test_loaded_state_shares_no_memory_with_what_was_loaded() -> None:
    """Else a caller's copy, kept to go back to, would move on with the steps."""
    optimizer, other = make("apollo-float32"), make("apollo-float32")
    take_steps(optimizer, 1, 2)
    state = optimizer.state_dict()
    other.load_state_dict(state)
    before = {place: tensor.clone() for place, tensor in tensors_of(state)}
    take_steps(other, 3, 4)
    for place, tensor in tensors_of(state):
        assert torch.equal(tensor, before[place]), place


def test_state_of_other_names_or_groups_is_refused() -> None:
    optimizer = make("apollo-float32")
    state = optimizer.state_dict()
    renamed = Apollo([(f"x.{name}", param) for name, param in params_of(optimizer).items()])
    reordered = Apollo(reversed(params_of(optimizer).items()))
    fewer = Apollo(list(params_of(optimizer).items())[:2])
    for other in (renamed, reordered, fewer):
        with pytest.raises(ValueError, match="other names, order or groups"):
            other.load_state_dict(state)
    del state["param_groups"][0]["param_names"]
    with pytest.raises(ValueError, match="other names, order or groups"):
        optimizer.load_state_dict(state)


if __name__ == "__main__":
    continue_all(Path(sys.argv[1]))
