"""Oracle of channel-wise APOLLO and Adam: float64, one channel at a time, nothing shared with ours.

Written from arXiv:2412.05270, algorithm 1, with alpha = sqrt(m / r). Axes: r = rank, m = smaller
side, n = larger side (channels).
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Adam:
    """Moments of one tensor and the direction that they give."""

    beta1: float
    beta2: float
    eps: float
    count: int = 0
    mean: Array | float = 0.0
    square: Array | float = 0.0

    def direction(self, grad: Array) -> Array:
        self.count += 1
        self.mean = self.beta1 * self.mean + (1 - self.beta1) * grad
        self.square = self.beta2 * self.square + (1 - self.beta2) * grad * grad
        unbiased_mean = self.mean / (1 - self.beta1**self.count)
        unbiased_square = self.square / (1 - self.beta2**self.count)
        return np.asarray(unbiased_mean / (np.sqrt(unbiased_square) + self.eps))


@dataclass
class ReferenceApollo:
    """APOLLO of one tensor; the caller brings the projection P_rm of each step."""

    weight: Array
    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-10
    weight_decay: float = 0.0
    clip: float | None = None
    norm_mean: float = 0.0
    adam: Adam = field(init=False)

    def __post_init__(self) -> None:
        self.adam = Adam(self.beta1, self.beta2, self.eps)

    def step(self, grad: Array, projection_rm: Array | None) -> None:
        if projection_rm is None:
            update = self.adam.direction(grad)
        elif grad.shape[0] <= grad.shape[1]:
            update = self._channel_wise(grad, projection_rm)
        else:
            update = self._channel_wise(grad.T, projection_rm).T
        update = self._clipped(update)
        if self.weight.ndim > 1:
            self.weight = self.weight - self.lr * self.weight_decay * self.weight
        self.weight = self.weight - self.lr * update

    def _channel_wise(self, grad_mn: Array, projection_rm: Array) -> Array:
        rank, side = projection_rm.shape
        projected_rn = projection_rm @ grad_mn
        adam_rn = self.adam.direction(projected_rn)
        update_mn = np.zeros_like(grad_mn)
        for channel in range(grad_mn.shape[1]):
            before = np.linalg.norm(projected_rn[:, channel])
            after = np.linalg.norm(adam_rn[:, channel])
            if before > 0:
                update_mn[:, channel] = grad_mn[:, channel] * after / before
        return math.sqrt(side / rank) * update_mn

    def _clipped(self, update: Array) -> Array:
        if self.clip is None:
            return update
        norm = float(np.linalg.norm(update))
        if self.norm_mean == 0:
            self.norm_mean = norm
        limit = self.clip * self.norm_mean
        self.norm_mean = 0.9 * self.norm_mean + 0.1 * min(norm, 10 * self.norm_mean)
        return update * (limit / norm) if norm > limit else update
