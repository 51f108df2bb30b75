"""The config of sparse low-rank factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ...constraints import Count, Positive, Probability, Share, Steps
from ...support import ReselectionSchedule, steps_of
from ..base_config import BaseSparseConfig, explains_fields
from .budget import SLACK, Sparsity


@explains_fields
@dataclass
class SparseIFTConfig(BaseSparseConfig):
    """Sparse factors at LoRA's parameter count (Sparse-IFT, https://arxiv.org/abs/2303.11525, *factorized*).

    The delta is ``alpha / r * B A``, with ``A`` ``(r', in)`` and ``B`` ``(out, r')`` of rank ``r' = r / (1 -
    sparsity)``, of which ``r * in`` and ``r * out`` entries train. The others are zero. With ``r=8`` and a sparsity of
    0.75 the rank is 32. Positions start at random, and RigL (https://arxiv.org/abs/1911.11134) exchanges them during
    training: the smallest entries for those with the largest gradients.

    Training needs [`SparsityCallback`][sparse_peft.SparsityCallback] or a
    [`SparsityController`][sparse_peft.SparsityController], unless ``replace_rate`` is None.

    Args:
        r: LoRA's rank that the parameter count is of.
        sparsity: share of zeros in both factors, in [0, 1).
        alpha: the product is scaled by ``alpha / r``.
        dropout: probability with which an input is left out in training.
        reselect_every: optimizer steps from one exchange to the next.
        replace_rate: share of the entries that is up for exchange at first; falls to 0 as a cosine.
        reselect_stop: end of the exchanges: optimizer steps (int) or a share of the run (float).
        seed: of the first positions; every layer draws its own from (seed, layer name).
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; filled in when the adapter is made.

    Raises:
        ValueError, TypeError: a field that is out of range.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseIFTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SparseIFTConfig(r=2, sparsity=0.75, target_modules=["0"]))
        >>> state = model.base_model.model[0].deltas["default"]
        >>> state.rank, sum(p.numel() for p in state.parameters()) == 2 * (64 + 32)
        (8, True)
    """

    method: ClassVar[str] = "SPARSE_PEFT_SPARSE_IFT"

    r: Count = field(default=8, metadata={"help": "LoRA's rank that the parameter count is of."})
    sparsity: Sparsity = field(default=0.75, metadata={"help": "Share of zeros in both factors."})
    alpha: Positive = field(default=16, metadata={"help": "The product is scaled by alpha / r."})
    dropout: Probability = field(
        default=0.0, metadata={"help": "Probability with which an input is left out in training."}
    )
    reselect_every: Count = field(default=100, metadata={"help": "Optimizer steps from one exchange to the next."})
    replace_rate: Share | None = field(
        default=0.3, metadata={"help": "Share of the entries up for exchange at first; None for no exchange."}
    )
    reselect_stop: Steps = field(
        default=0.75, metadata={"help": "Where exchanges end: optimizer steps (int) or a share of the run (float)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the first positions."})

    def claimed_sizes(self, layer: str) -> Iterator[tuple[str, int, str]]:
        _, inputs = (self.weight_shapes or {}).get(layer, (1, 1))
        yield "r", self.r * inputs, "A_values.0"

    @property
    def rank(self) -> int:
        """The rank of the sparse factors."""
        return math.floor(self.r / (1 - self.sparsity) + SLACK)

    @property
    def changes_in_training(self) -> bool:
        return self.replace_rate is not None and self.rank > self.r

    @property
    def controller_role(self) -> str:
        return "exchanges its positions"

    def schedule(self, total_steps: int | None) -> ReselectionSchedule:
        """When entries are exchanged in a run of this many optimizer steps.

        Raises:
            ValueError: the stop is a share of a run whose length is not known.
        """
        stop = steps_of(self.reselect_stop, total_steps, "reselect_stop")
        return ReselectionSchedule(self.reselect_every, 1, False, self.replace_rate or 0.0, None, "cosine", 0, stop)

    def unreached_events(self, total_steps: int | None) -> Iterator[str]:
        schedule = self.schedule(total_steps)
        if total_steps is not None and schedule.first_event > min(schedule.stop, total_steps):
            yield (
                f"no position ever changes: reselect_every={self.reselect_every} is beyond "
                f"reselect_stop={self.reselect_stop!r} or total_steps={total_steps}"
            )
