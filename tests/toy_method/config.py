"""The config of the toy method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sparse_peft.constraints import Count, CountOrZero
from sparse_peft.tuners.base_config import BaseSparseConfig, explains_fields


@explains_fields
@dataclass
class BandConfig(BaseSparseConfig):
    """Train a band of diagonals.

    Args:
        width: number of diagonals.
        move_every: optimizer steps from one move of the band to the next; 0 for none.
        seed: of the first diagonals.
    """

    method: ClassVar[str] = "TOY_BAND"

    width: Count = field(default=1, metadata={"help": "Number of diagonals."})
    move_every: CountOrZero = field(default=0, metadata={"help": "Optimizer steps between two moves; 0 for none."})
    seed: int = field(default=0, metadata={"help": "Seed of the first diagonals."})

    @property
    def changes_in_training(self) -> bool:
        return self.move_every > 0

    @property
    def controller_role(self) -> str:
        return "moves its bands"
