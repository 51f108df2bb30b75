"""The config of Sparse Spectral Training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ...constraints import Count
from ..base_config import BaseSparseConfig, explains_fields


@explains_fields
@dataclass
class SSTConfig(BaseSparseConfig):
    """Sparse Spectral Training (https://arxiv.org/abs/2405.15481): singular values and sampled singular vectors train.

    A weight becomes its singular value decomposition ``U diag(S) V``. All of ``S`` ``(k,)`` trains, ``k`` being the
    weight's smaller side. Of ``U`` ``(out, k)`` and ``V`` ``(k, in)`` the vectors of ``r`` singular values train at a
    time. They are drawn anew every ``resample_every`` steps, with probabilities of ``1 / (2 k) + S / (2 sum(S))``.
    After as many draws as it takes to reach all vectors, the decomposition is computed anew, which makes the vectors
    orthogonal again.

    Training needs [`SparsityCallback`][sparse_peft.SparsityCallback] or a
    [`SparsityController`][sparse_peft.SparsityController].

    The optimizer has ``r * (out + in) + k`` numbers a layer. The whole decomposition is kept beside the frozen base
    weight, in float32, and in the adapter's file.

    Args:
        r: singular vectors of each side that train at a time.
        resample_every: optimizer steps from one draw to the next; the authors' iteration.
        draws_per_round: draws from one decomposition to the next; by default ``k / r`` of each layer, rounded up.
        seed: of the draws; every layer draws its own from (seed, layer name, number of the draw).
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; filled in when the adapter is made.

    Raises:
        ValueError, TypeError: a field that is out of range.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SSTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SSTConfig(r=4, target_modules=["0"]))
        >>> {name: tuple(p.shape) for name, p in model.base_model.model[0].deltas["default"].named_parameters()}
        {'S': (32,), 'U': (32, 4), 'V': (4, 64)}
    """

    method: ClassVar[str] = "SPARSE_PEFT_SST"

    r: Count = field(default=8, metadata={"help": "Singular vectors of each side that train at a time."})
    resample_every: Count = field(default=200, metadata={"help": "Optimizer steps from one draw to the next."})
    draws_per_round: Count | None = field(
        default=None, metadata={"help": "Draws from one decomposition to the next; by default k / r."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})

    fixed_tensors: ClassVar[frozenset[str]] = frozenset({"U_rest", "V_rest"})

    def claimed_sizes(self, layer: str) -> Iterator[tuple[str, int, str]]:
        yield "r", min(self.r, *(self.weight_shapes or {}).get(layer, (self.r,))), "U.1"

    @property
    def changes_in_training(self) -> bool:
        return True

    @property
    def controller_role(self) -> str:
        return "normalises and draws its singular vectors"

    def unreached_events(self, total_steps: int | None) -> Iterator[str]:
        if total_steps is not None and total_steps < self.resample_every:
            yield (
                f"the same singular vectors train throughout: resample_every={self.resample_every} is more than "
                f"total_steps={total_steps}"
            )
