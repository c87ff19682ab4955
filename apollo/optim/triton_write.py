"""The last of a CUDA update's programs: it writes the weight, rounded, and notes what changed.

Axes: as in `triton_programs`.
"""

import triton
import triton.language as tl

from apollo.optim.triton_programs import IS_FINITE, LIMITED, direction, place, uniform_16


@triton.jit(do_not_specialize=["seed"])
def write(
    param,
    param_i,
    param_j,
    source,
    source_i,
    source_j,
    exp_avg_sq,
    factor,
    factor_stride,
    correction,
    changed,
    slate,
    rows,
    columns,
    lr,
    keep,
    eps,
    seed,
    AXIS: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """param_ij <- param_ij * keep - lr * factor * direction_ij, rounded once, where it is finite.

    The direction is `source_ij` times its channel's factor; with `exp_avg_sq`, Adam's of both.
    Elements that have other bits now are noted in `changed`, if it is there: `changes`.
    """
    if tl.load(slate + IS_FINITE) == 0:
        return
    i, j, is_there = place(rows, columns, BLOCK_I, BLOCK_J)
    moved = tl.load(source + i * source_i + j * source_j, is_there, other=0.0).to(tl.float32)
    scale = tl.load(slate + LIMITED)
    if exp_avg_sq is not None:
        square = tl.load(exp_avg_sq + i * columns + j, is_there, other=0.0)
        moved = direction(moved, square, slate, eps)
    else:
        c, channels = (j, columns) if AXIS == 0 else (i, rows)
        scale = scale * tl.load(factor + c * factor_stride, c < channels, other=0.0)
    at = param + i * param_i + j * param_j
    before = tl.load(at, is_there, other=0.0)
    value = before.to(tl.float32)
    if ROUNDING == "corrected":
        value = undo_correction(value, tl.load(correction + i * columns + j, is_there, other=0))
    value = value * keep + moved * (scale * -lr)
    bits = value.to(tl.int32, bitcast=True)
    if ROUNDING == "none":
        after = bits
        tl.store(at, value, is_there)
    else:
        if ROUNDING == "stochastic":
            octet = tl.program_id(0) % tl.cdiv(columns, BLOCK_J) * (BLOCK_J // 8)
            row = tl.program_id(0) // tl.cdiv(columns, BLOCK_J) * BLOCK_I
            noise = uniform_16(
                seed, row + tl.arange(0, BLOCK_I), octet + tl.arange(0, BLOCK_J // 8)
            )
            upper = bits + noise >> 16
        elif ROUNDING == "nearest":  # ties to the even one
            upper = bits + 0x7FFF + (bits >> 16 & 1) >> 16
        else:
            bits_24 = bits + 0x80 >> 8
            upper = bits_24 + 0x80 >> 8
            rest = (bits_24 - (upper << 8)).to(tl.int8)
            tl.store(correction + i * columns + j, rest, is_there)
        after = upper.to(tl.int16)
        tl.store(at, after.to(tl.bfloat16, bitcast=True), is_there)
    if changed is not None:
        is_changed = (before.to(after.dtype, bitcast=True) != after) & is_there
        note_changes(changed, is_changed, rows, columns, BLOCK_I, BLOCK_J)


@triton.jit
def note_changes(changed, is_changed, rows, columns, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Set the bits of this program's block in changed_io; nobody else writes its octets."""
    num_octets, num_across = tl.cdiv(columns, 8), tl.cdiv(columns, BLOCK_J)
    bits = tl.reshape(is_changed.to(tl.int32), (BLOCK_I, BLOCK_J // 8, 8))
    noted = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
    i = tl.program_id(0) // num_across * BLOCK_I + tl.arange(0, BLOCK_I)
    o = tl.program_id(0) % num_across * (BLOCK_J // 8) + tl.arange(0, BLOCK_J // 8)
    at = changed + i.to(tl.int64)[:, None] * num_octets + o
    is_there = (i < rows)[:, None] & (o < num_octets)
    known = tl.load(at, is_there, other=0)
    tl.store(at, (known.to(tl.int32) | noted).to(tl.uint8), is_there)


@triton.jit
def undo_correction(value, correction):
    """The float32 value whose upper 24 bits `rounding.round_with_correction` kept."""
    bits = value.to(tl.int32, bitcast=True) + (correction.to(tl.int32) << 8)
    return bits.to(tl.float32, bitcast=True)
