"""The best LoRA of a rank that approximates an adapter, with its error."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import nn

from ..constraints import Count, validated
from ..support import principal_factors
from ..tuners.base_layer import TunerLayer
from ..tuners.forms import LoraFactors
from .delta_matrix import DeltaMatrix
from .files import write_adapter
from .lora import check_has_lora, for_layer, to_lora


@dataclass(frozen=True)
class LowRankExport:
    """An approximation of an adapter as plain LoRA.

    Attributes:
        config: the LoRA's.
        errors: ``{layer: error}``: Frobenius norm of the delta minus its approximation, relative to the delta's.
        error: the same of all layers together; 0 is exact, 1 is no better than no adapter.
    """

    config: LoraConfig
    errors: dict[str, float]
    error: float


def save_low_rank(
    model: nn.Module, folder: str | os.PathLike, rank: int, adapter_name: str = "default"
) -> LowRankExport:
    """Save the best approximation of an adapter as plain LoRA of a rank, and return its error.

    A sparse delta has full rank in general and is badly approximated: look at the error before using the result.

    Args:
        model: the model that has the adapter.
        folder: made if need be.
        rank: of all layers; at most the smaller side of a weight.
        adapter_name: which.

    Raises:
        ValueError: no such adapter, nothing left of it, or a rank below 1.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import save_low_rank
        >>> config = SparseConfig(density=0.1, init_weights=False, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rough, exact = (save_low_rank(model, folder, rank).error for rank in (4, 32))
        >>> rough > 0.5 and exact < 1e-5
        True
    """
    rank = validated("rank", rank, Count)
    lost: dict[str, tuple[float, float]] = {}

    def approximate(layer: TunerLayer, name: str) -> LoraFactors | None:
        check_has_lora(layer)
        delta = DeltaMatrix(layer.settled(name), layer.product.in_dim)
        square = delta.square()
        if square == 0:
            return None
        like = torch.empty(0, dtype=torch.float64)
        up, down = principal_factors(delta.times, delta.transposed_times, delta.shape, rank, like=like)
        up, down = up.float(), down.float()
        lost[layer.name] = delta.squared_error(down, up), square
        return for_layer(layer, LoraFactors(down, up))

    config, tensors = to_lora(model, adapter_name, factors_of=approximate)
    errors = {name: (missing / square) ** 0.5 for name, (missing, square) in lost.items()}
    missing, square = (sum(parts) for parts in zip(*lost.values(), strict=True))
    error = (missing / square) ** 0.5
    story = (
        f"Plain LoRA of rank {rank} that approximates a sparse adapter, made with `sparse_peft`. Relative error of "
        f"its deltas (Frobenius norm): {error:.3g} over all layers, at most {max(errors.values()):.3g} in one."
    )
    write_adapter(folder, config, tensors, story)
    return LowRankExport(config, errors, error)
