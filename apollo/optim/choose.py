"""Which implementation of the update runs where."""

from typing import Literal

from apollo.optim.update import Kernels, TorchKernels

KernelChoice = Literal["auto", "eager", "compiled"]


def choose_kernels(choice: KernelChoice) -> Kernels:
    """`auto` is eager torch; `compiled` pays on a CPU for runs of hundreds of steps.

    Raises RuntimeError where the choice cannot be had.
    """
    if choice == "compiled":
        from apollo.optim.compiled import CompiledKernels

        return CompiledKernels()
    return TorchKernels()
