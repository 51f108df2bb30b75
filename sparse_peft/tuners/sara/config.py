"""The config of SaRA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from ...constraints import Count, CountOrZero, Limits, OneOf, Positive, PositiveOrZero, validated
from ...support import Criterion, get_criterion, steps_of
from ..base_config import explains_fields
from ..entry_config import EntryConfig

NUCLEAR_MATRICES = ("one", "all")
FreezingStep = (
    Annotated[int, Limits(least=1, noun="a number of optimizer steps (int)")]
    | Annotated[float, Limits(above=0, below=1, noun="a share of the run (float)")]
)


def sara_learning_rate(threshold: float) -> float:
    """The learning rate of SaRA's authors for a threshold: ``1e-3 * exp(-350 * threshold)``.

    Paper: https://arxiv.org/abs/2409.06633.

    Args:
        threshold: absolute value below which entries train; a density's is the largest absolute value that trains.

    Raises:
        ValueError: it is not positive.

    Example:
        >>> from sparse_peft import sara_learning_rate
        >>> round(sara_learning_rate(2e-3), 6)
        0.000497
    """
    return 1e-3 * math.exp(-350 * validated("threshold", threshold, Positive))


@explains_fields
@dataclass
class SaRAConfig(EntryConfig):
    """SaRA (https://arxiv.org/abs/2409.06633): train the smallest weights, which a model hardly uses.

    The effective weight is ``W + scale * scatter(values)``, with values ``(k,)`` at the ``k`` entries of ``W`` ``(out,
    in)`` that are smallest in absolute value. A ``threshold`` gives ``k``, or one of ``density``, ``num_params`` and
    ``r``; without any, 5 % train.

    Training with ``progressive`` or ``nuclear_weight`` needs [`SparsityCallback`][sparse_peft.SparsityCallback] or a
    [`SparsityController`][sparse_peft.SparsityController].

    Args:
        threshold: train the entries with absolute value below it, in all target layers.
        density: share of the target layers' weights that trains, in (0, 1], instead of a threshold.
        num_params: number of trained entries over all target layers, instead of a threshold.
        r: LoRA-rank equivalent, instead of a threshold: as many entries as LoRA of this rank has parameters.
        density_pattern: ``{layer name or regular expression: density}`` for layers with a density of their own.
        allocation: as in [`SparseConfig`][sparse_peft.SparseConfig]; with ``"global"`` the smallest entries of
            all layers together train, as with a threshold.
        progressive: when entries that have outgrown the threshold are frozen at their present values: a number of
            optimizer steps (int), or a share of the run (float in (0, 1)); None for never. With a budget the threshold
            is the largest absolute value that was chosen.
        nuclear_weight: weight of the nuclear norm of the matrix of the trained entries' weights, zero elsewhere; 0 for
            none. It is added to the gradients once for each optimizer step, after clipping.
        nuclear_matrices: ``"one"``: that of one layer, another in each step, as the authors do, or ``"all"``.
        nuclear_every: add the norm in every N-th step only, with N times the weight.
        nuclear_min_size: matrices must have more rows and more columns than this.
        seed: of the random layers of ``nuclear_matrices="one"``.
        resident: let the base weight hold the adapter's entries between steps where that is possible, which makes the
            forward pass as fast as the base's. ``False`` never writes to the base. ``"product"`` holds entries in
            training only while a layer multiplies: less memory, slower steps (``docs/memory.md``). It changes no
            result.
        scale: factor between the trained values and the delta: a number, or ``"auto"``, with which LoRA's learning
            rate of 2e-4 suits the selection and the density (``docs/learning_rate.md``); 1.0 is the papers'.
        compress_inputs: rounding of the inputs that are kept for the values' gradient in training: ``"bf16"``,
            ``"int8"``, or None (``docs/memory.md``).
        preserve_zeros: whether zeros of the base weight stay zero: entries there do not train.
        num_entries: resolved number of entries per layer; filled in when the adapter is made, and used to rebuild a
            saved adapter. Not for setting by hand.
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; likewise.

    Raises:
        ValueError, TypeError: a field that is out of range, or two that contradict each other.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SaRAConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SaRAConfig(density=0.1, target_modules=["0"]))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        205
    """

    method: ClassVar[str] = "SPARSE_PEFT_SARA"
    deciding_fields: ClassVar[frozenset[str]] = EntryConfig.deciding_fields | {"threshold"}

    progressive: FreezingStep | None = field(
        default=0.5,
        metadata={"help": "When entries that have grown freeze: optimizer steps (int) or a share of the run (float)."},
    )
    nuclear_weight: PositiveOrZero = field(
        default=5e-4, metadata={"help": "Weight of the trained entries' nuclear norm; 0 for none."}
    )
    nuclear_matrices: Annotated[str, OneOf(NUCLEAR_MATRICES)] = field(
        default="one", metadata={"help": "Nuclear norm of 'one' layer, another in each step, or of 'all'."}
    )
    nuclear_every: Count = field(
        default=1, metadata={"help": "Add the nuclear norm in every N-th optimizer step, N times as strong."}
    )
    nuclear_min_size: CountOrZero = field(
        default=64, metadata={"help": "Nuclear norms are taken of matrices with more rows and columns than this."}
    )

    @property
    def default_density(self) -> float:
        # the share of normally distributed weights of deviation 0.03 below the authors' threshold of 2e-3
        return 0.05

    @property
    def selection(self) -> str:
        """The criterion's name, as ``SparseConfig(selection=)`` has it."""
        return "magnitude_smallest" if self.threshold is None else "threshold"

    @property
    def criterion(self) -> Criterion:
        return get_criterion(self.selection)

    @property
    def criterion_options(self) -> dict[str, Any]:
        return {} if self.threshold is None else {"threshold": self.threshold}

    @property
    def changes_in_training(self) -> bool:
        return self.progressive is not None or self.nuclear_weight > 0

    @property
    def controller_role(self) -> str:
        wanted = {"progressive": self.progressive is not None, "nuclear_weight": self.nuclear_weight > 0}
        return "applies its " + " and ".join(name for name, is_wanted in wanted.items() if is_wanted)

    def unreached_events(self, total_steps: int | None) -> Iterator[str]:
        step = self.freezing_step(total_steps)
        if step is not None and total_steps is not None and step > total_steps:
            yield f"no entry ever freezes: progressive={self.progressive!r} is after total_steps={total_steps}"

    def freezing_step(self, total_steps: int | None) -> int | None:
        """After which optimizer step entries freeze, in a run of this many; None for never.

        Raises:
            ValueError: it is a share of the run, whose length is not known.
        """
        return None if self.progressive is None else max(1, steps_of(self.progressive, total_steps, "progressive"))
