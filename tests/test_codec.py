"""Deltas are exact for every bit pattern, small for small steps, and refuse what they are not."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from apollo.journal import codec
from apollo.journal.codec import CorruptDelta, Words


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Words, Words]:
    """Two states of one chunk: any bits, some or all of which differ."""
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    size = draw(st.integers(1, 600))
    old = draw(arrays(dtype, size))
    is_changed = draw(arrays(np.bool_, size))
    other = draw(arrays(dtype, size))
    return old, np.where(is_changed, other, old)


@settings(max_examples=400, deadline=None)
@given(pairs())
def test_forward_and_backward_are_exact_for_any_bits(pair: tuple[Words, Words]) -> None:
    old, new = pair
    delta = codec.encode(old, new)
    assert np.array_equal(codec.apply(old, delta), new)
    assert np.array_equal(codec.apply(new, delta, is_backward=True), old)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.51, 1.0])
def test_every_share_of_changes_is_exact(dtype: Any, share: float) -> None:
    rng = np.random.default_rng(1)
    old = rng.integers(0, np.iinfo(dtype).max, 100_003, dtype)
    new = np.where(rng.random(len(old)) < share, old + dtype(1), old)
    delta = codec.encode(old, new)
    assert np.array_equal(codec.apply(old, delta), new)


@pytest.mark.parametrize(("num_changed", "written"), [(0, 0), (3, 3), (50, 50), (51, 100)])
def test_the_first_bytes_say_how_many_words_are_written(num_changed: int, written: int) -> None:
    old = np.zeros(100, np.uint32)
    new = np.where(np.arange(100) < num_changed, np.uint32(7), old)
    delta = codec.encode(old, new)
    assert codec.num_changed(delta[: codec.HEADER_BYTES]) == written
    with pytest.raises(CorruptDelta, match="it ends after"):
        codec.num_changed(delta[: codec.HEADER_BYTES - 1])


def test_neighbouring_floats_are_one_step_apart_across_zero() -> None:
    values = np.array([-1e-45, -0.0, 0.0, 1e-45], np.float32).view(np.uint32)
    ordered = codec._ordered(values).view(np.int32)
    assert ordered.tolist() == [-2, -1, 0, 1]


def test_a_gap_of_a_whole_chunk_is_kept() -> None:
    old = np.zeros(codec.MAX_WORDS, np.uint16)
    new = old.copy()
    new[0] = new[-1] = 1
    delta = codec.encode(old, new)
    assert len(delta) < 100
    assert np.array_equal(codec.apply(old, delta), new)


def entropy_bytes(old: Words, new: Words) -> float:
    """Bytes that an ideal coder needs for which words changed, and for the steps of those."""
    steps = codec._ordered(new) - codec._ordered(old)
    _, counts = np.unique(steps, return_counts=True)
    shares = counts / len(old)
    return float(-(shares * np.log2(shares)).sum() * len(old) / 8)


@pytest.mark.parametrize("share", [0.005, 0.05, 0.3])
def test_a_bfloat16_delta_is_near_its_entropy(share: float) -> None:
    rng = np.random.default_rng(2)
    old = rng.integers(0, 1 << 16, 1 << 20, np.uint16)
    steps = np.where(rng.random(len(old)) < 0.5, 1, -1).astype(np.int16).view(np.uint16)
    new = codec._unordered(codec._ordered(old) + steps * (rng.random(len(old)) < share))
    assert len(codec.encode(old, new)) < 1.3 * entropy_bytes(old, new)


def test_a_float32_delta_where_all_changes_is_near_its_entropy() -> None:
    rng = np.random.default_rng(3)
    old = (rng.standard_normal(1 << 20) * 0.03).astype(np.float32)
    new = (old + rng.standard_normal(len(old)).astype(np.float32) * 1e-5).view(np.uint32)
    assert len(codec.encode(old.view(np.uint32), new)) < 1.3 * entropy_bytes(
        old.view(np.uint32), new
    )


@settings(max_examples=400, deadline=None)
@given(pairs(), st.data())
def test_damaged_bytes_are_refused_or_harmless(
    pair: tuple[Words, Words], data: st.DataObject
) -> None:
    """No damage raises anything else, takes more memory, or gives a result of another size."""
    old, new = pair
    delta = bytearray(codec.encode(old, new))
    for _ in range(data.draw(st.integers(1, 3))):
        delta[data.draw(st.integers(0, len(delta) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(delta)))
    for broken in (bytes(delta), bytes(delta[:cut]), bytes(delta) + b"x"):
        try:
            assert codec.apply(old, broken).shape == old.shape
        except CorruptDelta:
            continue


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        (b"", "ends after 0 bytes"),
        (struct.pack("<BBI", 0, 4, 1), "do not fit"),
        (struct.pack("<BBI", 0, 2, 9), "9 words"),
        (struct.pack("<BBI", 7, 2, 4), "mode 7"),
        (struct.pack("<BBI", 1, 2, 3), "mode 1 with 3 steps"),
        (struct.pack("<BBII", 1, 2, 4, 2) + b"\x02x", "kind"),
        (struct.pack("<BBII", 1, 2, 4, 4) + b"\x01xyz", "zstd"),
    ],
)
def test_what_is_not_a_delta_says_why(delta: bytes, reason: str) -> None:
    with pytest.raises(CorruptDelta, match=reason):
        codec.apply(np.zeros(4, np.uint16), delta)
