"""The trained state of one SoRA adapter in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ...ops import Combination
from ..forms import LoraFactors
from ..low_rank import LowRankState

GATES = ("ones", "normal")


class GatedLowRank(LowRankState):
    """``scale * B @ diag(gate) @ A`` is added to the weight.

    The gate ``(rank,)`` stays float32 when the model is cast: bfloat16 would round its small steps away.

    Args:
        sizes: ``(inputs, outputs)`` of the layer.
        rank: number of ranks.
        scale: of the product.
        dropout: probability with which an input is left out in training.
        gate: how it starts, ``"ones"`` or ``"normal"``.
        name: the layer's name, for error messages.
    """

    value_name = "gate"
    full_precision = frozenset({"gate"})
    always_float32 = frozenset({"gate"})

    def __init__(self, sizes: tuple[int, int], rank: int, scale: float, dropout: float, gate: str, name: str):
        super().__init__(name)
        self.add_factors(sizes, rank, scale, dropout)
        self.gate = nn.Parameter(torch.ones(rank) if gate == "ones" else torch.randn(rank))
        self.keep_dtype()

    def randomise(self) -> None:
        nn.init.normal_(self.B)
        nn.init.normal_(self.gate)

    def factors(self) -> tuple[Tensor, Tensor]:
        # scaling B costs (outputs, rank) once; scaling the ranks' activations would keep them for backward
        gate = (self.gate * self.scale).to(self.B.dtype)
        return self.A, self.B * gate

    @property
    def alive(self) -> int:
        """Number of ranks with a gate that is not zero."""
        return int((self.gate.detach() != 0).sum())

    @classmethod
    def combine(cls, states: Sequence[Self], weights: Sequence[float], how: Combination) -> dict[str, Tensor]:
        factors, gates = [], []
        for state in states:
            alive = state.gate.detach().nonzero().squeeze(1)
            gates.append(state.gate.detach()[alive].cpu())
            factors.append((state.A[alive], state.B[:, alive] * state.scale))
        if how.combination_type == "svd":  # the approximation has ranks of its own, without gates
            factors = [(down, up * gate.to(up)) for (down, up), gate in zip(factors, gates, strict=True)]
        down, up = cls.combined_factors(factors, weights, how, states[0].name)
        gate = torch.ones(len(down)) if how.combination_type == "svd" else torch.cat(gates).float()
        return {"A": down, "B": up, "gate": gate}

    def lora_factors(self, in_dim: int) -> LoraFactors:
        """The ranks with a gate that is not zero, the strongest first, so that fewer of them are a slice."""
        gate, a, b = (tensor.detach().float() for tensor in (self.gate, self.A, self.B))
        alive = gate.nonzero().squeeze(1)
        strengths = (gate.abs() * a.norm(dim=1) * b.norm(dim=0))[alive]
        alive = alive[strengths.argsort(descending=True, stable=True)]
        return LoraFactors(a[alive], b[:, alive] * gate[alive], self.scale)

    def resize(self, rank: int) -> None:
        """Change the number of ranks; all values are to be set afterwards."""
        if rank == self.rank:
            return
        sizes = {"A": (rank, self.A.shape[1]), "B": (self.B.shape[0], rank), "gate": (rank,)}
        for name, size in sizes.items():
            old = self.own_parameters[name]
            setattr(self, name, nn.Parameter(old.new_zeros(size), requires_grad=old.requires_grad))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, inputs={self.A.shape[1]}, outputs={self.B.shape[0]}, scale={self.scale:g}"
