"""Philox, the projections drawn from it and the rounding noise, against Python's integers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo.optim.philox import derive_seed, make_key, philox, uniform_16
from apollo.optim.projection import draw_projection, normal_table, projection_seed
from apollo.optim.rounding import round_stochastically, rounding_seed
from tests import reference

CPU = torch.device("cpu")

KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
"""Counter, key and words: kat_vectors of Random123."""


def integers(words: str) -> list[int]:
    return [int(word, 16) for word in words.split()]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, words: str) -> None:
    c0, c1, c2, c3 = integers(counter)
    k0, k1 = integers(key)
    assert list(reference.philox4x32((c0, c1, c2, c3), (k0, k1))) == integers(words)
    t0, t1, t2, t3 = torch.tensor([[c0], [c1], [c2], [c3]])
    ours = philox((t0, t1, t2, t3), torch.tensor([k0, k1]))
    assert [int(word) for word in ours] == integers(words)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**63 - 1),
    first_row=st.integers(0, 2**31),
    num_rows=st.integers(1, 3),
    num_columns=st.integers(1, 20),
)
def test_noise_is_the_oracles_for_every_place(
    seed: int, first_row: int, num_rows: int, num_columns: int
) -> None:
    ours = uniform_16(make_key(seed, CPU), first_row, num_rows, num_columns)
    assert ours.dtype == torch.int32
    assert ours.tolist() == [
        [reference.noise_16(seed, first_row + row, column) for column in range(num_columns)]
        for row in range(num_rows)
    ]


def test_table_of_the_normal_distribution_is_the_oracles() -> None:
    assert normal_table().tolist() == [reference.normal_quantile(at) for at in range(1 << 16)]
    assert normal_table().double().var(correction=0).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("rank", "side"), [(1, 30), (5, 33), (16, 16)])
def test_projection_is_the_oracles(rank: int, side: int) -> None:
    ours = draw_projection(projection_seed(7, "a.weight", 2), rank, side, CPU)
    oracle = reference.projection(7, "a.weight", 2, rank, side)
    np.testing.assert_allclose(ours.double().numpy(), oracle, rtol=2.0**-23)
    assert projection_seed(7, "a.weight", 2) == reference.seed_of("projection", 7, "a.weight", 2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30),
    seed=st.integers(0, 2**63 - 1),
)
def test_stochastic_rounding_adds_the_oracles_noise_and_cuts(
    values: list[float], seed: int
) -> None:
    exact = torch.tensor([values])
    ours = round_stochastically(exact, make_key(seed, CPU), 3)
    for column, bits in enumerate(exact.view(torch.int32)[0].tolist()):
        sum_bits = (bits & 0xFFFFFFFF) + reference.noise_16(seed, 3, column)
        stored = int(ours.view(torch.int16)[0, column]) & 0xFFFF
        assert stored == sum_bits >> 16


def test_seeds_are_blake2b_of_their_parts() -> None:
    assert derive_seed("a", 1) == reference.seed_of("a", 1) == 6222101017213550541
    assert rounding_seed(3, 2, "w") == reference.seed_of("rounding", 3, 2, "w")
