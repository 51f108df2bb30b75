"""The base config of methods whose trained values, times a scale, are a sparse delta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

from ..constraints import Limits
from .base_config import BaseSparseConfig, explains_fields

Scale = Annotated[float, Limits(least=2**-20, most=2**20, noun="a scale")]


@explains_fields
@dataclass
class DeltaConfig(BaseSparseConfig):
    """Fields common to the methods with sparse deltas.

    Args:
        scale: factor between the trained values and the delta.
    """

    scale: Scale = field(default=1.0, metadata={"help": "Factor between the trained values and the delta."})

    @classmethod
    def fields_of_earlier_versions(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        # their adapters have recorded shapes and no scale
        return {"scale": 1.0} if values.get("weight_shapes") is not None else {}

    @property
    def value_scale(self) -> float:
        """The scale, once an adapter was made from the config."""
        return float(self.scale)

    def resolve_scale(self) -> None:
        """Replace ``"auto"`` by a number; sizes are recorded before."""

    def divide_by_scale_(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Make the deltas of ``{layer: {"values": delta, ...}}`` the values of this config; in place."""
        if self.value_scale != 1:
            for found in tensors.values():
                found["values"] = found["values"] / self.value_scale
