"""Which implementation of the update runs where."""

import os
from importlib.util import find_spec
from typing import Literal

import torch

from apollo.optim.update import Kernels, TorchKernels

KernelChoice = Literal["auto", "eager", "compiled", "triton"]


def choose_kernels(choice: KernelChoice, device: torch.device) -> Kernels:
    """`auto` is Triton for weights on a CUDA device that has it, and eager torch elsewhere.

    `compiled` pays on a CPU for runs of hundreds of steps. Raises ValueError or RuntimeError where
    the choice cannot be had.
    """
    if choice == "auto":
        choice = "triton" if device.type == "cuda" and find_spec("triton") else "eager"
    if choice == "triton":
        _check_triton(device)
        from apollo.optim.triton_kernels import TritonKernels

        return TritonKernels()
    if choice == "compiled":
        from apollo.optim.compiled import CompiledKernels

        return CompiledKernels()
    return TorchKernels()


def _check_triton(device: torch.device) -> None:
    if find_spec("triton") is None:
        raise ValueError(
            "kernels='triton': the triton package is not installed; install it, or use "
            "kernels='auto'"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernels='triton': the weights are on {device}, and Triton's programs run on a CUDA "
            "device; use kernels='auto' (for tests, TRITON_INTERPRET=1 interprets them on a CPU)"
        )
