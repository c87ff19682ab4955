"""The recorder over small modules that load as vLLM's do: exact views, or a refusal by name.

The oracle is the checkpoint itself: whatever is mapped must equal it bit for bit, through the file
that another process would open.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apollo.weights.layout import LayoutError, WeightLayout
from apollo.weights.memory import Mapping, place
from apollo.weights.record import Recorder

Weights = list[tuple[str, torch.Tensor]]
Load = Callable[[nn.Module, str, torch.Tensor], None]


@dataclass(frozen=True)
class Recorded:
    layout: WeightLayout
    views: dict[str, torch.Tensor]
    """Opened again, read-only, as another process would."""


def module_of(**shapes: tuple[int, ...]) -> nn.Module:
    """A module with one uninitialised float32 parameter per name."""
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.empty(shape)))
    return module


def record(module: nn.Module, weights: Weights, load: Load, directory: Path) -> Recorded:
    """What `SharedLoader.load_weights` does, without vLLM."""
    blocks, spans = place(module, directory / "weights")
    recorder = Recorder(spans)
    with recorder, torch.no_grad():
        for name, tensor in recorder.watch(weights):
            load(module, name, tensor)
    views, padding = recorder.views()
    layout = WeightLayout.checked("cpu", blocks, views, padding)
    return Recorded(layout, Mapping(layout, is_writable=False).tensors())


def assert_exact(recorded: Recorded, weights: Weights) -> None:
    assert list(recorded.views) == [name for name, _ in weights]
    for name, tensor in weights:
        view = recorded.views[name]
        assert view.shape == tensor.shape and view.dtype == tensor.dtype, name
        assert torch.equal(bits(view), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def tensor_of(*shape: int) -> torch.Tensor:
    """Every element of every tensor of a test is another number."""
    return torch.randn(shape)


def refused(
    directory: Path, match: str, weights: Weights, load: Load, **shapes: tuple[int, ...]
) -> None:
    with pytest.raises(LayoutError, match=match):
        record(module_of(**shapes), weights, load, directory)


# What loaders do.


def test_whole_tensors_are_views_of_their_parameters(tmp_path: Path) -> None:
    weights = [("norm", tensor_of(5)), ("proj", tensor_of(4, 6)), ("conv", tensor_of(4, 1, 3))]

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter(name).data.copy_(tensor)

    module = module_of(norm=(5,), proj=(4, 6), conv=(4, 1, 3))
    recorded = record(module, weights, load, tmp_path)
    assert_exact(recorded, weights)
    assert recorded.layout.padding_bytes == 0
    with torch.no_grad():
        module.get_parameter("proj")[2, 3] = 7.0
    assert recorded.views["proj"][2, 3] == 7.0


def test_fused_qkv_and_gate_up_are_rows_of_one_parameter(tmp_path: Path) -> None:
    weights = [
        ("v.weight", tensor_of(2, 6)),
        ("q.weight", tensor_of(4, 6)),
        ("up.weight", tensor_of(5, 6)),
        ("k.weight", tensor_of(2, 6)),
        ("gate.weight", tensor_of(5, 6)),
        ("q.bias", tensor_of(4)),
        ("k.bias", tensor_of(2)),
        ("v.bias", tensor_of(2)),
    ]
    place_of = {"q": ("qkv", 0), "k": ("qkv", 4), "v": ("qkv", 6)}
    place_of |= {"gate": ("gate_up", 0), "up": ("gate_up", 5)}

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        short, kind = name.split(".")
        fused, row = place_of[short]
        module.get_parameter(f"{fused}_{kind}").data.narrow(0, row, len(tensor)).copy_(tensor)

    module = module_of(qkv_weight=(8, 6), gate_up_weight=(10, 6), qkv_bias=(8,))
    assert_exact(record(module, weights, load, tmp_path), weights)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["in order", "last first"])
def test_tensor_in_three_pieces_merges_into_one_view(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    weights = [("in_proj.weight", tensor_of(9, 6)), ("conv1d.weight", tensor_of(9, 1, 4))]
    pieces = [(0, 2), (2, 3), (5, 4)]

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        target = module.get_parameter(name.replace(".", "_")).data
        for at, length in (pieces[i] for i in order):
            target.narrow(0, at, length).copy_(tensor.narrow(0, at, length))

    module = module_of(in_proj_weight=(9, 6), conv1d_weight=(9, 1, 4))
    recorded = record(module, weights, load, tmp_path)
    assert_exact(recorded, weights)
    assert recorded.views["conv1d.weight"].is_contiguous()


def test_vocabulary_is_padded_with_zeros(tmp_path: Path) -> None:
    weights = [("embed", tensor_of(10, 4))]

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        target = module.get_parameter(name).data
        target[: len(tensor)].copy_(tensor)
        target[len(tensor) :].fill_(0)

    recorded = record(module_of(embed=(16, 4)), weights, load, tmp_path)
    assert_exact(recorded, weights)
    assert recorded.layout.padding_bytes == 6 * 4 * 4


def test_tied_embedding_is_one_tensor(tmp_path: Path) -> None:
    weights = [("embed", tensor_of(8, 4)), ("norm", tensor_of(4))]
    module = module_of(embed=(8, 4), norm=(4,))
    module.register_parameter("head", module.get_parameter("embed"))

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter(name).data.copy_(tensor)

    recorded = record(module, weights, load, tmp_path)
    assert_exact(recorded, weights)
    assert module.get_parameter("head").data_ptr() == module.get_parameter("embed").data_ptr()


def test_experts_are_slices_of_a_3d_parameter(tmp_path: Path) -> None:
    weights = []
    for expert in range(3):
        weights.append((f"experts.{expert}.gate.weight", tensor_of(5, 4)))
        weights.append((f"experts.{expert}.up.weight", tensor_of(5, 4)))
        weights.append((f"experts.{expert}.down.weight", tensor_of(4, 5)))
    weights.append(("experts.bias", tensor_of(3, 4)))

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        if name == "experts.bias":
            for expert in range(3):
                module.get_parameter("bias").data[expert].copy_(tensor[expert])
            return
        _, expert_id, which, _ = name.split(".")
        if which == "down":
            module.get_parameter("w2").data[int(expert_id)].copy_(tensor)
        else:
            row = 0 if which == "gate" else 5
            module.get_parameter("w13").data[int(expert_id)].narrow(0, row, 5).copy_(tensor)

    module = module_of(w13=(3, 10, 4), w2=(3, 4, 5), bias=(3, 4))
    assert_exact(record(module, weights, load, tmp_path), weights)


def test_tensor_of_all_experts_is_copied_one_by_one(tmp_path: Path) -> None:
    weights = [("experts.gate_up", tensor_of(3, 10, 4))]

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        for expert in range(3):
            gate, up = tensor[expert].chunk(2)
            module.get_parameter("w13").data[expert, :5].copy_(gate)
            module.get_parameter("w13").data[expert, 5:].copy_(up)

    assert_exact(record(module_of(w13=(3, 10, 4)), weights, load, tmp_path), weights)


def test_axis_of_one_element_may_be_added_or_dropped(tmp_path: Path) -> None:
    weights = [("conv", tensor_of(4, 3)), ("norm", tensor_of(1, 5)), ("scale", torch.tensor(3.0))]

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        target = module.get_parameter(name).data
        target.copy_(tensor.view(target.shape))

    module = module_of(conv=(4, 1, 3), norm=(5,), scale=(1,))
    assert_exact(record(module, weights, load, tmp_path), weights)


def test_nan_and_negative_zero_are_kept(tmp_path: Path) -> None:
    weights = [("w", torch.tensor([float("nan"), -0.0, 0.0, float("-inf")]))]

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter(name).data.copy_(tensor)

    assert_exact(record(module_of(w=(4,)), weights, load, tmp_path), weights)


# What is refused. Each loader is sound but for one line.


def copy_to_w(change: Callable[[torch.Tensor], torch.Tensor]) -> Load:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter("w").data.copy_(change(tensor))

    return load


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w * 1.0,
        lambda w: w.t().contiguous(),
        lambda w: w.t(),
        lambda w: w.flip(0),
        lambda w: w.clone(),
        lambda w: w.roll(1, 0),
        lambda w: w.view(torch.int32),
    ],
    ids=["computed", "t contiguous", "t", "flip", "clone", "roll", "other bits"],
)
def test_transformed_tensor_is_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    weights = [("first", tensor_of(3)), ("layers.0.bad", tensor_of(4, 4))]

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        if name == "first":
            module.get_parameter("first").data.copy_(tensor)
        else:
            copy_to_w(change)(module, name, tensor)

    refused(tmp_path, r"^layers\.0\.bad: ", weights, load, first=(3,), w=(4, 4))


def test_target_transposed_is_refused(tmp_path: Path) -> None:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter("w").data.t().copy_(tensor)

    refused(tmp_path, r"^bad: lies transposed", [("bad", tensor_of(4, 6))], load, w=(6, 4))


@pytest.mark.parametrize(
    ("read", "shape"),
    [
        (lambda w: w.flatten(), (24,)),
        (lambda w: w.view(2, 12), (2, 12)),
        (lambda w: w.view(2, 2, 6), (2, 2, 6)),
        (lambda w: w.view(-1)[3:9], (6,)),
        (lambda w: w[::2], (2, 6)),
        (lambda w: w.diagonal(), (4,)),
    ],
    ids=["flat", "wider", "deeper", "across rows", "every other row", "diagonal"],
)
def test_reshaped_tensor_is_refused(
    tmp_path: Path, read: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> None:
    refused(tmp_path, r"^bad: ", [("bad", tensor_of(4, 6))], copy_to_w(read), w=shape)


def test_other_dtype_is_refused(tmp_path: Path) -> None:
    weights = [("bad", tensor_of(4, 6).to(torch.bfloat16))]
    match = r"^bad: torch\.bfloat16 in the checkpoint but torch\.float32 in the engine"
    refused(tmp_path, match, weights, copy_to_w(lambda w: w), w=(4, 6))


def test_unsupported_dtype_is_refused(tmp_path: Path) -> None:
    module = nn.Module()
    empty = torch.empty(4, dtype=torch.int8)
    module.register_parameter("w", nn.Parameter(empty, requires_grad=False))
    weights = [("bad", torch.ones(4, dtype=torch.int8))]
    with pytest.raises(LayoutError, match=r"^bad: type torch\.int8 cannot be trained"):
        record(module, weights, copy_to_w(lambda w: w), tmp_path)


@pytest.mark.parametrize(
    "change", [lambda w: w[0], lambda w: w[:1].expand(4, 6)], ids=["implied", "expanded"]
)
def test_broadcast_is_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    refused(tmp_path, r"^bad: ", [("bad", tensor_of(4, 6))], copy_to_w(change), w=(4, 6))


def test_change_in_place_after_the_copy_is_refused(tmp_path: Path) -> None:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter("w").data.copy_(tensor)
        module.get_parameter("w").data.mul_(2)

    refused(tmp_path, r"^bad: .*mul_", [("bad", tensor_of(4, 6))], load, w=(4, 6))


def test_tensor_that_is_never_copied_is_refused(tmp_path: Path) -> None:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        if name != "bad":
            module.get_parameter("w").data.copy_(tensor)

    weights = [("good", tensor_of(4, 6)), ("bad", tensor_of(3))]
    refused(tmp_path, r"^bad: .*never copied it", weights, load, w=(4, 6))


def test_tensor_copied_only_in_part_is_refused(tmp_path: Path) -> None:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter("w").data.zero_()
        module.get_parameter("w").data[:3].copy_(tensor[:3])

    refused(tmp_path, r"^bad: .*twice or never", [("bad", tensor_of(4, 6))], load, w=(4, 6))


def test_parameter_that_nothing_fills_is_refused(tmp_path: Path) -> None:
    weights = [("good", tensor_of(4, 6))]
    load = copy_to_w(lambda w: w)
    refused(tmp_path, r"^left: 48 of its 48 bytes", weights, load, w=(4, 6), left=(12,))


def test_parameter_filled_in_part_is_refused(tmp_path: Path) -> None:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter("w").data[:4].copy_(tensor)

    refused(tmp_path, r"^w: 48 of its 144 bytes", [("good", tensor_of(4, 6))], load, w=(6, 6))


def test_padding_that_is_zeroed_only_in_part_is_refused(tmp_path: Path) -> None:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter("w").data[:4].copy_(tensor)
        module.get_parameter("w").data[5:].zero_()  # row 4 is whatever the memory held

    refused(tmp_path, r"^w: 48 of its 144 bytes", [("good", tensor_of(4, 6))], load, w=(6, 6))


def test_tensor_copied_twice_is_refused(tmp_path: Path) -> None:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter("one").data.copy_(tensor)
        module.get_parameter("two").data.copy_(tensor)

    weights = [("bad", tensor_of(4, 6))]
    refused(tmp_path, r"^bad: .*twice or never", weights, load, one=(4, 6), two=(4, 6))


def test_two_tensors_in_one_place_are_refused(tmp_path: Path) -> None:
    weights = [("a", tensor_of(4, 6)), ("b", tensor_of(4, 6))]
    refused(tmp_path, r"^[ab]: overlaps|^w: ", weights, copy_to_w(lambda w: w), w=(4, 6))


def test_pieces_in_one_place_are_refused(tmp_path: Path) -> None:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter("w").data.zero_()
        for at in range(4):
            module.get_parameter("w").data[0].copy_(tensor[at])

    refused(tmp_path, r"^bad: ", [("bad", torch.ones(4))], load, w=(4, 1))


def test_pieces_at_uneven_distances_are_refused(tmp_path: Path) -> None:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter("w").data.zero_()
        for source, target in enumerate((0, 1, 3)):
            module.get_parameter("w").data[target].copy_(tensor[source])

    refused(tmp_path, r"^bad: .*one strided view", [("bad", tensor_of(3, 6))], load, w=(4, 6))


def test_pieces_in_reverse_order_are_refused(tmp_path: Path) -> None:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        for at in range(4):
            module.get_parameter("w").data[3 - at].copy_(tensor[at])

    refused(tmp_path, r"^bad: ", [("bad", tensor_of(4))], load, w=(4,))


def test_pieces_in_two_parameters_are_refused(tmp_path: Path) -> None:
    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module.get_parameter("one").data.copy_(tensor[:2])
        module.get_parameter("two").data.copy_(tensor[2:])

    refused(tmp_path, r"^\w+: ", [("bad", tensor_of(4, 6))], load, one=(2, 6), two=(2, 6))


def test_tensor_twice_in_the_checkpoint_is_refused(tmp_path: Path) -> None:
    weights = [("bad", tensor_of(4, 6)), ("bad", tensor_of(4, 6))]
    refused(tmp_path, r"^bad: appears twice", weights, copy_to_w(lambda w: w), w=(4, 6))


def test_write_before_the_first_tensor_is_refused(tmp_path: Path) -> None:
    module = module_of(w=(4,))
    _, spans = place(module, tmp_path / "weights")
    with Recorder(spans), torch.no_grad():
        with pytest.raises(LayoutError, match="before the first tensor"):
            module.get_parameter("w").data.copy_(torch.ones(4))


def test_work_outside_the_weights_is_not_the_recorders_business(tmp_path: Path) -> None:
    weights = [("good", tensor_of(4, 6))]

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        torch.zeros(3).add_(1).mul_(tensor.sum())
        module.get_parameter("w").data.copy_(tensor)

    assert_exact(record(module_of(w=(4, 6)), weights, load, tmp_path), weights)


# Any split, in any order: exact or refused, never wrong.


@dataclass(frozen=True)
class Split:
    """A tensor cut into a grid of pieces, each copied to where the targets say, in some order."""

    rows: int
    columns: int
    row_cuts: tuple[int, ...]
    column_cuts: tuple[int, ...]
    top: int
    left: int
    moved: tuple[int, int, int] | None
    """A piece that is copied elsewhere than its neighbours expect: its number and the shift."""
    order: tuple[int, ...]

    def boxes(self) -> list[tuple[int, int, int, int]]:
        rows = (0, *self.row_cuts, self.rows)
        columns = (0, *self.column_cuts, self.columns)
        return [
            (top, left, bottom - top, right - left)
            for top, bottom in pairwise(rows)
            for left, right in pairwise(columns)
        ]


@st.composite
def splits(draw: st.DrawFn, *, is_moved: bool) -> Split:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    row_cuts = draw(st.sets(st.integers(1, rows - 1))) if rows > 1 else set()
    column_cuts = draw(st.sets(st.integers(1, columns - 1))) if columns > 1 else set()
    num_pieces = (len(row_cuts) + 1) * (len(column_cuts) + 1)
    moved = None
    if is_moved:
        shift = st.integers(-2, 2)
        moved = (draw(st.integers(0, num_pieces - 1)), draw(shift), draw(shift))
    return Split(
        rows,
        columns,
        tuple(sorted(row_cuts)),
        tuple(sorted(column_cuts)),
        draw(st.integers(2, 4)),
        draw(st.integers(2, 4)),
        moved,
        tuple(draw(st.permutations(range(num_pieces)))),
    )


SIDE = 12


def copy_split(split: Split, directory: Path) -> tuple[Recorded, torch.Tensor]:
    source = torch.arange(1.0, split.rows * split.columns + 1).view(split.rows, split.columns)

    def load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        target = module.get_parameter("w").data.zero_()
        boxes = split.boxes()
        for number in split.order:
            top, left, height, width = boxes[number]
            at = [split.top + top, split.left + left]
            if split.moved is not None and split.moved[0] == number:
                at = [at[0] + split.moved[1], at[1] + split.moved[2]]
            piece = tensor[top : top + height, left : left + width]
            target[at[0] : at[0] + height, at[1] : at[1] + width].copy_(piece)

    (directory / "weights").unlink(missing_ok=True)
    return record(module_of(w=(SIDE, SIDE)), [("w", source)], load, directory), source


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(split=splits(is_moved=False))
def test_any_split_in_any_order_merges_to_the_exact_view(scratch: Path, split: Split) -> None:
    recorded, source = copy_split(split, scratch)
    assert torch.equal(recorded.views["w"], source)
    assert recorded.layout.padding_bytes == (SIDE * SIDE - source.numel()) * 4


@settings(max_examples=150, deadline=None, derandomize=True)
@given(split=splits(is_moved=True))
def test_misplaced_piece_is_refused_or_still_exact(scratch: Path, split: Split) -> None:
    try:
        recorded, source = copy_split(split, scratch)
    except LayoutError as error:
        assert str(error).startswith("w: ")
        return
    assert torch.equal(recorded.views["w"], source)


def test_the_whole_of_a_checkpoint_is_watched_lazily() -> None:
    def checkpoint() -> Iterable[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(1)
        raise AssertionError("read before it was asked for")

    assert next(Recorder([]).watch(checkpoint()))[0] == "a"
