"""Boxes of tensors: what a rank holds, in the recorder, in the layout and in its file."""

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo.weights.layout import Block, LayoutError, Part, TensorView, WeightLayout
from apollo.weights.pieces import Piece, address_of, box_of, merge_parts

WHOLE = TensorView("norm", 0, 0, (8,), (1,), "float32")
UPPER = TensorView("proj", 0, 64, (2, 6), (6, 1), "float32", Part((0, 0), (8, 6)))
LOWER = TensorView("proj", 0, 128, (2, 6), (6, 1), "float32", Part((6, 0), (8, 6)))
BLOCKS = (Block("first", 256),)


def checked(*views: TensorView) -> WeightLayout:
    return WeightLayout.checked("cpu", BLOCKS, views)


# Parts in a layout.


def test_layout_with_parts_survives_its_file(tmp_path: Path) -> None:
    layout = checked(WHOLE, UPPER, LOWER)
    layout.save(tmp_path / "layout.json")
    assert WeightLayout.load(tmp_path / "layout.json") == layout


def test_file_without_parts_is_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    checked(WHOLE).save(path)
    data = json.loads(path.read_text())
    for view in data["tensors"]:
        del view["part"]
    path.write_text(json.dumps(data))
    assert WeightLayout.load(path) == checked(WHOLE)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (Part((7, 0), (8, 6)), "lies outside"),
        (Part((-1, 0), (8, 6)), "lies outside"),
        (Part((0, 1), (8, 6)), "lies outside"),
        (Part((0,), (8, 6)), "is not a box"),
        (Part((0, 0), (8, 6, 1)), "is not a box"),
        (Part((0, 0), (2, 6)), "is whole"),
        (Part((5, 0), (8, 6)), "mapped twice, in part"),
        (Part((0, 0), (9, 6)), "of different tensors"),
        (None, "mapped twice"),
    ],
)
def test_unsound_part_is_refused_by_name(part: Part | None, match: str) -> None:
    with pytest.raises(LayoutError, match=rf"^proj: .*{match}"):
        checked(WHOLE, LOWER, replace(UPPER, part=part))


def test_parts_of_two_types_are_refused_by_name() -> None:
    with pytest.raises(LayoutError, match=r"^proj: its parts are of different tensors"):
        checked(LOWER, replace(UPPER, dtype="bfloat16"))


# Parts out of pieces.


def rows(start: int, length: int, offset_bytes: int) -> Piece:
    strides = (6 if length > 1 else None, 1)
    return Piece((start, 0), (length, 6), 0, offset_bytes, strides)


def test_pieces_that_tile_their_box_are_one_view() -> None:
    (view,) = merge_parts("w", (8, 6), "float32", [rows(4, 2, 48), rows(2, 2, 0)])
    assert view == TensorView("w", 0, 0, (4, 6), (6, 1), "float32", Part((2, 0), (8, 6)))


def test_pieces_apart_are_a_view_each() -> None:
    views = merge_parts("w", (8, 6), "float32", [rows(0, 2, 0), rows(4, 1, 48)])
    assert [view.part for view in views] == [Part((0, 0), (8, 6)), Part((4, 0), (8, 6))]
    assert [view.shape for view in views] == [(2, 6), (1, 6)]


def test_pieces_of_all_of_it_are_the_whole() -> None:
    (view,) = merge_parts("w", (4, 6), "float32", [rows(0, 2, 0), rows(2, 2, 48)])
    assert view.part is None and view.shape == (4, 6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    cuts=st.sets(st.integers(1, 11), max_size=5),
    held=st.sets(st.integers(0, 5), min_size=1),
    order=st.randoms(use_true_random=False),
)
def test_any_part_of_a_tensor_is_found_exactly(
    cuts: set[int], held: set[int], order: random.Random
) -> None:
    tensor = torch.arange(12 * 3.0).view(12, 3)
    edges = [0, *sorted(cuts), 12]
    boxes = [(low, high - low) for low, high in pairwise(edges)]
    boxes = [box for number, box in enumerate(boxes) if number in held] or boxes[:1]
    memory, at, pieces = torch.full((12, 3), -1.0), 0, []
    for low, length in boxes:
        origin, target = tensor[low : low + length], memory[at : at + length]
        target.copy_(origin)
        start, size, strides = box_of("w", tensor, origin, target)
        pieces.append(Piece(start, size, 0, at * 12, strides))
        at += length
    order.shuffle(pieces)
    try:
        views = merge_parts("w", (12, 3), "float32", pieces)
    except LayoutError as error:
        # Neighbours in the tensor that are not neighbours in memory: only possible with a gap.
        assert str(error).startswith("w: ")
        return
    found = torch.zeros_like(tensor)
    for view in views:
        start_row = view.part.start[0] if view.part else 0
        value = memory.as_strided(view.shape, view.stride, view.offset_bytes // 4)
        assert torch.equal(value, tensor[start_row : start_row + view.shape[0]])
        found[start_row : start_row + view.shape[0]] = 1
    assert int(found.sum()) == 3 * sum(length for _, length in boxes)


# Addresses without memory.


def test_meta_tensors_have_addresses_as_real_ones_do() -> None:
    for device in ("cpu", "meta"):
        one, other = torch.empty(4, 6, device=device), torch.empty(4, 6, device=device)
        begin = address_of(one)
        assert address_of(one[1, 2]) - begin == 8 * 4
        assert address_of(one.data.narrow(0, 2, 2)) - begin == 12 * 4
        assert address_of(one.t()[3]) - begin == 3 * 4
        assert not begin <= address_of(other) < begin + one.nbytes
