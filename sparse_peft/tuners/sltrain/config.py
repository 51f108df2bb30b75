"""The config of SLTrain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from ...constraints import Count, OneOf, Positive, Probability, Share
from ...support import REFRESH, Budget
from ..base_config import explains_fields, required
from ..experts import CURE, is_named
from ..sparse.config import SparseConfig

TRAINING_MODES = ("finetune", "pretrain")
PATHS = ("auto", "composed", "factored")
DEFAULT_DENSITY = {"finetune": 0.01, "pretrain": 0.03}


@explains_fields
@dataclass
class SLTrainConfig(SparseConfig):
    """SLTrain (https://arxiv.org/abs/2406.02214): sparse plus low rank.

    The delta is ``alpha / r * B A + scale * scatter(values)``, with ``A`` ``(r, in)``, ``B`` ``(out, r)`` and values
    ``(k,)`` trained. With ``mode="finetune"`` it is added to the frozen weight and starts at zero: RoSA's form
    (https://arxiv.org/abs/2401.04679) with positions from gradients, DSEE's with positions from a residual. With
    ``mode="pretrain"`` it takes the weight's place, and everything else of the model trains as well: see
    [`build_for_pretraining`][sparse_peft.build_for_pretraining].

    Args:
        r: rank of the low-rank part; 8 for fine-tuning. For pretraining there is no default: the paper's is about a
            quarter of the model's width.
        alpha: the low-rank part is scaled by ``alpha / r``.
        dropout: dropout probability of the low-rank part's inputs; fine-tuning only.
        mode: ``"finetune"`` or ``"pretrain"``.
        density: share of each weight's entries in the sparse part; by default 1 %, for pretraining 3 %.
        num_params: number of entries of the sparse part over all target layers, in place of ``density``.
        doped: share of LoRA's parameter count at rank ``r`` that stays low rank; the others are entries of the sparse
            part, ``r * (out + in)`` together in each layer (Sparse-IFT's *doped*, https://arxiv.org/abs/2303.11525).
            In place of ``density`` and ``num_params``.
        init_scale: of the sparse part's first values in pretraining: uniform within ``init_scale / sqrt(in)``.
        trainable_scale: scale the low-rank part with ``tanh(theta)`` instead, ``theta`` trained from 1.
        backend: computation of a layer without a weight. ``"composed"``: one panel of rows at a time, ``"factored"``:
            one product after the other, ``"auto"``: the faster one by an estimate. It changes speed, not results.
        selection: criterion of the sparse part's positions; in pretraining at random, or changing during training.

    Fused experts (``target_parameters``, ``target_experts``) train the sparse part alone: a low-rank part has factors
    of one matrix.

    The other fields are those of [`SparseConfig`][sparse_peft.SparseConfig], for the sparse part.

    Raises:
        ValueError, TypeError: a field that is out of range, or two that contradict each other.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SLTrainConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SLTrainConfig(r=4, density=0.02, target_modules=["0"]))
        >>> {name: tuple(p.shape) for name, p in model.base_model.model[0].deltas["default"].named_parameters()}
        {'values': (41,), 'A': (4, 64), 'B': (32, 4)}
    """

    method: ClassVar[str] = "SPARSE_PEFT_SLTRAIN"
    budget_fields: ClassVar[tuple[str, ...]] = ("density", "num_params")
    deciding_fields: ClassVar[frozenset[str]] = SparseConfig.deciding_fields | {"doped"}

    r: Count | None = field(default=None, metadata={"help": "Rank of the low-rank part; 8 for fine-tuning."})
    alpha: Positive = field(default=16, metadata={"help": "The low-rank part is scaled by alpha / r."})
    dropout: Probability = field(
        default=0.0, metadata={"help": "Dropout of the low-rank part's inputs; fine-tuning only."}
    )
    mode: Annotated[str, OneOf(TRAINING_MODES)] = field(
        default="finetune", metadata={"help": "'finetune' beside the weights, 'pretrain' in their place."}
    )
    doped: Share | None = field(
        default=None, metadata={"help": "Share of rank r's parameter count that stays low rank, in place of a budget."}
    )
    init_scale: Positive = field(
        default=1.0, metadata={"help": "Scale of the sparse part's first values in pretraining."}
    )
    trainable_scale: bool = field(default=False, metadata={"help": "Scale the low-rank part with a trained tanh."})
    backend: Annotated[str, OneOf(PATHS)] = field(
        default="auto", metadata={"help": "How layers without weights compute (speed only)."}
    )

    def fill_in(self) -> None:
        super().fill_in()
        if self.r is None and self.mode == "pretrain":
            raise ValueError(
                "r=None with mode='pretrain': give the rank of the low-rank part; the paper uses about a quarter of "
                "the model's hidden size"
            )
        self.r = 8 if self.r is None else self.r

    def check(self) -> None:
        if self.doped is not None:
            self._check_doped(self.doped)
        super().check()
        if self.mode == "pretrain":
            self._check_pretraining()
        if self.preserve_zeros:
            raise ValueError(
                "preserve_zeros=True: the low-rank part changes every entry, zeros too; use SparseConfig, or "
                "PruneConfig(score='nonzero'), whose low rank is masked"
            )
        if self.criterion.restricts:
            raise ValueError(
                f"selection={self.selection!r}: the low-rank part changes every entry, zeros too; use SparseConfig "
                "for a pruned base"
            )
        if self.regrowth is REFRESH:
            raise ValueError(
                f"reselect_every={self.reselect_every} with selection={self.selection!r}: positions are not chosen "
                "anew beside a low-rank part; leave it out, or use SparseConfig"
            )

    def claimed_sizes(self, layer: str) -> Iterator[tuple[str, int, str]]:
        yield from super().claimed_sizes(layer)
        if not is_named(self.target_parameters, layer):  # fused experts have no low-rank part
            yield "r", self.rank, "A.0"

    def _check_pretraining(self) -> None:
        if self.names_experts:
            given = "target_experts" if self.target_experts else "target_parameters"
            raise ValueError(
                f"{given}={getattr(self, given)!r} with mode='pretrain': sparse plus low rank takes the place of "
                f"linear layers' weights, and fused experts keep theirs; use mode='finetune', or {CURE}"
            )
        if self.dropout:
            raise ValueError(f"dropout={self.dropout} with mode='pretrain': inputs cannot be left out of a part alone")
        if self.criterion.needs not in ("none", "positions"):
            raise ValueError(
                f"selection={self.selection!r} with mode='pretrain': it looks at weights or data that there are none "
                "of yet; use 'random', or 'rigl', 'set', 'momentum' or 'accumulated_gradient' to change positions"
            )

    def scale_for(self, entries: int) -> float:
        return 1.0 if self.mode == "pretrain" else super().scale_for(entries)

    def suited_rate(self) -> float | None:
        return None if self.mode == "pretrain" else super().suited_rate()

    @property
    def rank(self) -> int:
        """The rank of the low-rank part, once it is filled in."""
        r = required(self.r, "r")
        return r if self.doped is None else math.floor(self.doped * r)

    def budget(self) -> Budget:
        if self.doped is None:
            return super().budget()
        return Budget(r=required(self.r, "r") - self.rank, allocation="erk")  # rank * (out + in) of each layer

    def _check_doped(self, doped: float) -> None:
        given = [name for name in (*self.budget_fields, "density_pattern") if getattr(self, name)]
        if given or self.allocation != "numel" or self.criterion.decides_count:
            field_ = given[0] if given else "selection" if self.criterion.decides_count else "allocation"
            raise ValueError(
                f"doped={doped} and {field_}={getattr(self, field_)!r}: doped alone shares out r={self.r}"
            )
        if not 0 < self.rank < required(self.r, "r"):
            raise ValueError(
                f"doped={doped} of r={self.r} is a rank of {self.rank}: both parts need a rank's parameters at least; "
                "use a larger r, or another share"
            )

    @property
    def default_density(self) -> float:
        """Density where no budget is given."""
        return DEFAULT_DENSITY[self.mode]
