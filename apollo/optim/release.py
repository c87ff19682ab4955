"""Gradient release: every parameter is updated when its gradient is complete, which is then freed.

    begin_step --> backward: gradient of W complete --> W updated in place, gradient freed
                                        | (next parameter, towards the input)
    end_step   <------------------------+

So gradients never all exist. That is safe for one finished forward pass: a tensor's gradient is
complete after its last use in the backward pass. Writing bumps autograd's version counter, so a
backward pass over a second graph that needs the old weights raises instead of being silently wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from torch import Tensor
from torch.nn import Module

from apollo.optim.optimizer import Apollo


class GradientRelease:
    """The hooks of one optimizer on the parameters it owns; `attach` makes it."""

    def __init__(self, module: Module, optimizer: Apollo) -> None:
        names = {param: name for name, param in module.named_parameters()}
        owned = [param for group in optimizer.param_groups for param in group["params"]]
        for param in owned:
            if param not in names:
                raise ValueError(
                    f"{optimizer.name_of(param)} is not a parameter of this module; "
                    "make the optimizer from module.named_parameters()"
                )
            if not param.requires_grad:
                raise ValueError(
                    f"{names[param]} is frozen; leave it out of the optimizer, or set requires_grad"
                )
            if getattr(param, "_released_by", None) is not None:
                raise ValueError(f"{names[param]} is attached already; close that first")
        self._optimizer = optimizer
        self._params = owned
        self._sums: dict[Tensor, Tensor] = {}
        self._seen: set[Tensor] = set()
        self._is_accumulating = False
        self._handles = []
        for param in owned:
            self._handles.append(param.register_post_accumulate_grad_hook(self._consume))
            param._released_by = self

    def begin_step(self, lr: float | None = None) -> None:
        """Open a step, before its last (or only) backward pass."""
        self._optimizer.begin_step(lr)
        self._seen.clear()

    def end_step(self) -> None:
        """Update what only earlier micro-batches reached, and close the step."""
        for param in list(self._sums):
            self._optimizer.step_parameter(param, self._sums.pop(param))
        self._optimizer.end_step()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside add to a float32 sum, 4 bytes an element, and write no weight.

        The next step uses the sum: scale each micro-batch's loss by its share.
        """
        if self._optimizer.is_stepping:
            raise RuntimeError("accumulate before begin_step: the open step already writes weights")
        self._is_accumulating = True
        try:
            yield
        finally:
            self._is_accumulating = False

    def close(self) -> None:
        """Remove the hooks; gradients stay in `.grad` again."""
        for handle in self._handles:
            handle.remove()
        for param in self._params:
            param._released_by = None
        self._sums.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _consume(self, param: Tensor) -> None:
        assert param.grad is not None
        grad, param.grad = param.grad, None
        if self._is_accumulating:
            if param in self._sums:
                self._sums[param].add_(grad)
            else:
                self._sums[param] = grad.float()
            return
        if param in self._seen:
            raise RuntimeError(
                f"{self._optimizer.name_of(param)} got a second gradient in one step, after it was "
                "updated with the first; one backward pass a step (`accumulate` for more), and "
                "gradient checkpointing with use_reentrant=False"
            )
        self._seen.add(param)
        if (total := self._sums.pop(param, None)) is not None:
            grad = total.add_(grad)
        self._optimizer.step_parameter(param, grad)


def attach(module: Module, optimizer: Apollo) -> GradientRelease:
    """Step each of the optimizer's parameters inside the backward pass and free its gradient.

    Call `begin_step`, one backward pass and `end_step` of what is returned, for each step. Tied
    weights, frozen parameters and gradient checkpointing (`use_reentrant=False`) work. Raises
    ValueError if a parameter is frozen, foreign or attached twice.
    """
    return GradientRelease(module, optimizer)
