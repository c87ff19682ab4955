"""One learning step on one example; owns the module's training mode and its optimizer.

    context --read, without gradient--> prefix
                                          | continuation --forward--> log-probabilities
                                          v
    loss --not finite--> NonFiniteLoss, nothing has changed
         | backward
         v
    gradient of one parameter complete --> Apollo writes the parameter in place, gradient freed
         |  (last parameter)
         v
    StepReport

Knows nothing of jobs, queues, warm-up or who else reads the weights. The parameters may be views
of memory that another process reads: they are written in place and never replaced.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apollo.learning.anchor import divergence
from apollo.learning.budget import Memory, estimate_memory, measured_peak
from apollo.learning.forward import check_prefix, let_checkpointing_read
from apollo.learning.objective import Objective, loss_of
from apollo.learning.samples import Example
from apollo.learning.stopwatch import Part, Stopwatch
from apollo.optim.choose import KernelChoice, choose_kernels
from apollo.optim.optimizer import Apollo, TensorReport
from apollo.optim.release import attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StepTooLong(TimeoutError):
    """The step would pass its deadline; no weight and no optimizer state has changed."""


class NonFiniteLoss(ArithmeticError):
    """The loss is not a finite number; no weight and no optimizer state has changed."""


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    loss: float
    """Before the step: mean over the predicted tokens, times the example's weight."""
    tensors: Mapping[str, TensorReport]
    """What it did to each parameter."""
    peak_bytes: int | None = None
    """Most memory that it took beyond what was there before; None where nobody can say."""
    rested_s: float = 0.0
    """Time that `breathe` took of it."""
    parts: Mapping[Part, float] = field(default_factory=dict)
    """Seconds by what they were spent on, on the clock of the device. What a checkpointed layer
    computes again is part of the backward pass, the loss of the forward pass."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Parameters left as they were, because their gradient was not finite."""
        return tuple(name for name, report in self.tensors.items() if not report.is_finite)

    @property
    def update_rms(self) -> float:
        """Mean over the updated tensors of the update's root mean square, over the rate."""
        return _mean(report.update_rms for report in self.tensors.values() if report.is_finite)

    @property
    def changed(self) -> float:
        """Mean over the updated tensors of the share of elements whose bits changed."""
        return _mean(report.changed for report in self.tensors.values() if report.is_finite)

    @property
    def num_limited(self) -> int:
        """Number of updated tensors whose update was clipped."""
        return sum(report.is_finite and report.limited < 1 for report in self.tensors.values())

    @property
    def applied(self) -> bool:
        """Whether any parameter was updated."""
        return len(self.skipped) < len(self.tensors)


def _on_gradient(params: Iterable[Tensor], hook: Callable[[Tensor], None]) -> list[Any]:
    return [param.register_post_accumulate_grad_hook(hook) for param in params]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))


class Learner:
    """Teaches a causal language model in place, one example at a time.

    `settings` are Apollo's keyword arguments. Embeddings, and an output head, are frozen unless
    `train_embeddings`; `checkpoint_layers` computes each layer twice and keeps less of it.
    `breathe` is called before each layer and after each tensor is written; it may stand still, and
    returns the seconds. On a GPU that holds back only what has not been launched. Raises
    UnfaithfulPrefix or UnsupportedLayer for a model whose context cannot be read apart.
    """

    def __init__(
        self,
        module: "PreTrainedModel",
        *,
        train_embeddings: bool = False,
        checkpoint_layers: bool = False,
        kernels: KernelChoice = "auto",
        breathe: Callable[[], float] = lambda: 0.0,
        **settings: Any,
    ) -> None:
        self.module = module.train().requires_grad_(True)
        for part in (module.get_input_embeddings(), module.get_output_embeddings()):
            if part is not None:
                part.requires_grad_(train_embeddings)
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        chosen = choose_kernels(kernels, module.device)
        self.optimizer = Apollo(trained, kernels=chosen, **settings)
        self._checkpoint_layers = checkpoint_layers
        if checkpoint_layers:
            let_checkpointing_read(module)
        check_prefix(module)
        self._watch = Stopwatch(module.device)
        self._breathe, self._rested_s = breathe, 0.0
        decoder, params = module.get_decoder(), [param for _, param in trained]
        layers = getattr(decoder, "layers", ())
        self._handles = [decoder.register_forward_pre_hook(self._read_or_learn)]
        self._handles += [layer.register_forward_pre_hook(self._rest) for layer in layers]
        # In the order in which a gradient goes through them.
        self._handles += _on_gradient(params, lambda _: self._watch.mark("optimizer"))
        self._release = attach(module, self.optimizer)
        self._handles += _on_gradient(params, lambda _: self._watch.mark("backward"))
        self._handles += _on_gradient(params, self._rest)

    def step(
        self,
        example: Example,
        learning_rate: float,
        *,
        objective: Objective = "sft",
        grad_context: int = 0,
        anchor: tuple[Example, float] | None = None,
        deadline_s: float = math.inf,
        before_writing: Callable[[], None] = lambda: None,
    ) -> StepReport:
        """Learn `example` once; raises NonFiniteLoss or StepTooLong before anything changes.

        A backward pass cannot be stopped half way, and takes about twice as long as the forward
        pass: what has used up a third of its deadline by then is given up.
        `anchor` is a canary of `record_canaries` and the strength of keeping to its record; the
        reported loss is without it. The last `grad_context` tokens of the context are in the
        graph, and at least one. `before_writing` is called just before any weight may change.
        """
        begun, self._rested_s = time.monotonic(), 0.0
        self._watch.read()  # Of a step that was given up, and of what was no step.
        with measured_peak(self.module.device) as peak:
            loss = loss_of(self.module, example, objective, grad_context)
            loss_value = loss.item()
            if anchor is not None:
                canary, strength = anchor
                loss = loss + strength * divergence(self.module, canary)
            self._refuse(loss_value, time.monotonic() - begun - self._rested_s, deadline_s)
            before_writing()
            self._release.begin_step(learning_rate)
            self._watch.mark("backward")
            loss.backward()
            self._watch.mark("optimizer")
            self._release.end_step()
            self._watch.mark(None)
        return StepReport(
            loss_value,
            self.optimizer.reports,
            next(iter(peak), None),
            self._rested_s,
            self._watch.read(),
        )

    def _rest(self, *_: object) -> None:
        if self._watch.is_gpu:  # What was launched goes on meanwhile.
            self._rested_s += self._breathe()
            return
        part = self._watch.part
        self._watch.mark("rested")
        self._rested_s += self._breathe()
        self._watch.mark(part)

    def _read_or_learn(self, decoder: torch.nn.Module, *_: object) -> None:
        """A context is read in evaluation mode, see `read_prefix`."""
        self._watch.mark("forward" if decoder.training else "prefix")

    def use_threads(self, num: int) -> None:
        """Compute the following steps of the calling thread with so many threads on a CPU."""
        torch.set_num_threads(num)

    def estimate(self, num_grad_tokens: int, num_read_tokens: int) -> Memory:
        """Memory that such a step will take."""
        return estimate_memory(
            self.module, num_grad_tokens, num_read_tokens, self._checkpoint_layers
        )

    def _refuse(self, loss_value: float, forward_s: float, deadline_s: float) -> None:
        if not math.isfinite(loss_value):
            raise NonFiniteLoss(
                f"the loss is {loss_value}; nothing was changed. Look for weights that are not "
                "finite, or return to an earlier checkpoint"
            )
        if forward_s > deadline_s / 3:
            raise StepTooLong(
                f"the forward pass took {forward_s:.0f} s, so the step would pass its deadline of "
                f"{deadline_s:.0f} s; nothing was changed. Shorten the sample or its grad_context"
            )

    def close(self) -> None:
        """Remove the hooks; the module is an ordinary one again."""
        self._release.close()
        for handle in self._handles:
            handle.remove()
