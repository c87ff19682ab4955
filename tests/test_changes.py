"""What a step notes of the elements that it has changed, against a comparison of all of them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from apollo.optim.changes import make_map, pack, put, take, unpack, words
from apollo.optim.compiled import CompiledKernels
from apollo.optim.optimizer import Apollo
from apollo.optim.rounding import Rounding
from apollo.optim.routing import matrix_shape
from apollo.optim.update import Kernels, TorchKernels

RULES: dict[str, dict[str, Any]] = {
    "apollo": {"rank": 4},
    "mini": {"rank": 1},
    "scale": {"mode": "scale"},
    "adamw": {"mode": "adamw"},
}
PRECISIONS: dict[str, tuple[torch.dtype, Rounding]] = {
    "float32": (torch.float32, "stochastic"),
    "stochastic": (torch.bfloat16, "stochastic"),
    "nearest": (torch.bfloat16, "nearest"),
    "corrected": (torch.bfloat16, "corrected"),
}


def check_what_is_noted(kernels: Kernels, rule: str, precision: str) -> None:
    """A bit for every element that a step has changed, and for no other one."""
    dtype, rounding = PRECISIONS[precision]
    generator = torch.Generator().manual_seed(0)
    for shape in ((37, 45), (50, 24), (19,)):
        param = Parameter(torch.randn(shape, generator=generator).to(dtype))
        changed_io = make_map(*matrix_shape(shape), param.device)
        optimizer = Apollo(
            [("lm_head.weight", param)],
            1e-3,
            rounding=rounding,
            kernels=kernels,
            changed={"lm_head.weight": changed_io},
            **RULES[rule],
        )
        weight_ij = param.detach().view(matrix_shape(shape))
        copy, is_changed = weight_ij.clone(), torch.zeros(weight_ij.shape, dtype=torch.bool)
        for scale in (1.0, float("nan"), 1.0):
            before = weight_ij.clone()
            param.grad = (torch.randn(shape, generator=generator) * scale).to(dtype)
            param.grad[..., 5] = 0
            optimizer.step()
            is_changed |= words(weight_ij) != words(before)
        assert torch.equal(unpack(changed_io, shape[-1]), is_changed)
        assert 0 < is_changed.float().mean() < 1
        taken = take(weight_ij, changed_io)
        assert len(taken.values) == is_changed.sum() and not changed_io.any()
        put(copy, taken)
        assert torch.equal(words(copy), words(weight_ij))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_changed_element_is_noted_and_no_other(rule: str, precision: str) -> None:
    check_what_is_noted(TorchKernels(), rule, precision)


def test_compiled_code_notes_the_same() -> None:
    check_what_is_noted(CompiledKernels(), "apollo", "stochastic")


@settings(deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_map_says_what_was_packed(rows: int, columns: int, seed: int) -> None:
    is_changed = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4
    packed = pack(is_changed)
    assert torch.equal(unpack(packed, columns), is_changed)
    assert packed.shape == make_map(rows, columns, packed.device).shape
