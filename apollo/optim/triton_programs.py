"""The programs of a CUDA update in Triton's language; `triton_kernels` says which runs when.

A program works on one block of a tensor; a name ending in an axis is a block of that axis. Every
sum has one order, without atomics, so a step repeats bit for bit. Numbers that a later program
needs stay on the device, in the `slate` of float32 that the indices below name.

Axes: r = rank, m = side that is summed over, c = channels, i x j = rows x columns of the weight,
o = octets of columns.
"""

import triton
import triton.language as tl

from apollo.optim import update

# A program may read a global only if it is a constant of the language.
MAX_GRAD_NORM = tl.constexpr(update.MAX_GRAD_NORM)
MIN_NORM = tl.constexpr(update.MIN_NORM)
CLIP_DECAY = tl.constexpr(update.CLIP_DECAY)
MAX_CLIP_GROWTH = tl.constexpr(update.MAX_CLIP_GROWTH)

# The first four are what `Kernels.update` returns; then Adam's 1 - beta^step, and APOLLO-Mini's
# one factor, which has the place of a channel's.
NORM = tl.constexpr(0)
UPDATE_NORM = tl.constexpr(1)
LIMITED = tl.constexpr(2)
IS_FINITE = tl.constexpr(3)
UNBIAS1 = tl.constexpr(4)
UNBIAS2 = tl.constexpr(5)
FACTOR = tl.constexpr(6)
SLATE_SIZE = 7
NUM_REPORTED = 4


@triton.jit
def uniform_16(seed, i, o):
    """int32 numbers_ij in [0, 65536) for rows i and columns 8o to 8o+7: `philox.uniform_16`.

    One counter gives eight numbers: bit 2 of the column says which half of a word, bits 1 and 0
    which word. `join` adds a last axis of two, so the axes are joined as i, o, bit 2, bit 1, bit 0.
    """
    i, o = tl.broadcast(i[:, None], o[None, :])
    zero = tl.zeros_like(i)
    word0, word1, word2, word3 = tl.philox(seed, o, i, zero, zero)
    number0 = tl.join(word0 & 0xFFFF, word0 >> 16)
    number1 = tl.join(word1 & 0xFFFF, word1 >> 16)
    number2 = tl.join(word2 & 0xFFFF, word2 >> 16)
    number3 = tl.join(word3 & 0xFFFF, word3 >> 16)
    numbers = tl.join(tl.join(number0, number2), tl.join(number1, number3))
    return tl.reshape(numbers, (i.shape[0], 8 * i.shape[1])).to(tl.int32)


@triton.jit(do_not_specialize=["seed"])
def draw_normal(table, normal, seed, rank, side, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr):
    """bfloat16 normal_rm: P_rm times sqrt(r), which a tensor core multiplies exactly."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o = tl.program_id(1) * (BLOCK_M // 8) + tl.arange(0, BLOCK_M // 8)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    drawn = tl.load(table + uniform_16(seed, r, o))
    tl.store(normal + r[:, None] * side + m, drawn, (r < rank)[:, None] & (m < side))


@triton.jit
def measure(
    grad,
    stride_m,
    stride_c,
    normal,
    projected,
    squares,
    side,
    channels,
    rank,
    split_size,
    root,
    OPERAND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial projected_src = P G and squares_sc of the channels, for split s of the side.

    Reads a block of G once for `BLOCK_R` rows of P. Without `normal` only the squares. `root` is
    1 / sqrt(r).
    """
    split = tl.program_id(1)
    # Programs that read the same block of G are neighbours, for the sake of the cache.
    num_across = tl.cdiv(rank, BLOCK_R)
    r = tl.program_id(0) % num_across * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(0) // num_across * BLOCK_C + tl.arange(0, BLOCK_C)
    projected_rc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares_c = tl.zeros((BLOCK_C,), tl.float32)
    end = tl.minimum((split + 1) * split_size, side)
    for first in range(split * split_size, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        at = m.to(tl.int64)[:, None] * stride_m + c.to(tl.int64) * stride_c
        grad_mc = tl.load(grad + at, (m < end)[:, None] & (c < channels), other=0.0)
        if normal is not None:
            is_there = (r < rank)[:, None] & (m < end)
            normal_rm = tl.load(normal + r[:, None] * side + m, is_there, other=0.0)
            projected_rc = tl.dot(
                normal_rm.to(OPERAND), grad_mc.to(OPERAND), projected_rc, input_precision="ieee"
            )
        value_mc = grad_mc.to(tl.float32)
        squares_c += tl.sum(value_mc * value_mc, axis=0)
    if normal is not None:
        at = (split * rank + r).to(tl.int64)[:, None] * channels + c
        is_there = (r < rank)[:, None] & (c < channels)
        tl.store(projected + at, projected_rc * root, is_there)
    if tl.program_id(0) % num_across == 0:
        tl.store(squares + split.to(tl.int64) * channels + c, squares_c, c < channels)


@triton.jit
def total(numbers, count, BLOCK: tl.constexpr):
    """Sum of `count` float32 numbers, always in the same order."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(numbers + at, at < count, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def unbias(step, BETA: tl.constexpr):
    """1 - BETA^step; in float64, because in float32 the first steps of 0.999 have four digits."""
    decay = tl.full((1,), BETA, tl.float64)
    return tl.sum(1.0 - tl.exp(tl.log(decay) * step.to(tl.float64)), axis=0).to(tl.float32)


@triton.jit
def judge(
    squares, count, step, slate, BETA1: tl.constexpr, BETA2: tl.constexpr, BLOCK: tl.constexpr
):
    """Whether the gradient is finite; the step is counted only then. One program."""
    norm = tl.sqrt(total(squares, count, BLOCK))
    is_finite = norm < MAX_GRAD_NORM  # false for NaN
    num_steps = tl.load(step) + is_finite.to(tl.int64)
    tl.store(step, num_steps)
    num_steps = tl.maximum(num_steps, 1)
    tl.store(slate + NORM, norm)
    tl.store(slate + IS_FINITE, is_finite.to(tl.float32))
    tl.store(slate + UNBIAS1, unbias(num_steps, BETA1))
    tl.store(slate + UNBIAS2, unbias(num_steps, BETA2))


@triton.jit
def advance(moment, value, at, is_there, is_finite, BETA: tl.constexpr):
    """Advance a moment at `at` with `value`, unless the gradient is not finite; return it."""
    before = tl.load(moment + at, is_there, other=0.0)
    after = tl.where(is_finite, before * BETA + value * (1 - BETA), before)
    tl.store(moment + at, after, is_there)
    return after


@triton.jit
def direction(mean, square, slate, eps):
    """Adam's bias-corrected M^ / (sqrt(V^) + eps)."""
    unbias1, unbias2 = tl.load(slate + UNBIAS1), tl.load(slate + UNBIAS2)
    return mean / unbias1 / (tl.sqrt(square / unbias2) + eps)


@triton.jit
def rescale(
    projected,
    squares,
    exp_avg,
    exp_avg_sq,
    slate,
    factor,
    sums,
    rank,
    channels,
    num_splits,
    alpha,
    eps,
    IS_WHOLE: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Moments of R, and factor_c = alpha |N_c| / |R_c| with its share of the update's square.

    `IS_WHOLE` (rank 1): the shares of |R|^2 and |N|^2 instead, from which `limit` makes one factor.
    """
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    is_finite = tl.load(slate + IS_FINITE) > 0
    before_c = tl.zeros((BLOCK_C,), tl.float32)
    after_c = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        is_there = (r < rank)[:, None] & (c < channels)
        at = r.to(tl.int64)[:, None] * channels + c
        value = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        part = projected
        for _ in range(num_splits):
            value += tl.load(part + at, is_there, other=0.0)
            part += rank * channels
        value = tl.where(is_finite, value, 0.0)
        mean = advance(exp_avg, value, at, is_there, is_finite, BETA1)
        square = advance(exp_avg_sq, value * value, at, is_there, is_finite, BETA2)
        moved = direction(mean, square, slate, eps)
        before_c += tl.sum(value * value, axis=0)
        after_c += tl.sum(moved * moved, axis=0)
    if IS_WHOLE:
        tl.store(sums + block, tl.sum(before_c, axis=0))
        tl.store(sums + num_blocks + block, tl.sum(after_c, axis=0))
    else:
        factor_c = alpha * tl.sqrt(after_c) / tl.maximum(tl.sqrt(before_c), MIN_NORM)
        share = scale_channels(factor_c, squares, factor, c, channels, num_splits, is_finite)
        tl.store(sums + block, share)


@triton.jit
def scale_channels(factor_c, squares, factor, c, channels, num_splits, is_finite):
    """Store factor_c; the square of the update that these channels make."""
    tl.store(factor + c, factor_c, c < channels)
    scaled_c = factor_c * channel_norms(squares, c, channels, num_splits, is_finite)
    return tl.sum(scaled_c * scaled_c, axis=0)


@triton.jit
def channel_norms(squares, c, channels, num_splits, is_finite):
    """Norms_c of the channels from the squares of all splits; 0 for what is not finite."""
    squares_c = tl.zeros(c.shape, tl.float32)
    for _ in range(num_splits):
        squares_c += tl.load(squares + c, c < channels, other=0.0)
        squares += channels
    return tl.where(is_finite, tl.sqrt(squares_c), 0.0)


@triton.jit
def normalise(squares, slate, factor, sums, channels, num_splits, alpha, BLOCK_C: tl.constexpr):
    """SCALE's factor_c = alpha / |G_c|, with its share of the update's square."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_finite = tl.load(slate + IS_FINITE) > 0
    norms_c = channel_norms(squares, c, channels, num_splits, is_finite)
    factor_c = alpha / tl.maximum(norms_c, MIN_NORM)
    share = scale_channels(factor_c, squares, factor, c, channels, num_splits, is_finite)
    tl.store(sums + tl.program_id(0), share)


@triton.jit
def advance_full(
    grad,
    stride_i,
    stride_j,
    exp_avg,
    exp_avg_sq,
    slate,
    sums,
    rows,
    columns,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Moments of G itself: Adam's two, with a share of their direction's square, or the first."""
    i, j, is_there = place(rows, columns, BLOCK_I, BLOCK_J)
    is_finite = tl.load(slate + IS_FINITE) > 0
    value = tl.load(grad + i * stride_i + j * stride_j, is_there, other=0.0).to(tl.float32)
    value = tl.where(is_finite, value, 0.0)
    at = i * columns + j
    mean = advance(exp_avg, value, at, is_there, is_finite, BETA1)
    if exp_avg_sq is not None:
        square = advance(exp_avg_sq, value * value, at, is_there, is_finite, BETA2)
        moved = direction(mean, square, slate, eps)
        tl.store(sums + tl.program_id(0), tl.sum(moved * moved))


@triton.jit
def place(rows, columns, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Rows i1 and columns 1j of this program's block, in int64, and which of them are there."""
    num_across = tl.cdiv(columns, BLOCK_J)
    i = tl.program_id(0) // num_across * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(0) % num_across * BLOCK_J + tl.arange(0, BLOCK_J)
    is_there = (i < rows)[:, None] & (j < columns)
    return i.to(tl.int64)[:, None], j.to(tl.int64)[None, :], is_there


@triton.jit
def limit(
    sums,
    count,
    norm_mean,
    norm_last,
    slate,
    alpha,
    clip,
    norm_growth,
    IS_WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The update's norm, and the factor that keeps it within the limits: `update.limit`.

    One program. `IS_WHOLE`: `sums` holds the shares of |R|^2, then of |N|^2.
    """
    is_finite = tl.load(slate + IS_FINITE) > 0
    norm = tl.sqrt(total(sums, count, BLOCK))
    if IS_WHOLE:
        after = tl.sqrt(total(sums + count, count, BLOCK))
        whole = alpha * after / tl.maximum(norm, MIN_NORM)
        tl.store(slate + FACTOR, whole)
        norm = tl.where(is_finite, whole * tl.load(slate + NORM), 0.0)
    factor = tl.full((), 1.0, tl.float32)
    if norm_mean is not None:
        stored = tl.load(norm_mean)
        mean = tl.where(stored > 0, stored, norm)
        grown = mean * CLIP_DECAY + tl.minimum(norm, MAX_CLIP_GROWTH * mean) * (1 - CLIP_DECAY)
        tl.store(norm_mean, grown, is_finite)
        factor = tl.minimum(clip * mean / tl.maximum(norm, MIN_NORM), 1.0)
    if norm_last is not None:
        last, limited = tl.load(norm_last), norm * factor
        growth = tl.minimum(norm_growth * last / tl.maximum(limited, MIN_NORM), 1.0)
        growth = tl.where(last > 0, growth, 1.0)
        # A norm of 0 would hold all later ones at 0.
        tl.store(norm_last, limited * growth, is_finite & (limited > 0))
        factor = factor * growth
    tl.store(slate + UPDATE_NORM, norm * factor)
    tl.store(slate + LIMITED, factor)
