"""Stepping inside the backward pass: equal to an ordinary step, and refused where it cannot be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from apollo.optim.optimizer import Apollo
from apollo.optim.release import attach

VOCAB, WIDTH, NUM_BLOCKS = 40, 24, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return hidden


class Language(nn.Module):
    """Token ids to a loss: an embedding tied to the head, blocks, and one block used twice."""

    def __init__(self, checkpointed: bool = False, use_reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.embed.weight
        self.checkpointed, self.use_reentrant = checkpointed, use_reentrant

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in [*self.blocks, self.blocks[0]]:
            if self.checkpointed:
                hidden = checkpoint(block, hidden, use_reentrant=self.use_reentrant)
            else:
                hidden = block(hidden)
        logits = self.lm_head(hidden).float()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batch(seed: int, size: int = 4) -> Tensor:
    return torch.randint(0, VOCAB, (size, 9), generator=torch.Generator().manual_seed(seed))


def make_optimizer(model: nn.Module, **options: Any) -> Apollo:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return Apollo(trained, 1e-2, **{"rank": 4, "update_proj_gap": 2, **options})


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def model() -> Language:
    return Language()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["apollo", "scale", "adamw"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_released_steps_equal_ordinary_ones_bit_for_bit(
    dtype: torch.dtype, mode: str, checkpointed: bool
) -> None:
    """Tied weights, a block that is used twice and frozen parameters included."""
    released, ordinary = Language(checkpointed).to(dtype), Language(checkpointed).to(dtype)
    for model in (released, ordinary):
        for param in model.get_submodule("blocks.1").parameters():
            param.requires_grad_(False)
    ours, theirs = (make_optimizer(model, mode=mode) for model in (released, ordinary))
    start = weights_of(ordinary)
    with attach(released, ours) as release:
        for step in range(4):
            release.begin_step()
            released(batch(step)).backward()
            release.end_step()
            ordinary(batch(step)).backward()
            theirs.step()
            theirs.zero_grad()
            assert ours.reports == {name: theirs.reports[name] for name in ours.reports}
            assert ours.reports.keys() == theirs.reports.keys()
    after = weights_of(released)
    assert_equal(after, weights_of(ordinary))
    for name, tensor in after.items():
        assert torch.equal(tensor, start[name]) == name.startswith("blocks.1."), name


def test_gradients_never_all_exist(model: Language) -> None:
    """Gradients of a storage that lives are counted each time that one is complete."""
    complete: list[StorageWeakRef] = []
    num_alive: list[int] = []

    def count(param: Tensor) -> None:
        assert param.grad is not None
        complete.append(StorageWeakRef(param.grad.untyped_storage()))
        num_alive.append(sum(not ref.expired() for ref in complete))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    model(batch(0)).backward()
    assert max(num_alive) == len(list(model.parameters())) > 10  # without release: all of them
    model.zero_grad()
    complete.clear()
    num_alive.clear()
    with attach(model, make_optimizer(model)) as release:
        for step in range(2):
            release.begin_step()
            model(batch(step)).backward()
            assert all(param.grad is None for param in model.parameters())
            release.end_step()
    assert len(num_alive) == 2 * len(list(model.parameters()))
    assert max(num_alive) == 1
    assert all(ref.expired() for ref in complete)


def test_after_close_gradients_stay_and_the_module_can_be_attached_again(model: Language) -> None:
    optimizer = make_optimizer(model)
    with attach(model, optimizer):
        pass
    start = weights_of(model)
    model(batch(0)).backward()
    assert all(param.grad is not None for param in model.parameters())
    assert_equal(weights_of(model), start)
    model.zero_grad()
    with attach(model, optimizer) as release:
        release.begin_step()
        model(batch(0)).backward()
        release.end_step()
    assert not torch.equal(model.embed.weight, start["embed.weight"])


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["two passes", "reentrant"])
def test_second_gradient_of_a_tensor_in_one_step_is_refused_by_name(use_reentrant: bool) -> None:
    """It would come after the first was stepped with; reentrant checkpointing gives it in parts."""
    model = Language(checkpointed=use_reentrant, use_reentrant=use_reentrant)
    with attach(model, make_optimizer(model)) as release:
        release.begin_step()
        with pytest.raises(RuntimeError, match=r"^\S+\.\S+ got a second gradient.*use_reentrant"):
            model(batch(0)).backward()
            model(batch(0)).backward()
        release.end_step()
        # The optimizer is not stuck in that step.
        model.checkpointed = False
        release.begin_step()
        model(batch(1)).backward()
        release.end_step()


def test_write_between_forward_and_backward_raises_instead_of_wrong_gradients(
    model: Language,
) -> None:
    optimizer = make_optimizer(model)
    with attach(model, optimizer) as release:
        first, second = model(batch(0)), model(batch(1))
        release.begin_step()
        first.backward()
        release.end_step()
        release.begin_step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["apollo", "scale", "adamw"])
@pytest.mark.parametrize("shape", [(16, 32), (32,), (3, 12, 10)], ids=str)
def test_every_rule_bumps_the_version_by_which_autograd_knows_of_writes(
    dtype: torch.dtype, mode: str, shape: tuple[int, ...]
) -> None:
    param = Parameter(torch.ones(shape, dtype=dtype))
    optimizer = Apollo([("w", param)], 1.0, mode=mode, rank=4)  # type: ignore[arg-type]
    version = param._version
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param._version > version


def test_micro_batches_equal_the_one_big_batch() -> None:
    """Up to the order of sums: 1e-4 of what a step changes. Nothing is written before the last."""
    split, whole = Language(), Language()
    ours, theirs = make_optimizer(split), make_optimizer(whole)
    with attach(split, ours) as release:
        for step in range(3):
            rows = batch(step, size=8)
            before = weights_of(split)
            with release.accumulate():
                for part in rows[:6].split(2):
                    (split(part) / 4).backward()
                    assert all(param.grad is None for param in split.parameters())
            assert_equal(weights_of(split), before)
            release.begin_step()
            (split(rows[6:]) / 4).backward()
            release.end_step()
            whole(rows).backward()
            theirs.step()
            theirs.zero_grad()
    after = weights_of(split)
    for name, tensor in weights_of(whole).items():
        torch.testing.assert_close(after[name], tensor, rtol=0.0, atol=1e-4 * 3e-2, msg=name)
    for name, report in ours.reports.items():
        assert report.grad_norm == pytest.approx(theirs.reports[name].grad_norm, rel=1e-3)


def test_all_micro_batches_may_come_before_the_step(model: Language) -> None:
    other = Language()
    with attach(model, make_optimizer(model)) as release:
        with release.accumulate():
            model(batch(0)).backward()
        release.begin_step()
        release.end_step()
    with attach(other, make_optimizer(other)) as release:
        release.begin_step()
        other(batch(0)).backward()
        release.end_step()
    assert_equal(weights_of(model), weights_of(other))


def test_parameter_that_only_an_earlier_micro_batch_reached_is_updated_at_the_end() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.ModuleDict({"first": first, "second": second})
    optimizer = make_optimizer(model, rank=2)
    start = weights_of(model)
    x = torch.ones(2, 8)
    with attach(model, optimizer) as release:
        with release.accumulate():
            second(x).square().sum().backward()
        release.begin_step()
        first(x).square().sum().backward()
        assert_equal(weights_of(second), {k[7:]: v for k, v in start.items() if "second" in k})
        release.end_step()
        assert set(optimizer.reports) == set(start)
        for name, tensor in weights_of(model).items():
            assert not torch.equal(tensor, start[name]), name
        # Once: the sum is not used again.
        moved = weights_of(second)
        release.begin_step()
        first(x).square().sum().backward()
        release.end_step()
        assert_equal(weights_of(second), moved)


def test_sum_of_many_small_gradients_is_kept_in_float32() -> None:
    """Of 300 ones: bfloat16 cannot count beyond 256."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = make_optimizer(model)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    with attach(model, optimizer) as release:
        with release.accumulate():
            for _ in range(300):
                model(one).sum().backward()
        release.begin_step()
        release.end_step()
    assert optimizer.reports["weight"].grad_norm == 300


def test_gradient_that_is_not_finite_skips_its_tensor_and_no_other(model: Language) -> None:
    other = Language()
    name = "blocks.1.up.weight"
    # After the hook that reads it, so that nothing further down the graph is changed.
    model.get_parameter(name).register_hook(lambda grad: grad * torch.inf)
    ours, theirs = make_optimizer(model), make_optimizer(other)
    for one, optimizer in ((model, ours), (other, theirs)):
        with attach(one, optimizer) as release:
            release.begin_step()
            one(batch(0)).backward()
            release.end_step()
    assert ours.skipped == (name,)
    assert theirs.skipped == ()
    expected = weights_of(other) | {name: weights_of(Language())[name]}
    assert_equal(weights_of(model), expected)


def test_calls_out_of_order_are_refused_with_the_call_that_is_missing(model: Language) -> None:
    optimizer = make_optimizer(model)
    start = weights_of(model)
    with attach(model, optimizer) as release:
        with pytest.raises(RuntimeError, match="call begin_step before the backward pass"):
            model(batch(0)).backward()
        with pytest.raises(RuntimeError, match="call begin_step first"):
            release.end_step()
        release.begin_step()
        with pytest.raises(RuntimeError, match="call end_step first"):
            release.begin_step()
        with pytest.raises(RuntimeError, match="accumulate before begin_step"):
            with release.accumulate():
                pass
        release.end_step()
    assert_equal(weights_of(model), start)
    assert optimizer.num_steps == 1


def freeze(model: Language) -> Apollo:
    optimizer = make_optimizer(model)
    model.blocks[1].get_parameter("up.weight").requires_grad_(False)
    return optimizer


def take_foreign(model: Language) -> Apollo:
    return Apollo([*model.named_parameters(), ("stray", Parameter(torch.ones(3)))])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (freeze, "^blocks.1.up.weight is frozen"),
        (take_foreign, "^stray is not a parameter of this module"),
    ],
)
def test_what_cannot_be_attached_is_refused_by_name_and_leaves_no_hook(
    model: Language, make: Callable[[Language], Apollo], message: str
) -> None:
    optimizer = make(model)
    with pytest.raises(ValueError, match=message):
        attach(model, optimizer)
    start = weights_of(model)
    model(batch(0)).backward()
    assert_equal(weights_of(model), start)
    model.requires_grad_(True)
    attach(model, make_optimizer(model)).close()


def test_attaching_twice_is_refused_by_name(model: Language) -> None:
    with attach(model, make_optimizer(model)):
        with pytest.raises(ValueError, match="^embed.weight is attached already; close that first"):
            attach(model, make_optimizer(model))
