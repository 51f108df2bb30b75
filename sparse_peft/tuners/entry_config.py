"""What the configs of methods that train single entries share: a budget, and what was made of it."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..support import ALLOCATIONS, Block, Budget, Criterion
from .base_config import BaseSparseConfig

# Without a budget: a density, and in layers so small that it would be next to nothing, this many entries.
DEFAULT_AT_LEAST = 16

BUDGET_FIELDS = frozenset({"density", "num_params", "r", "density_pattern", "allocation"})


@dataclass
class EntryConfig(BaseSparseConfig):
    """Fields common to the methods that train single entries; the subclasses' docstrings explain them."""

    deciding_fields: ClassVar[frozenset[str]] = BUDGET_FIELDS
    resolved_fields: ClassVar[tuple[str, ...]] = ("num_entries", "weight_shapes")
    default_density: ClassVar[float] = 0.01
    budget_fields: ClassVar[tuple[str, ...]] = ("density", "num_params", "r")

    density: float | None = field(
        default=None,
        metadata={"help": "Share of the target weights that trains, in (0, 1]; a few percent without any budget."},
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
        self.density_pattern = dict(self.density_pattern or {})
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed={self.seed!r}: an int is expected")

    @property
    @abstractmethod
    def criterion(self) -> Criterion:
        """What chooses the first positions."""

    @property
    def criterion_options(self) -> dict[str, Any]:
        """Further arguments of the criterion."""
        return {}

    @property
    def block(self) -> Block | None:
        """``(rows, cols)`` of the blocks that train whole; None for single entries."""
        return None

    @property
    def selection_needs(self) -> str:
        return self.criterion.needs

    def check_threshold(self, threshold: float) -> None:
        """Check a threshold that takes the place of a budget.

        Raises:
            ValueError: it is not positive, or a budget is given as well.
        """
        if not (math.isfinite(threshold) and threshold > 0):
            raise ValueError(f"threshold={threshold!r}: a positive number is expected")
        budgets = [name for name in self.budget_fields if getattr(self, name) is not None]
        if budgets or self.density_pattern:
            raise ValueError(
                f"threshold={threshold} and {', '.join(budgets) or 'density_pattern'} are both given: the "
                "threshold alone decides how many entries train"
            )

    def budget(self) -> Budget:
        """The budget that the fields describe.

        Raises:
            ValueError, TypeError: the fields contradict each other or are out of range.
        """
        shared = {"density_pattern": self.density_pattern, "allocation": self.allocation}
        given = {name: getattr(self, name) for name in self.budget_fields if getattr(self, name) is not None}
        if not given:
            return Budget(self.default_density, at_least=DEFAULT_AT_LEAST, **shared)
        return Budget(**given, **shared)
