"""Oracle of the optimizer: float64, one channel at a time, slow, and nothing shared with ours.

Written from the equations: APOLLO and APOLLO-Mini (arXiv:2412.05270, algorithm 1) with alpha =
sqrt(m / r), Adam (arXiv:1412.6980), the column normalisation of SCALE (arXiv:2506.16659), and
Philox4x32-10 (Salmon et al., SC 2011) in Python's unbounded integers.

Axes: r = rank, m = side that is projected away, n = channels.
"""

import hashlib
import math
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Ten rounds of Philox4x32, as Random123 prints them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def noise_16(seed: int, row: int, column: int) -> int:
    """The number in [0, 65536) that belongs to one element of a matrix."""
    words = philox4x32((column // 8, row, 0, 0), (seed & MASK, seed >> 32))
    within = column % 8
    return words[within] & 0xFFFF if within < 4 else words[within - 4] >> 16


def seed_of(*parts: int | str) -> int:
    """63 bits of blake2b of the parts' repr."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") // 2


def normal_quantile(place: int) -> float:
    """Middle of the `place`-th of 65536 equal shares of N(0, 1), as a bfloat16 number."""
    return nearest_bfloat16(NormalDist().inv_cdf((place + 0.5) / 65536))


def projection(seed: int, name: str, refresh: int, rank: int, side: int) -> Array:
    """P_rm of one tensor between two refreshes, N(0, 1/r)."""
    drawn = seed_of("projection", seed, name, refresh)
    table = [
        [normal_quantile(noise_16(drawn, row, column)) for column in range(side)]
        for row in range(rank)
    ]
    return np.array(table) / math.sqrt(rank)


def nearest_bfloat16(value: float) -> float:
    """The nearest number of 8 significant bits, ties to the even one (normal numbers only)."""
    if value == 0:
        return value
    unit = 2.0 ** (math.frexp(value)[1] - 8)
    return round(value / unit) * unit


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
    """The optimizer of one tensor; the caller brings the projection P_rm of each step, if any.

    `neurons` turns on SCALE's rule: the axis that a neuron's weights lie along, or None.
    """

    weight: Array
    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-10
    weight_decay: float = 0.0
    clip: float | None = None
    norm_growth: float | None = None
    scale: float | None = None
    """Alpha; None is `auto`."""
    neurons: int | None = None
    has_momentum: bool = False
    norm_mean: float = 0.0
    norm_last: float = 0.0
    update: Array = field(init=False)
    """What the last step subtracted, over the learning rate; without the weight decay."""
    limited: float = 1.0
    adam: Adam = field(init=False)

    def __post_init__(self) -> None:
        self.adam = Adam(self.beta1, self.beta2, self.eps)

    def step(self, grad: Array, projection_rm: Array | None = None) -> None:
        """One step with the gradient in the weight's own shape."""
        grad = np.asarray(grad, dtype=np.float64)
        matrix = grad.reshape(-1, grad.shape[-1]) if grad.ndim else grad.reshape(1, 1)
        if self.neurons is not None:
            update = self._per_neuron(matrix)
        elif projection_rm is None:
            update = self.adam.direction(matrix)
        elif grad.ndim == 2 and grad.shape[0] <= grad.shape[1]:
            update = self._projected(matrix, projection_rm)
        else:
            update = self._projected(matrix.T, projection_rm).T
        self.limited = self._limit(float(np.linalg.norm(update)))
        self.update = update.reshape(grad.shape) * self.limited
        if self.weight.ndim > 1:
            self.weight = self.weight - self.lr * self.weight_decay * self.weight
        self.weight = self.weight - self.lr * self.update

    def _projected(self, grad_mn: Array, projection_rm: Array) -> Array:
        rank, side = projection_rm.shape
        alpha = math.sqrt(side / rank) if self.scale is None else self.scale
        projected_rn = projection_rm @ grad_mn
        adam_rn = self.adam.direction(projected_rn)
        update_mn = np.zeros_like(grad_mn)
        channels = range(grad_mn.shape[1])
        # Mini: all channels share one factor.
        for together in [[channel] for channel in channels] if rank > 1 else [list(channels)]:
            before = np.linalg.norm(projected_rn[:, together])
            after = np.linalg.norm(adam_rn[:, together])
            if before > 0:
                update_mn[:, together] = alpha * grad_mn[:, together] * after / before
        return update_mn

    def _per_neuron(self, grad_ij: Array) -> Array:
        if self.has_momentum:
            self.adam.mean = self.beta1 * self.adam.mean + (1 - self.beta1) * grad_ij
            grad_ij = np.asarray(self.adam.mean)
        assert self.neurons is not None
        neurons = np.moveaxis(grad_ij, self.neurons, 1)
        update = np.zeros_like(neurons)
        alpha = math.sqrt(neurons.shape[1]) if self.scale is None else self.scale
        for neuron, weights in enumerate(neurons):
            size = np.linalg.norm(weights)
            if size > 0:
                update[neuron] = alpha * weights / size
        return np.moveaxis(update, 1, self.neurons)

    def _limit(self, norm: float) -> float:
        factor = 1.0
        if self.clip is not None:
            if self.norm_mean == 0:
                self.norm_mean = norm
            if norm > self.clip * self.norm_mean:
                factor = self.clip * self.norm_mean / norm
            self.norm_mean = 0.9 * self.norm_mean + 0.1 * min(norm, 10 * self.norm_mean)
        if self.norm_growth is not None:
            norm = norm * factor
            if self.norm_last > 0 and norm > self.norm_growth * self.norm_last:
                factor *= self.norm_growth * self.norm_last / norm
                norm = self.norm_growth * self.norm_last
            if norm > 0:
                self.norm_last = norm
        return factor
