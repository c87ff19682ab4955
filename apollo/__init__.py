"""Tensors: the optimizer, the one copy of the weights, and what is learned from a sample.

`apollo.Apollo` and `apollo.attach` are what a training script of one's own needs. They are found
when asked for: looking at a model's directory must not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apollo.optim.optimizer import Apollo
    from apollo.optim.release import attach

__all__ = ["Apollo", "attach"]


def __getattr__(name: str) -> Any:
    if name == "Apollo":
        from apollo.optim.optimizer import Apollo

        return Apollo
    if name == "attach":
        from apollo.optim.release import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
