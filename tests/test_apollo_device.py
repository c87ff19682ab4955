"""A step never waits for the device, and needs no copies of a large tensor.

On the `meta` device tensors have no values, so whatever would read one raises: what passes there
queues its work on a GPU without a wait.
"""

from contextlib import nullcontext
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo.optim import update
from apollo.optim.optimizer import Apollo
from apollo.optim.release import attach
from apollo.optim.rounding import ROUNDINGS, Rounding

META = torch.device("meta")
SHAPES = {
    "lm_head.weight": (64, 24),
    "q_proj.weight": (24, 64),
    "embed_tokens.weight": (64, 24),
    "experts": (3, 12, 20),
    "conv1d.weight": (24, 1, 4),
    "norm.weight": (24,),
}
SETTINGS: list[dict[str, Any]] = [
    {"mode": "apollo", "rank": 4},
    {"mode": "apollo", "rank": 1, "norm_growth": 1.01, "scale": 0.3},
    {"mode": "scale", "norm_growth": 1.5, "clip": None},
    {"mode": "adamw"},
]
PRECISIONS: dict[str, tuple[torch.dtype, Rounding]] = {
    "float32": (torch.float32, "stochastic"),
    **{rounding: (torch.bfloat16, rounding) for rounding in ROUNDINGS},
}


def kind_of(settings: dict[str, Any]) -> str:
    return " ".join(str(value) for value in settings.values())


def test_reading_a_value_raises_on_the_meta_device() -> None:
    """What the next tests stand on."""
    value = torch.ones(3, device=META)
    for read in (bool, float, int, Tensor.tolist, Tensor.cpu, Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(value[0])
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.equal(value, value)


@pytest.mark.parametrize("settings", SETTINGS, ids=kind_of)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_step_reads_a_value(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], precision: str
) -> None:
    monkeypatch.setattr(update, "BLOCK_ELEMENTS", 1000)
    dtype, rounding = PRECISIONS[precision]
    params = {
        name: Parameter(torch.empty(shape, dtype=dtype, device=META))
        for name, shape in SHAPES.items()
    }
    optimizer = Apollo(
        params.items(),
        rounding=rounding,
        update_proj_gap=2,
        weight_decay=0.1,
        **settings,
    )
    for _ in range(3):  # the first makes the state, the third a new projection
        optimizer.begin_step(1e-4)
        for param in params.values():
            optimizer.step_parameter(param, torch.empty_like(param))
        optimizer.end_step()
    for param in params.values():
        assert {tensor.device for tensor in optimizer.state[param].values()} == {META}
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.reports  # noqa: B018  (this is what waits)


def test_no_released_step_reads_a_value() -> None:
    with META:
        module = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 24))
        inputs = torch.empty(4, 24)
    with attach(module, Apollo(module.named_parameters(), rank=4)) as release:
        for _ in range(2):
            with release.accumulate():
                module(inputs).sum().backward()
            release.begin_step()
            module(inputs).sum().backward()
            release.end_step()


class Watch(TorchDispatchMode):
    """Refuses to read a value, and counts the new tensors as large as `param` that live at once."""

    READS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select")

    def __init__(self, param: Tensor, grad: Tensor, optimizer: Apollo) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.param, self.grad, self.optimizer = param, grad, optimizer
        self.made: dict[int, StorageWeakRef] = {}
        self.peak = self.num_calls = 0

    def __enter__(self) -> Self:
        held = [self.param, self.grad, *self.optimizer.state[self.param].values()]
        self.held = {tensor.untyped_storage()._cdata for tensor in held}
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket.__name__ not in self.READS, func
        result = func(*args, **(kwargs or {}))
        self.num_calls += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.param.numel():
                storage = tensor.untyped_storage()
                if storage._cdata not in self.held:
                    self.made[storage._cdata] = StorageWeakRef(storage)
        self.made = {at: ref for at, ref in self.made.items() if not ref.expired()}
        self.peak = max(self.peak, len(self.made))
        return result


@pytest.mark.parametrize("settings", SETTINGS, ids=kind_of)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(128, 256), (256, 128)], ids=str)
def test_step_over_many_blocks_makes_few_tensors_of_full_size(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    precision: str,
    shape: tuple[int, int],
) -> None:
    """At most the squares of the gradient; and, where it is not float32 already, it as float32.

    Adam, whose state has the full size, masks the gradient first. Nothing of noise, of a direction
    or of rounding, which are the larger part: they come in blocks.
    """
    monkeypatch.setattr(update, "BLOCK_ELEMENTS", 8 * 256)
    dtype, rounding = PRECISIONS[precision]
    param, grad = Parameter(torch.ones(shape, dtype=dtype)), torch.ones(shape, dtype=dtype)
    optimizer = Apollo([("lm_head.weight", param)], rounding=rounding, weight_decay=0.1, **settings)
    for watch in (nullcontext(), Watch(param, grad, optimizer)):
        with watch:
            optimizer.begin_step()
            optimizer.step_parameter(param, grad)
            optimizer.end_step()
    assert isinstance(watch, Watch)
    num_allowed = 1 if dtype == torch.float32 and settings["mode"] != "adamw" else 2
    assert watch.peak <= num_allowed
    assert watch.num_calls > 16 * 3  # blocks were made


def test_watch_sees_reads_and_tensors_that_live() -> None:
    param = Parameter(torch.ones(8, 8))
    optimizer = Apollo([("w", param)])
    with pytest.raises(AssertionError):
        with Watch(param, param, optimizer):
            bool((param > 0).all())
    with Watch(param, param, optimizer) as watch:
        for _ in range(3):
            kept = param.detach() * 2
            kept = kept + 1
            kept.add_(1)
            kept[:4] + 1
    assert watch.peak == 2
