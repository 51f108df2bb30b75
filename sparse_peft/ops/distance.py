"""The thresholded distance matrix of SNELL and SNELLA: a weight delta from the distances between vectors.

Each input and each output of the layer has a vector; the papers call the function of two vectors a kernel. It is a
weighted sum of distances (``"distance"``), optionally mixed with its softmax over the outputs (``"mixed"``).

The matrix is computed for a *part* of the inputs at a time, ``(outputs, inputs of the part)``. The softmax runs over
the outputs, so parts are independent. Source: SNELL, sections 3.2 and 3.3, https://arxiv.org/abs/2411.01800.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics.order_statistics import order_statistics
from ..numerics.panels import panels

# Coefficients of the pieces' distances. The paper lists them as trained; its code holds them fixed.
COEFFICIENTS = (0.1, -0.1)
PIECES = len(COEFFICIENTS)
# Maximum number of matrices of a part's size that are alive together.
ALIVE = 8
# The trained scalars of the mixed distance, with their initial values.
MIX = {"alpha": 1.0, "log_gamma": 0.0, "beta": 0.0}


class Factors(NamedTuple):
    """The vectors that distances are computed from.

    Attributes:
        inputs: ``(PIECES, inputs, r / PIECES)``.
        outputs: ``(PIECES, outputs, r / PIECES)``.
        mix: ``(3,)`` alpha, log gamma and beta of the mixed distance; None for the plain one.
    """

    inputs: Tensor
    outputs: Tensor
    mix: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(outputs, inputs)``."""
        return self.outputs.shape[1], self.inputs.shape[1]

    @property
    def numel(self) -> int:
        """Number of entries of the distance matrix."""
        return math.prod(self.shape)

    def parts(self, taps: int = 1) -> list[tuple[int, int]]:
        """Ranges of inputs whose matrices fit the panel limit together.

        Args:
            taps: inputs per channel; ranges contain whole channels.
        """
        outputs, inputs = self.shape
        bounds = panels(inputs // taps, ALIVE * outputs * taps * self.inputs.element_size())
        return [(start * taps, stop * taps) for start, stop in bounds]


class DistanceMatrix(NamedTuple):
    """A part of the distance matrix, with the tensors its gradient needs; all ``(outputs, inputs of the part)``.

    Attributes:
        value: the weighted sum of distances, mixed or not.
        distances: of each piece.
        attention: softmax over the outputs of the mixed distance; None for the plain one.
    """

    value: Tensor
    distances: list[Tensor]
    attention: Tensor | None


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast: rounded distances could not be compared with a threshold."""
    with torch.autocast(device.type, enabled=False):
        yield


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances ``(len(a), len(b))`` of rows; exactly 0 between equal rows."""
    if a.device.type == "cpu":
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    # elsewhere one matrix product is much faster; distances within its rounding error count as 0
    squares_a, squares_b = a.square().sum(1, keepdim=True), b.square().sum(1)
    squares = torch.addmm(squares_b, a, b.t(), alpha=-2).add_(squares_a)
    noise = (squares_a + squares_b).mul_(8 * torch.finfo(a.dtype).eps)
    return squares.masked_fill_(squares <= noise, 0).sqrt_()


def _weighted_sum(apart: list[Tensor]) -> Tensor:
    """The sum of the pieces' distances by their coefficients."""
    total = COEFFICIENTS[0] * apart[0]
    for coefficient, distance in zip(COEFFICIENTS[1:], apart[1:], strict=True):
        total = total + coefficient * distance
    return total


def distance_matrix(factors: Factors, start: int = 0, stop: int | None = None) -> DistanceMatrix:
    """The distance matrix of inputs ``start`` to ``stop``."""
    apart = [distances(b, a[start:stop]) for a, b in zip(factors.inputs, factors.outputs, strict=True)]
    value = _weighted_sum(apart)
    if factors.mix is None:
        return DistanceMatrix(value, apart, None)
    alpha, log_gamma, beta = factors.mix
    attention = (value / log_gamma.exp()).softmax(0)
    return DistanceMatrix(value + alpha * attention + beta, apart, attention)


class FactorGrads(NamedTuple):
    """Gradients of ``Factors``, of the same shapes."""

    inputs: Tensor
    outputs: Tensor
    mix: Tensor | None

    @classmethod
    def zeros(cls, factors: Factors) -> FactorGrads:
        """Zeros for all factors."""
        mix = None if factors.mix is None else torch.zeros_like(factors.mix)
        return cls(torch.zeros_like(factors.inputs), torch.zeros_like(factors.outputs), mix)


def distance_grads_(
    factors: Factors, part: DistanceMatrix, grad: Tensor, start: int, stop: int, into: FactorGrads
) -> None:
    """Add the gradients from one part of the distance matrix.

    Args:
        factors: of the distance matrix.
        part: of inputs ``start`` to ``stop``, by ``distance_matrix``.
        grad: ``(outputs, inputs of the part)`` gradient of the part's value; overwritten.
        start: first input.
        stop: last input + 1.
        into: the gradients to add to.
    """
    if factors.mix is not None and part.attention is not None and into.mix is not None:
        _mix_grads_(factors.mix, part.distances, part.attention, grad, into.mix)
    for piece, (coefficient, apart) in enumerate(zip(COEFFICIENTS, part.distances, strict=True)):
        a, b = factors.inputs[piece, start:stop], factors.outputs[piece]
        # at a distance of 0, the subgradient 0
        rate = (coefficient * grad).div_(apart).masked_fill_(apart == 0, 0)
        into.inputs[piece, start:stop] += rate.sum(0)[:, None] * a - rate.t() @ b
        into.outputs[piece] += rate.sum(1)[:, None] * b - rate @ a


def _mix_grads_(mix: Tensor, apart: list[Tensor], attention: Tensor, grad: Tensor, into: Tensor) -> None:
    """Add the gradients of the mixed distance's scalars, and pass ``grad`` on to the plain distance, in place."""
    alpha, log_gamma, _ = mix
    into[0] += (grad * attention).sum()
    into[2] += grad.sum()
    through = grad * attention
    through -= attention * through.sum(0)
    through *= alpha / log_gamma.exp()  # now the gradient of the plain distance through the softmax
    into[1] -= (through * _weighted_sum(apart)).sum()
    grad += through


# ---------------------------------------------------------------------------------------------------------- thresholds


@dataclass(frozen=True)
class Threshold:
    """How a threshold tau turns the distance matrix into a sparse delta.

    Attributes:
        apply: ``(value, tau)`` to the delta's entries.
        slope: ``(value, tau)`` to their derivative for autograd; tau counts as a constant.
        interpolates: whether tau lies between two absolute values, as a quantile does.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    interpolates: bool = False


def _soft(value: Tensor, tau: Tensor) -> Tensor:
    return value.abs().sub_(tau).clamp_(min=0).mul_(value)


def _soft_slope(value: Tensor, tau: Tensor) -> Tensor:
    size = value.abs()
    return (2 * size).sub_(tau).mul_(size > tau)


def _reference(value: Tensor, tau: Tensor) -> Tensor:
    size = value.abs()
    return (size * value).mul_(size > tau)


def _reference_slope(value: Tensor, tau: Tensor) -> Tensor:
    size = value.abs()
    return size * (size > tau)


def _hard(value: Tensor, tau: Tensor) -> Tensor:
    return value * (value.abs() > tau)


THRESHOLDS = {
    "soft": Threshold(_soft, _soft_slope),
    "reference": Threshold(_reference, _reference_slope, interpolates=True),
    "hard_ste": Threshold(_hard, lambda value, tau: torch.ones_like(value)),
}


@torch.no_grad()
def find_threshold(factors: Factors, kept: int, threshold: Threshold) -> Tensor:
    """The tau, a 0-d tensor, that ``kept`` absolute values of the distance matrix exceed.

    With ``dropped`` other values, tau is the ``dropped``-th smallest, or, where the threshold interpolates, the
    quantile of ``dropped / numel``. It is 0 if none is dropped.
    """
    numel, dropped = factors.numel, factors.numel - kept
    if dropped == 0:
        return factors.inputs.new_zeros(())
    ranks, weight = [dropped], 0.0
    if threshold.interpolates:
        place = dropped / numel * (numel - 1)
        weight = place - math.floor(place)
        ranks = [math.floor(place) + 1, min(math.floor(place) + 2, numel)]
    parts = factors.parts()
    if len(parts) == 1:
        sizes = distance_matrix(factors).value.abs_().flatten()
        found = [sizes.kthvalue(rank).values for rank in dict.fromkeys(ranks)]
    else:
        found = order_statistics(lambda: (distance_matrix(factors, *part).value.abs_() for part in parts), ranks)
    return torch.lerp(found[0], found[-1], weight)
