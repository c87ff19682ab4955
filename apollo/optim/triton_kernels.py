"""The update for a CUDA device, in Triton: what is launched for one tensor, with what memory.

    draw_normal  P, r x m, drawn again each step: nothing is stored
    measure      reads G once: R = P G and the channels' |g|^2, in splits of the projected side
    judge        |G|, whether it is finite; counts the step
    rescale      moments of R, a factor per channel       (SCALE: normalise; Adam: advance_full)
    limit        the clip and the norm-growth limiter
    write        reads G and W, writes W in place: decay, step, rounding; notes what changed

The host allocates and launches; it asks the device for nothing. Random numbers, the projection and
the rounding of a value are bit for bit those of `TorchKernels`, sums agree to the last digits of
float32. Needs the `triton` package. With TRITON_INTERPRET=1 in the environment before its import
the programs run on a CPU, slowly: that is how they are tested.

Axes: as in `triton_programs`; s = splits of the side that is summed over.
"""

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from apollo.optim import triton_programs as programs
from apollo.optim import triton_write
from apollo.optim.projection import normal_table
from apollo.optim.routing import Plan
from apollo.optim.update import State, Update

IS_INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
NUM_PROGRAMS: Final = 512
"""Programs of `measure` that are aimed at, a few for each multiprocessor of a large GPU: a matrix
with fewer blocks of channels is split along the other side. A constant, so that sums have the same
order on every device."""
MIN_SPLIT_RANKS: Final = 8
"""A split is at least so many ranks long, so R in splits takes an eighth of G's elements."""
MIN_BLOCK_R: Final = 16
"""The least that a tensor core multiplies."""
MAX_BLOCK_R: Final = {torch.bfloat16: 256, torch.float32: 64}
"""Rows of P in one program of `measure`, by what it multiplies: as many as its registers hold. A
higher rank reads G once for each such block. Products of float32, without tensor cores, take longer
than those reads."""
BLOCK_M: Final = {torch.bfloat16: 64, torch.float32: 32}
BLOCK_C: Final = 64
BLOCK_I: Final = 16
BLOCK_J: Final = 128
"""Sixteen counters of eight numbers; 256 bytes of a bfloat16 row."""
BLOCK_SUM: Final = 1024


class TritonKernels:
    """`update.Kernels` for CUDA tensors; keeps the normal table, 128 KiB, and nothing else."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, Tensor] = {}

    def update(self, task: Update) -> Tensor:
        """As `Kernels.update`."""
        plan, grad_ij, state = task.plan, task.grad_ij, task.state
        source_ij, factor_c = grad_ij, None
        with torch.cuda.device_of(task.param_ij):
            normal_rm = self._draw_normal(task) if plan.rule == "projected" else None
            projected_src, squares_sc = _measure(grad_ij, normal_rm, plan)
            slate = _judge(squares_sc, state, plan)
            if projected_src is not None:
                factor_c, sums = _rescale(projected_src, squares_sc, state, slate, plan)
            elif plan.rule == "neuron":
                if plan.has_momentum:
                    _advance_full(grad_ij, state, slate, plan)
                    source_ij = state["exp_avg"]
                    _, squares_sc = _measure(source_ij, None, plan)
                factor_c, sums = _normalise(squares_sc, slate, plan)
            else:
                sums = _advance_full(grad_ij, state, slate, plan)
                source_ij = state["exp_avg"]
            _limit(sums, state, slate, plan)
            _write(task, source_ij, factor_c, slate)
        # Autograd does not see what a program writes.
        increment_version(task.param_ij)
        return slate[: programs.NUM_REPORTED]

    def size_bytes(self) -> int:
        """As `Kernels.size_bytes`."""
        return sum(table.nbytes for table in self._tables.values())

    def _draw_normal(self, task: Update) -> Tensor:
        """bfloat16 normal_rm, the projection times sqrt(r)."""
        rank, side, device = task.plan.rank, task.plan.side, task.param_ij.device
        if device not in self._tables:
            self._tables[device] = normal_table().bfloat16().to(device)
        normal_rm = torch.empty(rank, side, dtype=torch.bfloat16, device=device)
        grid = triton.cdiv(rank, BLOCK_I), triton.cdiv(side, BLOCK_J)
        programs.draw_normal[grid](
            self._tables[device],
            normal_rm,
            task.projection_seed,
            rank,
            side,
            BLOCK_R=BLOCK_I,
            BLOCK_M=BLOCK_J,
        )
        return normal_rm


def _measure(
    value_ij: Tensor, normal_rm: Tensor | None, plan: Plan
) -> tuple[Tensor | None, Tensor]:
    """Partial projected_src, if there is a projection, and squares_sc of the channels."""
    rank, side, channels = plan.rank or 1, plan.side, plan.num_channels
    # The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
    is_bfloat16 = value_ij.dtype == torch.bfloat16 and not IS_INTERPRETED
    operand = torch.bfloat16 if is_bfloat16 else torch.float32
    block_r = max(MIN_BLOCK_R, min(triton.next_power_of_2(rank), MAX_BLOCK_R[operand]))
    split_size = _split_size(plan, BLOCK_M[operand])
    num_splits = triton.cdiv(side, split_size)
    squares_sc = value_ij.new_empty(num_splits, channels, dtype=torch.float32)
    projected_src = None
    if normal_rm is not None:
        projected_src = squares_sc.new_empty(num_splits, rank, channels)
    grid = triton.cdiv(rank, block_r) * triton.cdiv(channels, BLOCK_C), num_splits
    programs.measure[grid](
        value_ij,
        value_ij.stride(plan.axis),
        value_ij.stride(1 - plan.axis),
        normal_rm,
        projected_src,
        squares_sc,
        side,
        channels,
        rank,
        split_size,
        1 / math.sqrt(rank),
        OPERAND=tl.bfloat16 if is_bfloat16 else tl.float32,
        BLOCK_R=block_r,
        BLOCK_M=BLOCK_M[operand],
        BLOCK_C=BLOCK_C,
        num_warps=8 if block_r > 64 else 4,  # with 4, sums of 256 rows spill on an A100
    )
    return projected_src, squares_sc


def _split_size(plan: Plan, block_m: int) -> int:
    """Length of a split of the side: enough programs, a bounded R, whole blocks."""
    wanted = triton.cdiv(plan.side * triton.cdiv(plan.num_channels, BLOCK_C), NUM_PROGRAMS)
    length = max(wanted, MIN_SPLIT_RANKS * plan.rank, 1)
    return int(triton.cdiv(length, block_m) * block_m)


def _judge(squares_sc: Tensor, state: State, plan: Plan) -> Tensor:
    """The slate, with all that follows from the gradient's norm; counts the step."""
    slate = squares_sc.new_empty(programs.SLATE_SIZE)
    programs.judge[(1,)](
        squares_sc,
        squares_sc.numel(),
        state["step"],
        slate,
        BETA1=plan.beta1,
        BETA2=plan.beta2,
        BLOCK=BLOCK_SUM,
    )
    return slate


def _rescale(
    projected_src: Tensor, squares_sc: Tensor, state: State, slate: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Advance the moments of R; factor_c, and the sums from which `_limit` makes a norm."""
    is_whole = plan.rank == 1
    num_blocks = triton.cdiv(plan.num_channels, BLOCK_C)
    sums = slate.new_empty(2 if is_whole else 1, num_blocks)
    if is_whole:  # `limit` stores it
        factor_c = slate[programs.FACTOR.value].expand(plan.num_channels)
    else:
        factor_c = slate.new_empty(plan.num_channels)
    programs.rescale[(num_blocks,)](
        projected_src,
        squares_sc,
        state["exp_avg"],
        state["exp_avg_sq"],
        slate,
        factor_c,
        sums,
        plan.rank,
        plan.num_channels,
        squares_sc.shape[0],
        plan.alpha,
        plan.eps,
        IS_WHOLE=is_whole,
        BETA1=plan.beta1,
        BETA2=plan.beta2,
        BLOCK_R=MIN_BLOCK_R,
        BLOCK_C=BLOCK_C,
    )
    return factor_c, sums


def _normalise(squares_sc: Tensor, slate: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """SCALE's factor_c, and the sums from which `_limit` makes a norm."""
    num_blocks = triton.cdiv(plan.num_channels, BLOCK_C)
    factor_c, sums = slate.new_empty(plan.num_channels), slate.new_empty(1, num_blocks)
    programs.normalise[(num_blocks,)](
        squares_sc,
        slate,
        factor_c,
        sums,
        plan.num_channels,
        squares_sc.shape[0],
        plan.alpha,
        BLOCK_C=BLOCK_C,
    )
    return factor_c, sums


def _advance_full(grad_ij: Tensor, state: State, slate: Tensor, plan: Plan) -> Tensor:
    """Advance moments of the gradient's own size; for Adam's two, the sums of the update."""
    num_blocks = _num_blocks(plan)
    sums = slate.new_empty(1, num_blocks)
    programs.advance_full[(num_blocks,)](
        grad_ij,
        *grad_ij.stride(),
        state["exp_avg"],
        state.get("exp_avg_sq"),
        slate,
        sums,
        plan.rows,
        plan.columns,
        plan.eps,
        BETA1=plan.beta1,
        BETA2=plan.beta2,
        BLOCK_I=BLOCK_I,
        BLOCK_J=BLOCK_J,
    )
    return sums


def _num_blocks(plan: Plan) -> int:
    """Programs, one to a block, that cover the whole matrix."""
    return int(triton.cdiv(plan.rows, BLOCK_I) * triton.cdiv(plan.columns, BLOCK_J))


def _limit(sums: Tensor, state: State, slate: Tensor, plan: Plan) -> None:
    """Put the update's norm and the factor of its limits on the slate."""
    programs.limit[(1,)](
        sums,
        sums.shape[1],
        state.get("norm_mean"),
        state.get("norm_last"),
        slate,
        plan.alpha,
        plan.clip or 1.0,
        plan.norm_growth or 1.0,
        IS_WHOLE=sums.shape[0] == 2,
        BLOCK=BLOCK_SUM,
    )


def _write(task: Update, source_ij: Tensor, factor_c: Tensor | None, slate: Tensor) -> None:
    """Write the weights, from a gradient with its factors or from Adam's moments."""
    plan, state = task.plan, task.state
    triton_write.write[(_num_blocks(plan),)](
        task.param_ij,
        *task.param_ij.stride(),
        source_ij,
        *source_ij.stride(),
        state["exp_avg_sq"] if factor_c is None else None,
        factor_c,
        factor_c.stride(0) if factor_c is not None else 0,
        state.get("correction"),
        task.changed_io,
        slate,
        plan.rows,
        plan.columns,
        task.lr,
        1 - task.lr * plan.weight_decay,
        plan.eps,
        task.rounding_seed,
        AXIS=plan.axis,
        ROUNDING=plan.rounding,
        BLOCK_I=BLOCK_I,
        BLOCK_J=BLOCK_J,
    )
