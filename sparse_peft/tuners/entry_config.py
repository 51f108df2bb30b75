"""The base config of methods that train single entries: a budget, and what was resolved from it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

from ..constraints import Count, OneOf, Pattern, Positive, Share
from ..support import ALLOCATIONS, Block, Budget, Criterion, Given
from .base_config import allocation_note, explains_fields, selection_note
from .delta_config import DeltaConfig, Resident
from .scale import Spread

# Without a budget: a density, and in layers so small that it would be next to nothing, this many entries.
DEFAULT_AT_LEAST = 16

BUDGET_FIELDS = frozenset({"density", "num_params", "r", "density_pattern", "allocation"})


@explains_fields
@dataclass
class EntryConfig(DeltaConfig):
    """Fields common to the methods that train single entries; the subclasses' docstrings explain them."""

    deciding_fields: ClassVar[frozenset[str]] = BUDGET_FIELDS
    resolved_fields: ClassVar[tuple[str, ...]] = ("num_entries", "weight_shapes")
    why_no_experts: ClassVar[str | None] = None
    budget_fields: ClassVar[tuple[str, ...]] = ("density", "num_params", "r")

    density: Share | None = field(
        default=None,
        metadata={"help": "Share of the target weights that trains; a few percent without any budget."},
    )
    num_params: Count | None = field(
        default=None, metadata={"help": "Number of trained entries over all target layers."}
    )
    r: Count | None = field(
        default=None, metadata={"help": "LoRA-rank equivalent: r * (out + in) entries over the target layers."}
    )
    density_pattern: dict[Pattern, Share] = field(
        default_factory=dict,
        metadata={"help": "{layer name or regular expression: density} for layers with a density of their own."},
    )
    allocation: Annotated[str, OneOf(ALLOCATIONS)] = field(
        default="numel", metadata={"help": "How layers share the budget."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random positions."})
    resident: Resident = field(
        default=True,
        metadata={
            "help": "Whether the base weight may hold the entries between steps, or in products only ('product')."
        },
    )
    threshold: Positive | None = field(
        default=None, metadata={"help": "Train entries with |weight| below it, in place of a budget."}
    )
    num_entries: dict[str, int] | None = field(
        default=None,
        repr=False,
        metadata={"help": "Resolved number of entries per layer; filled in, not set by hand."},
    )

    def check(self) -> None:
        super().check()
        if not self.criterion.decides_count and self.threshold is None:
            self.budget()
            return
        budgets = [name for name in (*self.budget_fields, "density_pattern") if getattr(self, name)]
        if budgets:
            decides = f"threshold={self.threshold}" if self.threshold else f"selection={self.criterion.name!r}"
            raise ValueError(
                f"{decides} and {', '.join(budgets)} are both given: the former alone decides how many entries train"
            )

    @property
    def default_density(self) -> float:
        """Density where no budget is given."""
        return 0.01

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

    @property
    def spread(self) -> Spread:
        return "flat" if self.selection_needs in ("none", "weight") else "peaked"

    def countable(self) -> tuple[Self, list[str]]:
        if self.threshold is not None:
            raise ValueError(
                f"threshold={self.threshold}: how many entries lie below it is decided by the weights, which a plan "
                "does not load; plan with the density that it comes to"
            )
        config, notes = super().countable()
        if isinstance(self.criterion, Given) and not self.supports:
            raise self.criterion.missing()
        if self.allocation == "global":
            config.allocation = "numel"
            notes.append(allocation_note(config.allocation))
        if self.selection_needs != "none" and not self.supports:
            notes.append(selection_note(self.criterion.name, self.selection_needs))
        return config, notes

    def claimed_sizes(self, layer: str) -> Iterator[tuple[str, int, str]]:
        yield "num_entries", (self.num_entries or {}).get(layer, 0), "values.0"

    def budget(self) -> Budget:
        """The budget that the fields describe.

        Raises:
            ValueError: several budgets are given.
        """
        given = {name: getattr(self, name) for name in self.budget_fields if getattr(self, name) is not None}
        return Budget(
            **(given or {"density": self.default_density}),
            density_pattern=self.density_pattern,
            allocation=self.allocation,
            at_least=1 if given else DEFAULT_AT_LEAST,
        )
