"""SST in training: normal vectors, new draws, and a new decomposition after each round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...dynamics.full_tensor import full_tensor, write_full_tensor_
from ...dynamics.protocol import Dynamics
from ...dynamics.records import Record
from .config import SSTConfig
from .layer import SSTLinear
from .state import SpectralState


@dataclass(frozen=True)
class Draw(Record, event="spectral_draw", plural="draws of singular vectors"):
    """Other singular vectors train.

    Attributes:
        step: number of optimizer steps completed when it happened.
        adapter: the adapter's name.
        draws: how often, so far.
        decomposed: number of layers whose decomposition was computed anew.
        turned: the largest absolute inner product of two different vectors of a side, of these layers, before: 0 is
            orthogonal.
    """

    plot_name: ClassVar[str | None] = "spectral_draws.png"
    plot_caption: ClassVar[str] = "Draws of singular vectors, and how far they had turned"

    draws: int
    decomposed: int
    turned: float


class SSTDynamics(Dynamics[SSTConfig, SSTLinear]):
    """The dynamics of one [`SSTConfig`][sparse_peft.SSTConfig] adapter."""

    draws = 0

    @property
    def states(self) -> dict[str, SpectralState]:
        return {name: layer.deltas[self.adapter] for name, layer in self.layers.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> Draw | None:
        for state in self.states.values():
            for vectors, dim in ((state.U, 0), (state.V, 1)):
                whole = full_tensor(vectors)
                norms = whole.norm(dim=dim, keepdim=True).clamp_(min=torch.finfo(whole.dtype).tiny)
                write_full_tensor_(vectors, whole / norms)
            write_full_tensor_(state.S, full_tensor(state.S).clamp(min=0))
        if step % self.config.resample_every:
            return None
        self.draws += 1
        turned = [self._draw(state) for state in self.states.values()]
        found = [value for value in turned if value is not None]
        return Draw(step, self.adapter, self.draws, len(found), max(found, default=0.0))

    def _draw(self, state: SpectralState) -> float | None:
        """Let other vectors of a layer train; returns how far its vectors had turned if its round is over."""
        state.rest()
        turned = None
        round_length = self.config.draws_per_round or math.ceil(state.S.numel() / state.active.numel())
        if self.draws % round_length == 0:
            turned = max(_overlap(state.U_rest), _overlap(state.V_rest.t()))
            u, s, v = torch.linalg.svd((state.U_rest * full_tensor(state.S)) @ state.V_rest, full_matrices=False)
            state.take(*(self.collectives.from_first(tensor) for tensor in (u, s, v)))
            self.optimizer.state.pop(state.S, None)  # the directions that it scales are others
        state.activate(self.collectives.from_first(state.drawn(self.draws)))
        for vectors in (state.U, state.V):
            self.optimizer.state.pop(vectors, None)
        return turned

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draws = state["draws"]


def _overlap(vectors: torch.Tensor) -> float:
    """The largest absolute inner product of two different columns."""
    products = vectors.t() @ vectors
    return float(products.fill_diagonal_(0).abs().max())
