"""The config of a sparse delta."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from ...support import ALLOCATIONS, Budget, get_criterion
from ..base_config import BaseSparseConfig

# Without a budget: this density, and in layers so small that it would be next to nothing, this many entries.
DEFAULT_DENSITY = 0.01
DEFAULT_AT_LEAST = 16

# Fields that decide how many entries each layer trains: once one is set again, what was resolved before is void.
BUDGET_FIELDS = frozenset({"density", "num_params", "r", "density_pattern", "allocation", "selection", "threshold"})


@dataclass
class SparseConfig(BaseSparseConfig):
    """Fine-tune a sparse delta: a chosen set of the weight's entries, everything else frozen.

    The budget is one of ``density``, ``num_params`` and ``r``; without any, 1 % of the target weights train, and at
    least 16 entries of each layer.

    Args:
        density: share of the target layers' weights that trains, in (0, 1].
        num_params: number of trained entries over all target layers.
        r: LoRA-rank equivalent: as many entries as LoRA of this rank has parameters, ``r * (out + in)`` a layer.
        density_pattern: ``{layer name or regular expression: density}`` for layers with a density of their own.
        allocation: how layers share the budget: ``"numel"`` (equal density), ``"uniform"`` (equal counts), ``"erk"``
            (Erdos-Renyi kernel: density in proportion to (out + in) / (out * in)), ``"global"`` (by the highest scores
            of all layers together; needs a criterion with scores).
        selection: which entries train: ``"random"``, ``"magnitude"`` (largest), ``"magnitude_smallest"``,
            ``"threshold"``, ``"principal"``, or, chosen from data by :func:`~sparse_peft.select_support` beforehand,
            ``"gradient"``, ``"fisher"``, ``"wanda"``, ``"movement"``.
        threshold: with ``selection="threshold"``: train the entries with absolute value below it (SaRA, section 3.2).
        principal_rank: with ``selection="principal"``: rank of the approximation whose largest entries train (LIFT).
        seed: of the random positions; every layer draws its own from (seed, layer name).
        resident: let the base weight hold the adapter's entries between steps where that is possible, which makes the
            forward pass as fast as the base's. ``False`` never writes to the base; it changes speed, not results.
        num_entries: resolved number of entries per layer; filled in when the adapter is made, and what a saved adapter
            is rebuilt from. Not for setting by hand.
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; likewise.

    Raises:
        ValueError: a budget, allocation or criterion that does not exist or does not fit the others.
    """

    method: ClassVar[str] = "SPARSE_PEFT_DELTA"

    density: float | None = field(
        default=None,
        metadata={"help": "Share of the target weights that trains, in (0, 1]; without any budget 0.01."},
    )
    num_params: int | None = field(
        default=None, metadata={"help": "Number of trained entries over all target layers."}
    )
    r: int | None = field(
        default=None, metadata={"help": "LoRA-rank equivalent: r * (out + in) entries over the target layers."}
    )
    density_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "{layer name or regular expression: density} for layers with a density of their own."},
    )
    allocation: str = field(
        default="numel", metadata={"help": f"How layers share the budget: one of {', '.join(ALLOCATIONS)}."}
    )
    selection: str = field(default="random", metadata={"help": "The criterion that chooses the trained entries."})
    threshold: float | None = field(
        default=None, metadata={"help": "With selection='threshold': train entries with |weight| below it."}
    )
    principal_rank: int = field(
        default=32, metadata={"help": "With selection='principal': rank of the approximation that is looked at."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random positions."})
    resident: bool = field(
        default=True,
        metadata={"help": "Whether the base weight may hold the adapter's entries between steps (speed only)."},
    )
    num_entries: dict[str, int] | None = field(
        default=None, metadata={"help": "Resolved number of entries per layer; filled in, not set by hand."}
    )
    weight_shapes: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Resolved [rows, cols] of the layers' weights; filled in, not set by hand."}
    )

    def __post_init__(self):
        super().__post_init__()
        get_criterion(self.selection)
        self.density_pattern = dict(self.density_pattern or {})
        for name in ("seed", "principal_rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r}: an int is expected")
        if self.principal_rank < 1:
            raise ValueError(f"principal_rank={self.principal_rank}: a rank of at least 1 is expected")
        if (self.selection == "threshold") != (self.threshold is not None):
            raise ValueError(
                f"selection={self.selection!r} with threshold={self.threshold!r}: a threshold is given exactly when "
                "selection='threshold'"
            )
        if self.threshold is None:
            self.budget()
            return
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise ValueError(f"threshold={self.threshold!r}: a positive number is expected")
        budgets = [name for name in ("density", "num_params", "r") if getattr(self, name) is not None]
        if budgets or self.density_pattern:
            raise ValueError(
                f"threshold={self.threshold} and {', '.join(budgets) or 'density_pattern'} are both given: the "
                "threshold alone decides how many entries train"
            )

    def __setattr__(self, name, value):
        if name in BUDGET_FIELDS and self.__dict__.get("num_entries") is not None and value != getattr(self, name):
            self.num_entries = self.weight_shapes = None
        super().__setattr__(name, value)

    def budget(self) -> Budget:
        """The budget that the fields describe.

        Raises:
            ValueError, TypeError: the fields contradict each other or are out of range.
        """
        shared = {"density_pattern": self.density_pattern, "allocation": self.allocation}
        if self.density is None and self.num_params is None and self.r is None:
            return Budget(DEFAULT_DENSITY, at_least=DEFAULT_AT_LEAST, **shared)
        return Budget(self.density, self.num_params, self.r, **shared)
