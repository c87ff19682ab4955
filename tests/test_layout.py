"""The layout refuses every map that is not one-to-one, by the tensor's name, and survives a file.

One test per attack: each starts from a sound layout and changes one thing.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo.weights.layout import Block, LayoutError, TensorView, WeightLayout, dtype_name

NORM = TensorView("norm", 0, 0, (8,), (1,), "float32")  # bytes 0 to 32
PROJ = TensorView("proj", 0, 64, (4, 6), (6, 1), "float32")  # bytes 64 to 160
HEAD = TensorView("head", 1, 0, (4, 6), (6, 1), "bfloat16")  # bytes 0 to 48
BLOCKS = (Block("first", 160), Block("second", 48))


def checked(*tensors: TensorView, blocks: tuple[Block, ...] = BLOCKS) -> WeightLayout:
    return WeightLayout.checked("cpu", blocks, tensors)


def test_sound_layout_is_accepted_and_counts_its_bytes() -> None:
    layout = checked(NORM, PROJ, HEAD)
    assert len(layout) == 3
    assert [view.name for view in layout] == ["norm", "proj", "head"]
    assert layout.size_bytes == 32 + 96 + 48
    assert (PROJ.num_elements, PROJ.size_bytes, PROJ.end_bytes) == (24, 96, 160)


def test_end_of_a_column_slice_is_its_last_element() -> None:
    view = replace(PROJ, shape=(4, 2), stride=(6, 1))
    assert view.size_bytes == 32
    assert view.end_bytes == 64 + (3 * 6 + 1 + 1) * 4


def test_overlap_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"^proj: overlaps norm"):
        checked(NORM, replace(PROJ, offset_bytes=28))


def test_overlap_of_one_tensor_inside_another_is_refused() -> None:
    inner = TensorView("inner", 0, 80, (2,), (1,), "float32")
    with pytest.raises(LayoutError, match=r"^inner: overlaps proj"):
        checked(inner, NORM, PROJ)


def test_same_place_in_two_blocks_is_no_overlap() -> None:
    checked(NORM, replace(NORM, name="other", block=1))


def test_overflow_of_the_block_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"^proj: bytes 68 to 164 lie outside block 0 of 160"):
        checked(NORM, replace(PROJ, offset_bytes=68))


def test_overflow_through_the_stride_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"^proj: .*outside block 0"):
        checked(NORM, replace(PROJ, stride=(7, 1)))


def test_negative_offset_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"^norm: bytes -4 "):
        checked(replace(NORM, offset_bytes=-4))


def test_offset_between_two_elements_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"^norm: "):
        checked(replace(NORM, offset_bytes=2))


def test_duplicate_name_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"^norm: mapped twice"):
        checked(NORM, replace(PROJ, name="norm"))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float64", "", "Tensor"])
def test_unknown_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(LayoutError, match=r"^norm: type"):
        checked(replace(NORM, dtype=dtype))


@pytest.mark.parametrize("block", [-1, 2])
def test_unknown_block_is_refused(block: int) -> None:
    with pytest.raises(LayoutError, match=r"^norm: block"):
        checked(replace(NORM, block=block))


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((8,), (1, 1)),
        ((0,), (1,)),
        ((-2, -4), (4, 1)),
        ((8,), (0,)),
        ((8,), (-1,)),
        ((4, 2), (1, 1)),
        ((2, 4), (3, 1)),
    ],
    ids=["ranks", "empty", "negative", "stride 0", "stride -1", "same strides", "rows overlap"],
)
def test_view_that_is_not_one_to_one_is_refused(
    shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    with pytest.raises(LayoutError, match=r"^norm: "):
        checked(replace(NORM, shape=shape, stride=stride, offset_bytes=64))


def test_axis_of_one_element_may_have_any_stride() -> None:
    checked(replace(NORM, shape=(1, 8), stride=(1, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trainable_types_have_a_word(dtype: torch.dtype) -> None:
    assert getattr(torch, dtype_name(dtype, "w")) == dtype


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64, torch.uint8])
def test_other_types_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(LayoutError, match=r"^model\.w: type .* cannot be trained in place"):
        dtype_name(dtype, "model.w")


# The file.


def test_layout_survives_its_file(tmp_path: Path) -> None:
    layout = checked(NORM, PROJ, HEAD)
    layout.save(tmp_path / "layout.json")
    assert WeightLayout.load(tmp_path / "layout.json") == layout
    assert [path.name for path in tmp_path.iterdir()] == ["layout.json"]


def edited(tmp_path: Path, change: dict[str, Any]) -> Path:
    path = tmp_path / "layout.json"
    checked(NORM, PROJ, HEAD).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return path


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_format_is_refused(tmp_path: Path, version: object) -> None:
    path = edited(tmp_path, {"format": version})
    with pytest.raises(LayoutError, match=r"layout\.json: format .*expected 1"):
        WeightLayout.load(path)


def test_file_is_checked_as_a_new_layout_is(tmp_path: Path) -> None:
    path = edited(tmp_path, {"blocks": [{"handle": "first", "size_bytes": 100}]})
    with pytest.raises(LayoutError, match=r"^proj: "):
        WeightLayout.load(path)
