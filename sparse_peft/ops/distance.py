"""A weight out of the distances between an input's and an output's vectors, thresholded (SNELL and SNELLA).

Everything is computed for a *part* of the inputs at a time, as a matrix ``(outputs, inputs of the part)``: the softmax
of SNELLA's kernel runs over the outputs, so a part needs no other. Source: SNELL (NeurIPS 2024), sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import order_statistics
from ..numerics.panels import panels

# What the pieces' distances are weighted by. The paper lists the weights as trained, its code holds them fixed.
COEFFICIENTS = (0.1, -0.1)
PIECES = len(COEFFICIENTS)
# Matrices of a part's size that are alive together, at most.
ALIVE = 8
# The trained numbers of the mixed kernel, and how they start.
MIX = {"alpha": 1.0, "log_gamma": 0.0, "beta": 0.0}


class Factors(NamedTuple):
    """What a kernel is computed from.

    Attributes:
        inputs: ``(PIECES, inputs, r / PIECES)``.
        outputs: ``(PIECES, outputs, r / PIECES)``.
        mix: ``(3,)`` alpha, log gamma and beta of the mixed kernel; None for the distance kernel.
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
        return math.prod(self.shape)

    def parts(self, taps: int = 1) -> list[tuple[int, int]]:
        """Ranges of inputs, of whole channels of ``taps`` inputs, whose matrices fit the panel limit together."""
        outputs, inputs = self.shape
        bounds = panels(inputs // taps, ALIVE * outputs * taps * self.inputs.element_size())
        return [(start * taps, stop * taps) for start, stop in bounds]


class DistanceMatrix(NamedTuple):
    """A part of the kernel, with what its gradient needs; all ``(outputs, inputs of the part)``.

    Attributes:
        value: the kernel.
        distances: of each piece.
        attention: of the mixed kernel the softmax over the outputs.
    """

    value: Tensor
    distances: list[Tensor]
    attention: Tensor | None


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast: rounded distances have no order."""
    with torch.autocast(device.type, enabled=False):
        yield


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances ``(len(a), len(b))`` of rows; exactly 0 between rows that are equal."""
    if a.device.type == "cpu":
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    # elsewhere one matrix product is much faster; what is below its rounding counts as 0
    squares_a, squares_b = a.square().sum(1, keepdim=True), b.square().sum(1)
    squares = torch.addmm(squares_b, a, b.t(), alpha=-2).add_(squares_a)
    noise = (squares_a + squares_b).mul_(8 * torch.finfo(a.dtype).eps)
    return squares.masked_fill_(squares <= noise, 0).sqrt_()


def distance_matrix(factors: Factors, start: int = 0, stop: int | None = None) -> DistanceMatrix:
    """The part of the kernel that belongs to inputs ``start`` to ``stop``."""
    apart = [distances(b, a[start:stop]) for a, b in zip(factors.inputs, factors.outputs, strict=True)]
    value = sum(c * d for c, d in zip(COEFFICIENTS, apart, strict=True))
    if factors.mix is None:
        return DistanceMatrix(value, apart, None)
    alpha, log_gamma, beta = factors.mix
    attention = (value / log_gamma.exp()).softmax(0)
    return DistanceMatrix(value + alpha * attention + beta, apart, attention)


def distance_grads_(
    factors: Factors,
    part: DistanceMatrix,
    grad: Tensor,
    start: int,
    stop: int,
    into: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """Add the gradients that a part gives.

    Args:
        factors, start, stop: as in ``kernel``, which gave ``part``.
        grad: ``(outputs, inputs of the part)`` gradient of the part's value; overwritten.
        into: gradients of the factors' inputs, outputs and mix.
    """
    of_inputs, of_outputs, of_mix = into
    if factors.mix is not None:
        alpha, log_gamma, _ = factors.mix
        gamma, attention = log_gamma.exp(), part.attention
        of_mix[0] += (grad * attention).sum()
        of_mix[2] += grad.sum()
        through = grad * attention
        through -= attention * through.sum(0)
        through *= alpha / gamma  # now the gradient of the distances' sum that the softmax sees
        seen = sum(c * d for c, d in zip(COEFFICIENTS, part.distances, strict=True))
        of_mix[1] -= (through * seen).sum()
        grad += through
    for piece, (coefficient, apart) in enumerate(zip(COEFFICIENTS, part.distances, strict=True)):
        a, b = factors.inputs[piece, start:stop], factors.outputs[piece]
        # of a distance of 0 any number up to 1 is a subgradient
        rate = (coefficient * grad).div_(apart).masked_fill_(apart == 0, 0)
        of_inputs[piece, start:stop] += rate.sum(0)[:, None] * a - rate.t() @ b
        of_outputs[piece] += rate.sum(1)[:, None] * b - rate @ a


# ---------------------------------------------------------------------------------------------------- thresholds


@dataclass(frozen=True)
class Threshold:
    """How entries compete: what becomes of the kernel's value at a threshold, and of its gradient.

    Attributes:
        apply: ``(value, tau)`` to the weight's entries.
        slope: ``(value, tau)`` to the derivative that autograd is given; tau counts as a constant.
        interpolates: tau lies between two of the kernel's absolute values, as a quantile does.
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
    """The tau, a 0-d tensor, above which ``kept`` of the kernel's absolute values lie.

    With ``dropped`` the others: the ``dropped``-th smallest of them, or, where the threshold interpolates, their
    quantile of ``dropped / numel``; 0 if none is dropped.
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
