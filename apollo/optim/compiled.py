"""The update compiled for each shape, for a CPU: one pass where eager torch makes several.

Knows nothing that `update` does not; the arithmetic is that module's. Compiling takes seconds per
shape the first time (a C++ compiler must be there; torch keeps the result on disk), so this pays
for a run of hundreds of steps.
"""

import os
import shutil
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from apollo.optim.routing import Plan
from apollo.optim.update import Now, State, TorchKernels, step_tensor

MAX_PLANS: Final = 64
"""Distinct plans (shape, rule, settings) that are compiled; further ones run in eager torch."""

Run = Callable[[Tensor, Tensor, State, Tensor | None, Now], Tensor]


class CompiledKernels(TorchKernels):
    """`TorchKernels` with `step_tensor` compiled, whole tensors at a time.

    Raises RuntimeError if there is no C++ compiler.
    """

    def __init__(self) -> None:
        super().__init__()
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler) is None:
            raise RuntimeError(
                f"compiled kernels need a C++ compiler and {compiler} is not there; "
                "install one, name it in CXX, or use TorchKernels"
            )
        self._runs: dict[Plan, Run] = {}

    def run(
        self,
        param_ij: Tensor,
        grad_ij: Tensor,
        state: State,
        projection_rm: Tensor | None,
        now: Now,
        plan: Plan,
    ) -> Tensor:
        """As `TorchKernels.run`; the first call of a plan compiles it."""
        if plan not in self._runs:
            if len(self._runs) == MAX_PLANS:
                return super().run(param_ij, grad_ij, state, projection_rm, now, plan)
            self._runs[plan] = _compile(plan)
        return self._runs[plan](param_ij, grad_ij, state, projection_rm, now)


def _compile(plan: Plan) -> Run:
    def run(
        param_ij: Tensor, grad_ij: Tensor, state: State, projection_rm: Tensor | None, now: Now
    ) -> Tensor:
        return step_tensor(param_ij, grad_ij, state, projection_rm, now, plan, plan.rows)

    limit: dict[str, Any] = {"recompile_limit": MAX_PLANS}  # Absent from an overload of its stub.
    return torch.compile(run, fullgraph=True, dynamic=False, **limit)
