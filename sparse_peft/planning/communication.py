"""Bytes that processes send one another in a training step and when positions change.

All figures are those of ring algorithms: of a tensor of ``n`` bytes in all, each of ``p`` processes sends
``n (p - 1) / p`` to gather it or to scatter its sum, and twice that to sum it for everyone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Annotated

from ..constraints import Count, CountOrZero, OneOf, validate_fields

STRATEGIES = ("ddp", "fsdp2", "zero3", "tp")
"""How a model is divided among processes."""
VALUE_BYTES = 4  # of values and their gradients, in float32


def gathered(total: int, processes: int) -> int:
    """Bytes that a process sends where all gather ``total`` bytes, or scatter their sum."""
    return total * (processes - 1) // processes


def summed(total: int, processes: int) -> int:
    """Bytes that a process sends where all sum ``total`` bytes."""
    return 2 * gathered(total, processes)


@dataclass(frozen=True)
class DividedRun:
    """A training step, as far as it decides what is sent.

    Args:
        trained: trained numbers, in float32.
        block_bytes: of all frozen weights in the blocks.
        rest_bytes: of the other frozen weights: embeddings and head.
        activation_bytes: of one activation of all tokens of a process, between two layers.
        blocks: number of blocks.
        own_bytes: of the values that a process needs for its rows of the weights and another one has; FSDP2 only.

    Raises:
        ValueError: numbers out of range.
    """

    trained: CountOrZero
    block_bytes: CountOrZero
    rest_bytes: CountOrZero = 0
    activation_bytes: CountOrZero = 0
    blocks: Count = 1
    own_bytes: CountOrZero = 0

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a process sends in a step.

    Attributes:
        weights: frozen weights, and the values that are gathered with them.
        activations: parts of layers' outputs and of their inputs' gradients.
        gradients: of trained numbers.
        own_values: values of the entries in own rows, before weights are gathered.
    """

    weights: int = 0
    activations: int = 0
    gradients: int = 0
    own_values: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))


@dataclass(frozen=True)
class _Strategy:
    name: Annotated[str, OneOf(STRATEGIES)]
    processes: Count

    def __post_init__(self) -> None:
        validate_fields(self)


# Sums in a block of a Llama under tp_plan: after o and down in forward; of the inputs' gradients of q, k, v, gate and
# up in backward.
SUMS_IN_A_BLOCK = 7


def step_traffic(run: DividedRun, strategy: str, processes: int) -> Traffic:
    """Bytes that each process sends in a step.

    Args:
        run: the step.
        strategy: one of [`STRATEGIES`][sparse_peft.planning.STRATEGIES]. With ``"fsdp2"`` and ``"zero3"`` blocks are
            gathered in forward and in backward, the rest once.
        processes: their number.

    Raises:
        ValueError: a strategy that does not exist, or no process.

    Example:
        >>> from sparse_peft.planning import DividedRun, step_traffic
        >>> run = DividedRun(trained=67_000_000, block_bytes=13_000_000_000, rest_bytes=500_000_000)
        >>> {name: f"{step_traffic(run, name, 8).total / 1e9:.1f} GB" for name in ("ddp", "fsdp2")}
        {'ddp': '0.5 GB', 'fsdp2': '23.9 GB'}
    """
    chosen, values = _Strategy(strategy, processes), run.trained * VALUE_BYTES
    if chosen.name == "ddp":
        return Traffic(gradients=summed(values, processes))
    if chosen.name == "tp":
        sums = SUMS_IN_A_BLOCK * run.blocks * run.activation_bytes
        return Traffic(activations=summed(sums, processes), gradients=summed(values, processes))
    weights = gathered(2 * (run.block_bytes + values) + run.rest_bytes, processes)
    return Traffic(weights=weights, gradients=gathered(values, processes), own_values=run.own_bytes)


def reselection_traffic(entries: int, candidates: int, processes: int, window: int = 1) -> int:
    """Bytes that each process sends for one reselection by gradients.

    In the window's first step candidates are gathered (position, sum, and whether it came late) and the sums of
    trained entries are averaged; in each further step both are averaged. At the end the first process sends the new
    positions and where their values come from.

    Args:
        entries: trained entries.
        candidates: that a process proposes.
        processes: their number.
        window: optimizer steps of the window (``accumulate``).
    """
    first = (processes - 1) * candidates * (8 + 4 + 1) + summed(4 * entries, processes)
    later = (window - 1) * summed(4 * (entries + candidates), processes)
    return first + later + gathered((4 + 8) * entries, processes)


def expected_own_bytes(entries: Iterable[int], processes: int) -> int:
    """``DividedRun.own_bytes`` to be expected of positions that are drawn at random, all alike.

    Values are divided evenly and rows are, so that process ``i`` lacks those between the ``i``-th parts of both. Of
    ``n`` entries, the number in the first share ``q`` of the rows is binomial, with a mean absolute deviation of
    ``sqrt(2 n q (1 - q) / pi)``.

    Args:
        entries: of each layer.
        processes: their number.
    """
    shares = [i / processes for i in range(1, processes)]
    spread = sum(math.sqrt(2 * share * (1 - share) / math.pi) for share in shares)
    return round(VALUE_BYTES * spread * sum(math.sqrt(n) for n in entries) / processes)
