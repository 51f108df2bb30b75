"""The trained state of one adapter with sparse factors in one layer."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ...dynamics.full_tensor import write_full_tensor_
from ...support import Support, check_indices, index_dtype
from ..forms import StateSizes
from ..low_rank import LowRankState
from .config import SparseIFTConfig

FACTORS = ("A", "B")


class SparseFactors(LowRankState):
    """``scale * B @ A`` is added to the weight; entries of both factors train, and the others are zero.

    The parameters ``A_values`` and ``B_values`` belong to the flat positions ``A_positions`` of ``(rank, inputs)`` and
    ``B_positions`` of ``(outputs, rank)``.

    Args:
        sizes: ``(inputs, outputs)`` of the layer.
        config: the adapter's.
        name: the layer's name.

    Attributes:
        seen: while gradients are observed, ``{"A" or "B": the dense factor's gradient}``.
    """

    value_name = "B_values"
    position_names = ("A_positions", "B_positions")
    combinations = ()
    why_these_combinations = "sums of sparse factors are denser; save them with save_as_lora and combine these"
    seen: dict[str, Tensor] | None = None

    def __init__(self, sizes: tuple[int, int], config: SparseIFTConfig, name: str):
        super().__init__(name)
        inputs, outputs = sizes
        self.shapes = {"A": (config.rank, inputs), "B": (outputs, config.rank)}
        self.scale = config.alpha / config.r
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        for factor, side in (("A", inputs), ("B", outputs)):
            shape = self.shapes[factor]
            drawn = Support.random(shape, config.r * side, seed=config.seed, name=f"{name}.{factor}")
            self.register_parameter(f"{factor}_values", nn.Parameter(torch.zeros(drawn.nnz)))
            self.register_buffer(f"{factor}_positions", drawn.indices.to(index_dtype(shape)))
        # the variance of LoRA's, whose rows have all inputs
        bound = math.sqrt(config.rank / config.r / inputs)
        nn.init.uniform_(self.own_parameters["A_values"], -bound, bound)
        self.keep_dtype()

    def randomise(self) -> None:
        nn.init.normal_(self.own_parameters["B_values"])

    @property
    def rank(self) -> int:
        return self.shapes["A"][0]

    def sizes(self, save_dtype: torch.dtype) -> StateSizes:
        dense = sum(rows * cols * self.watched.element_size() for rows, cols in self.shapes.values())
        positions = sum(self.own_parameters[f"{factor}_values"].numel() for factor in FACTORS) * torch.int64.itemsize
        return replace(super().sizes(save_dtype), formed_bytes=dense + positions)

    def support(self, factor: str) -> Support:
        """The positions of ``"A"`` or ``"B"`` that train."""
        positions = self.own_buffers[f"{factor}_positions"]
        return Support(self.shapes[factor], positions, validate=False, name=f"{self.name}.{factor}")

    def _dense(self, factor: str) -> Tensor:
        """A factor with its zeros; thin, and differentiable."""
        rows, cols = self.shapes[factor]
        values = self.own_parameters[f"{factor}_values"]
        flat = values.new_zeros(rows * cols).scatter(0, self.own_buffers[f"{factor}_positions"].long(), values)
        if self.seen is not None and flat.requires_grad:
            flat.register_hook(partial(self._see, self.seen, factor))
        return flat.view(rows, cols)

    @staticmethod
    def _see(seen: dict[str, Tensor], factor: str, grad: Tensor) -> None:
        seen[factor] = seen[factor] + grad.detach().float() if factor in seen else grad.detach().float()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self._dense("A"), self._dense("B") * self.scale

    @torch.no_grad()
    def move(self, factor: str, positions: Tensor, values: Tensor) -> None:
        """Put other entries in place; as many as before."""
        self.changes += 1
        self.own_buffers[f"{factor}_positions"].copy_(positions)
        write_full_tensor_(self.own_parameters[f"{factor}_values"], values)

    def take_file(self, positions: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        taken = super().take_file(positions, parameters)
        for factor, shape in self.shapes.items():
            check_indices(positions[f"{factor}_positions"], shape, f"{self.name} ({factor})")
        return taken

    def extra_repr(self) -> str:
        kept = {factor: self.own_parameters[f"{factor}_values"].numel() for factor in FACTORS}
        return f"rank={self.rank}, entries of A={kept['A']}, of B={kept['B']}"
