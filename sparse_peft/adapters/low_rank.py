"""Plain LoRA that approximates an adapter: the best of a rank, with the error that is left."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..support import principal_factors
from ..tuners.delta import Delta
from ..tuners.low_rank import LowRankState
from ..tuners.tuner_layer import TunerLayer
from .files import write_adapter
from .lora import LoraFactors, as_factors, check_has_lora, to_lora


class _DeltaMatrix:
    """A layer's delta as a map from inputs to outputs, float64 on the CPU, sparse and low-rank parts never formed.

    Attributes:
        shape: ``(outputs, inputs)``.
    """

    def __init__(self, layer: TunerLayer, adapter_name: str):
        state = layer.settled(adapter_name)
        rows, cols = layer.stored_shape
        self.shape = (rows, cols) if layer.product.in_dim == 1 else (cols, rows)
        self._sparse = self._factors = None
        if isinstance(state, Delta):
            support = state.support.to("cpu")
            where = torch.stack([support.rows, support.cols]).long()
            where = where if layer.product.in_dim == 1 else where.flip(0)
            values = state.values.detach().cpu().double()
            self._sparse = torch.sparse_coo_tensor(where, values, self.shape).coalesce()
        if isinstance(state, LowRankState):
            self._factors = tuple(factor.detach().cpu().double() for factor in state.factors())

    def times(self, x: Tensor) -> Tensor:
        parts = [] if self._sparse is None else [torch.sparse.mm(self._sparse, x)]
        if self._factors is not None:
            down, up = self._factors
            parts.append(up @ (down @ x))
        return sum(parts)

    def transposed_times(self, x: Tensor) -> Tensor:
        parts = [] if self._sparse is None else [torch.sparse.mm(self._sparse.t(), x)]
        if self._factors is not None:
            down, up = self._factors
            parts.append(down.t() @ (up.t() @ x))
        return sum(parts)

    def square(self) -> float:
        """Sum of squares of its entries."""
        total = 0.0 if self._sparse is None else float(self._sparse.values().square().sum())
        if self._factors is not None:
            down, up = self._factors
            total += float(((up.t() @ up) * (down @ down.t())).sum())
            if self._sparse is not None:
                total += 2 * float((up * torch.sparse.mm(self._sparse, down.t())).sum())
        return total

    def squared_error(self, down: Tensor, up: Tensor) -> float:
        """Sum of squares of what ``up @ down`` lacks, without forming it."""
        down, up = down.double(), up.double()
        cross = float((up * self.times(down.t())).sum())
        own = float(((up.t() @ up) * (down @ down.t())).sum())
        return max(0.0, self.square() - 2 * cross + own)


@dataclass(frozen=True)
class LowRankExport:
    """An approximation of an adapter as plain LoRA.

    Attributes:
        config: the LoRA's.
        errors: ``{layer: error}``: Frobenius norm of what the approximation lacks, relative to the delta's.
        error: the same of all layers together; 0 is exact, 1 is no better than no adapter.
    """

    config: LoraConfig
    errors: dict[str, float]
    error: float


def save_low_rank(
    model: nn.Module, folder: str | os.PathLike, rank: int, adapter_name: str = "default"
) -> LowRankExport:
    """Save the best approximation of an adapter as plain LoRA of a rank, and say how far off it is.

    A sparse delta has full rank in general and is badly approximated: look at the error before using the result.

    Args:
        model: the model that has the adapter.
        folder: made if need be.
        rank: of all layers, as far as their weights have so many.
        adapter_name: which.

    Raises:
        ValueError: no such adapter, nothing left of it, or a rank below 1.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r}: an int of at least 1 is expected")
    lost: dict[str, tuple[float, float]] = {}

    def approximate(layer: TunerLayer, name: str) -> LoraFactors | None:
        check_has_lora(layer)
        delta = _DeltaMatrix(layer, name)
        square = delta.square()
        if square == 0:
            return None
        like = torch.empty(0, dtype=torch.float64)
        up, down = principal_factors(delta.times, delta.transposed_times, delta.shape, rank, like=like)
        up, down = up.float(), down.float()
        lost[layer.name] = delta.squared_error(down, up), square
        return as_factors(layer, down, up, 1.0)

    config, tensors = to_lora(model, adapter_name, factors_of=approximate)
    errors = {name: (missing / square) ** 0.5 for name, (missing, square) in lost.items()}
    missing, square = (sum(parts) for parts in zip(*lost.values()))
    error = (missing / square) ** 0.5
    story = (
        f"Plain LoRA of rank {rank} that approximates a sparse adapter, made with `sparse_peft`. Relative error of its "
        f"deltas (Frobenius norm): {error:.3g} over all layers, at most {max(errors.values()):.3g} in one."
    )
    write_adapter(folder, config, tensors, story)
    return LowRankExport(config, errors, error)
