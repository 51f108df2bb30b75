"""Sparse factors in training: RigL's exchanges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...dynamics.full_tensor import full_tensor
from ...dynamics.optimizer_state import remap_
from ...dynamics.protocol import Dynamics, TrainingContext
from ...dynamics.records import Record
from ...support import Candidates, exchange
from .config import SparseIFTConfig
from .layer import SparseIFTLinear
from .state import FACTORS, SparseFactors


@dataclass(frozen=True)
class FactorExchange(Record, event="factor_exchange"):
    """Entries of the factors were exchanged.

    Attributes:
        step: number of optimizer steps completed when it happened.
        adapter: the adapter's name.
        rate: share of the entries that was up for exchange.
        replaced: number of new entries in all layers.
        entries: of all layers.
    """

    plot_name: ClassVar[str | None] = "factor_exchanges.png"
    plot_caption: ClassVar[str] = "Entries of the factors that were exchanged"

    rate: float
    replaced: int
    entries: int


class SparseIFTDynamics(Dynamics[SparseIFTConfig, SparseIFTLinear]):
    """The dynamics of one [`SparseIFTConfig`][sparse_peft.SparseIFTConfig] adapter."""

    def __init__(self, context: TrainingContext[SparseIFTConfig, SparseIFTLinear]):
        super().__init__(context)
        self.schedule = self.config.schedule(context.total_steps)

    @property
    def states(self) -> list[SparseFactors]:
        return [layer.deltas[self.adapter] for layer in self.layers.values()]

    def begin_step(self, step: int) -> None:
        observes = self.schedule.observes(step)
        for state in self.states:
            state.seen = {} if observes else None

    def discard_step(self) -> None:
        for state in self.states:
            state.seen = None if state.seen is None else {}

    def close(self) -> None:
        for state in self.states:
            state.seen = None

    @torch.no_grad()
    def after_step(self, step: int) -> FactorExchange | None:
        if not self.schedule.is_event(step):
            return None
        rate = self.schedule.rate_at(step)
        replaced = sum(self._exchange(state, factor, rate) for state in self.states for factor in FACTORS)
        entries = sum(state.support(factor).nnz for state in self.states for factor in FACTORS)
        return FactorExchange(step, self.adapter, rate, replaced, entries)

    def _exchange(self, state: SparseFactors, factor: str, rate: float) -> int:
        """Exchange the smallest entries of one factor for those with the largest gradients; returns how many."""
        support, parameter = state.support(factor), state.own_parameters[f"{factor}_values"]
        rows, cols = support.shape
        seen = (state.seen or {}).get(factor)
        gradient = torch.zeros(rows * cols, device=support.device) if seen is None else seen
        scores = self.collectives.mean(gradient).abs()
        if not bool(scores.isfinite().all()):
            return 0  # a loss scaler skips such steps; without one, training has other troubles
        free = torch.ones(rows * cols, dtype=torch.bool, device=support.device)
        free[support.indices.long()] = False
        outside = free.nonzero().squeeze(1)
        candidates = Candidates(outside, scores[outside], scores[support.indices.long()])
        values = full_tensor(parameter)
        (result,) = exchange([support], [values], [int(support.nnz * rate)], [candidates])
        kept = torch.where(result.source >= 0, values[result.source.clamp(min=0)], 0)
        state.move(factor, result.support.indices, kept)
        remap_(self.optimizer, parameter, result.source, old_size=support.nnz)
        return result.replaced

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is to be restored: positions are in the adapter's file, and the schedule is the config's."""
