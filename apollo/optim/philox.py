"""Philox4x32-10, the counter-based generator of Random123 (Salmon et al., SC 2011), in torch.

A number is a function of a key and a counter, so nothing is stored, nothing is drawn in an order,
and a CPU, a GPU and a restarted run get the same bits. Triton's `tl.philox` is the same function.
Arithmetic is in int64, whose products wrap: the low 64 bits are those of unsigned numbers.

Axes: i = rows, j = columns.
"""

import hashlib

import torch
from torch import Tensor

LOW_32 = 0xFFFFFFFF
LOW_16 = 0xFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
PER_COUNTER = 8
"""Numbers of 16 bits that one counter gives."""

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def derive_seed(*parts: int | str) -> int:
    """63-bit seed, a blake2b hash of `parts`; the same in every process, on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_key(seed: int, device: torch.device) -> Tensor:
    """The two 32-bit halves of `seed`, low first, as int64 numbers on `device`."""
    return torch.tensor([seed & LOW_32, seed >> 32 & LOW_32]).to(device, non_blocking=True)


def philox(counter: Words, key: Tensor) -> Words:
    """Four 32-bit words for each counter of four 32-bit words, all held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key.unbind()
    for _ in range(NUM_ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (
            (product1 >> 32 & LOW_32) ^ c1 ^ k0,
            (product0 >> 32 & LOW_32) ^ c3 ^ k1,
        )
        c1, c3 = product1 & LOW_32, product0 & LOW_32
        k0, k1 = k0 + KEY_STEPS[0] & LOW_32, k1 + KEY_STEPS[1] & LOW_32
    return c0, c1, c2, c3


def uniform_16(key: Tensor, first_row: int, num_rows: int, num_columns: int) -> Tensor:
    """int32 numbers_ij in [0, 65536), uniform, for `num_rows` rows from `first_row`.

    Number (i, j) comes from the counter (j // 8, i, 0, 0): columns 8c to 8c+3 take the low halves
    of its four words, the next four the high halves.
    """
    columns = torch.arange((num_columns + PER_COUNTER - 1) // PER_COUNTER, device=key.device)
    rows = torch.arange(first_row, first_row + num_rows, device=key.device).unsqueeze(1)
    columns, rows = torch.broadcast_tensors(columns, rows)
    zero = torch.zeros_like(columns)
    words = torch.stack(philox((columns, rows, zero, zero), key), dim=-1)
    halves = torch.cat((words & LOW_16, words >> 16), dim=-1)
    return halves.flatten(1)[:, :num_columns].to(torch.int32)
