"""Tensors: the optimizer, the one copy of the weights, and what is learned from a sample."""

from apollo.optim.optimizer import Apollo
from apollo.optim.release import attach

__all__ = ["Apollo", "attach"]
