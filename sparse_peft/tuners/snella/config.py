"""The config of SNELL and SNELLA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch

from ...constraints import Count, CountOrZero, Limits, OneOf, Probability, ShareOrZero, Steps
from ...ops import PIECES, THRESHOLDS
from ...support import BudgetSchedule, steps_of
from ..base_config import BaseSparseConfig, explains_fields, required

KERNELS = ("distance", "mixed")
INITS = ("residual", "reference", "symmetric")
# Most entries that torch.quantile takes, whose ranks float32 still represents exactly.
QUANTILE_LIMIT = 2**24
# Ten times LoRA's, as measured in docs/snella.md: the first numbers and the kernel's slope are small.
RATE = 2e-3
# Of the layers' weights, without an allocator.
DEFAULT_SPARSITY = 0.5

Decay = Annotated[float, Limits(least=0, below=1)]


@explains_fields
@dataclass
class SnellaConfig(BaseSparseConfig):
    """SNELL and SNELLA: a sparse delta of full rank from few numbers.

    Papers: SNELL, https://arxiv.org/abs/2411.01800, and SNELLA, https://arxiv.org/abs/2510.24037. Entry ``(o, i)`` of
    the delta is a kernel of the vectors ``B[:, o]`` and ``A[:, i]``. ``A`` ``(2, in, r / 2)`` and ``B`` ``(2, out, r /
    2)`` train, as many numbers as LoRA of rank ``r``. Of each layer's entries the ``1 - sparsity`` with the largest
    absolute values are kept, the others are zero.

    With ``target_sparsity`` layers compete as well (SNELLA): training then needs
    [`SparsityCallback`][sparse_peft.SparsityCallback] or a [`SparsityController`][sparse_peft.SparsityController].

    Args:
        r: trained numbers for each input and output, half of them of each piece; even.
        kernel: ``"distance"``: a difference of two distances (SNELL), or ``"mixed"``: with a softmax of it over the
            outputs, a constant and three more trained numbers a layer (SNELLA).
        sparsity: share of zero entries in each layer's delta, in [0, 1]; by default 0.5, and 0 with a target.
        threshold: entry for a kernel value ``k`` whose absolute value is above the threshold ``tau``: ``"soft"``:
            ``k (|k| - tau)``, the paper's equation 5; ``"reference"``: ``k |k|`` with a gradient that takes ``|k|`` as
            a constant, the authors' code, which counts entries as ``torch.quantile`` does; ``"hard_ste"``: ``k``,
            with the gradient going through for all entries.
        init: ``"residual"``: the initial delta is subtracted, so that training starts at the base model; it is
            computed again from ``seed`` and not saved. ``"symmetric"``: both pieces start equal, which gives a zero
            delta; with the distance kernel and ``"hard_ste"`` only. ``"reference"``: as the authors do, with a small
            delta at the start.
        seed: of the initial values; every layer draws its own from (seed, layer name).
        dropout: dropout probability of the delta's inputs. Without dropout the delta is added to a float32 base's
            weight, and each pass has one product.
        tau_interval: parameter changes between two computations of ``tau``.
        cache: keep the dense delta in evaluation mode without gradients. It takes the weight's size in memory, and
            forward passes need no distances.
        target_sparsity: final share of zero entries over all layers, allocated by the layers' sensitivity; None for no
            allocation. At least ``sparsity``.
        allocate_start: optimizer steps (int), or share of the run (float), before the first allocation.
        allocate_stop: step or share of the run at which the target is reached; allocations are fixed afterwards.
        allocate_every: optimizer steps between two allocations.
        beta1: decay of the average sensitivity.
        beta2: decay of the average uncertainty.
        at_least: least number of entries of a layer.
        weigh_by_size: multiply a layer's score by its size, so that sums decide and not means.
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights. Not for setting by hand.

    Raises:
        ValueError, TypeError: a field that is out of range, or two that contradict each other.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SnellaConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SnellaConfig(r=8, sparsity=0.9, target_modules=["0"]))
        >>> {name: tuple(p.shape) for name, p in model.base_model.model[0].deltas["default"].named_parameters()}
        {'A': (2, 64, 4), 'B': (2, 32, 4)}
    """

    method: ClassVar[str] = "SPARSE_PEFT_SNELLA"

    r: Annotated[int, Limits(least=PIECES)] = field(
        default=8, metadata={"help": "Trained numbers for each input and output; even."}
    )
    kernel: Annotated[str, OneOf(KERNELS)] = field(default="distance", metadata={"help": "SNELL's or SNELLA's."})
    sparsity: ShareOrZero | None = field(
        default=None, metadata={"help": "Share of a layer's entries that are zero; 0.5, or 0 with target_sparsity."}
    )
    threshold: Annotated[str, OneOf(THRESHOLDS)] = field(default="soft", metadata={"help": "How entries compete."})
    init: Annotated[str, OneOf(INITS)] = field(default="residual", metadata={"help": "How training starts."})
    seed: int = field(default=0, metadata={"help": "Of the first numbers, together with the layer's name."})
    dropout: Probability = field(
        default=0.0, metadata={"help": "Probability with which an input is left out in training."}
    )
    tau_interval: Count = field(
        default=1, metadata={"help": "Changes of the parameters from one computation of the threshold to the next."}
    )
    cache: bool = field(default=True, metadata={"help": "Keep the dense delta in evaluation mode without gradients."})
    target_sparsity: ShareOrZero | None = field(
        default=None,
        metadata={"help": "Share of all layers' entries that are zero in the end."},
    )
    allocate_start: Steps = field(
        default=0.1, metadata={"help": "Steps (int) or share of the run (float) before the first sharing."}
    )
    allocate_stop: Steps = field(
        default=0.7, metadata={"help": "When the target is reached: steps (int) or a share of the run (float)."}
    )
    allocate_every: Count = field(default=10, metadata={"help": "Optimizer steps from one sharing to the next."})
    beta1: Decay = field(default=0.85, metadata={"help": "Decay of the average of sensitivity."})
    beta2: Decay = field(default=0.85, metadata={"help": "Decay of the average of its uncertainty."})
    at_least: CountOrZero = field(default=1, metadata={"help": "Entries that every layer keeps."})
    weigh_by_size: bool = field(default=False, metadata={"help": "Multiply a layer's score with its size."})

    def fill_in(self) -> None:
        super().fill_in()
        if self.sparsity is None:
            self.sparsity = DEFAULT_SPARSITY if self.target_sparsity is None else 0.0

    def check(self) -> None:
        super().check()
        if self.r % PIECES:
            raise ValueError(f"r={self.r}: a multiple of {PIECES} is expected, the kernel's pieces have equal parts")
        sparsity = required(self.sparsity, "sparsity")
        if self.target_sparsity is not None and self.target_sparsity < sparsity:
            raise ValueError(
                f"target_sparsity={self.target_sparsity} below sparsity={sparsity}: layers only lose entries in "
                "the course of training; start with a lower sparsity"
            )
        if self.init == "symmetric" and (self.threshold != "hard_ste" or self.kernel != "distance"):
            raise ValueError(
                f"init='symmetric' with threshold={self.threshold!r} and kernel={self.kernel!r}: a kernel of zeros "
                "trains with threshold='hard_ste' and kernel='distance' only; use init='residual'"
            )

    @classmethod
    def paper(cls, **fields: Any) -> SnellaConfig:
        """The settings and operations of the authors' code of SNELLA, for comparisons."""
        return cls(
            **{"r": 8, "kernel": "mixed", "threshold": "reference", "init": "reference", "dropout": 0.1, **fields}
        )

    def claimed_sizes(self, layer: str) -> Iterator[tuple[str, int, str]]:
        yield f"r / {PIECES}", self.r // PIECES, "A.2"

    def kept(self, numel: int) -> int:
        """Number of a layer's entries that are not zero at the start."""
        interpolates = THRESHOLDS[self.threshold].interpolates
        return numel - (_not_above_quantile if interpolates else _share)(required(self.sparsity, "sparsity"), numel)

    def suited_rate(self) -> float:
        return RATE

    @property
    def changes_in_training(self) -> bool:
        return self.target_sparsity is not None

    @property
    def controller_role(self) -> str:
        return "shares the entries among the layers"

    def unreached_events(self, total_steps: int | None) -> Iterator[str]:
        if self.target_sparsity is None or total_steps is None:
            return
        stop = steps_of(self.allocate_stop, total_steps, "allocate_stop")
        if stop > total_steps:
            yield f"target_sparsity is not reached: allocate_stop={self.allocate_stop!r} is after step {total_steps}"

    def budget_schedule(self, initial: int, numel: int, total_steps: int | None) -> BudgetSchedule:
        """Number of entries of all layers together in the course of a run.

        Args:
            initial: entries at the start.
            numel: of all layers.
            total_steps: of the run; needed where start or stop are shares of it.

        Raises:
            ValueError: shares of a run whose length is not known, or a stop before the start.
        """
        start = steps_of(self.allocate_start, total_steps, "allocate_start")
        stop = steps_of(self.allocate_stop, total_steps, "allocate_stop")
        if stop <= start:
            raise ValueError(
                f"allocate_start={self.allocate_start!r} is step {start}, and allocate_stop={self.allocate_stop!r} "
                f"step {stop}: the stop must come later"
            )
        target = numel - _share(required(self.target_sparsity, "target_sparsity"), numel)
        return BudgetSchedule(min(initial, numel), min(target, initial), start, stop, self.allocate_every)


def _share(share: float, numel: int) -> int:
    """A share of ``numel`` entries, rounded up; products within rounding of an integer count as it."""
    number = share * numel
    nearest = round(number)
    return nearest if abs(number - nearest) <= 1e-12 * max(1.0, number) else int(number) + 1


def _not_above_quantile(share: float, numel: int) -> int:
    """Number of entries, of ``numel`` different ones, that are not above their ``torch.quantile`` of ``share``.

    torch computes the quantile's rank, counted from 0, in the entries' dtype.
    """
    dtype = torch.float32 if numel <= QUANTILE_LIMIT else torch.float64
    return int(torch.tensor(share, dtype=dtype) * (numel - 1)) + 1
