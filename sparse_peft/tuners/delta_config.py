"""The base config of methods whose trained values, times a scale, are a sparse delta."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Self, cast

from torch import Tensor

from ..constraints import Limits, OneOf
from ..ops import COMPRESSIONS, Compression
from .base_config import BaseSparseConfig, explains_fields
from .scale import LORA_RATE, Spread, matched_scale

if TYPE_CHECKING:
    from .base_state import TrainedState
    from .delta import Delta

AUTO = "auto"
IN_PRODUCTS = "product"
# whether a base weight may hold entries: between steps, only while it is multiplied in training, or never
Resident = bool | Annotated[str, OneOf((IN_PRODUCTS,))]
Scale = Annotated[float, Limits(least=2**-20, most=2**20, noun="a scale")]


@explains_fields
@dataclass
class DeltaConfig(BaseSparseConfig):
    """Fields common to the methods with sparse deltas; the subclasses' docstrings explain them."""

    # without annotations, and so no fields: what was found when an adapter was made, or a plan
    _matched = cast("float | None", None)
    _spread = cast("Spread | None", None)
    columns = cast("float | None", None)  # share of the inputs that have entries; a field where there is a choice

    scale: Annotated[str, OneOf((AUTO,))] | Scale = field(
        default=AUTO,
        metadata={"help": "Factor between the trained values and the delta; 'auto' suits LoRA's learning rate."},
    )

    compress_inputs: Annotated[str, OneOf(COMPRESSIONS)] | None = field(
        default=None,
        metadata={"help": "Rounding of the inputs kept for the values' gradient in training: bf16, int8 or none."},
    )

    preserve_zeros: bool = field(
        default=False, metadata={"help": "Whether zeros of the base weight stay zero, in passes and when merged."}
    )

    @classmethod
    def fields_of_earlier_versions(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        # their adapters have recorded shapes and no scale
        return {"scale": 1.0} if values.get("weight_shapes") is not None else {}

    @property
    @abstractmethod
    def spread(self) -> Spread:
        """How updates look at the entries that train."""

    @property
    def value_scale(self) -> float:
        """The scale as a number, which ``"auto"`` becomes when an adapter is made.

        Raises:
            ValueError: no adapter was made from the config yet.
        """
        if isinstance(self.scale, str):
            raise ValueError(f"scale={self.scale!r}: it is a number once an adapter is made from the config")
        return float(self.scale)

    def resolve_scale(self, entries: int) -> None:
        """Replace ``"auto"`` by a number.

        Args:
            entries: trained entries of all layers, whose ``weight_shapes`` are recorded before.
        """
        self._matched = self.scale_for(entries)
        if self.scale == AUTO:
            self.scale = self._matched

    def scale_for(self, entries: int) -> float:
        """The scale that ``"auto"`` stands for, of this many trained entries in all layers."""
        return matched_scale(entries, (self.weight_shapes or {}).values(), self._spread or self.spread)

    def equip(self, state: TrainedState) -> None:
        delta = cast("Delta", state)
        delta.compression = cast("Compression | None", self.compress_inputs)
        delta.keeps_zeros = self.preserve_zeros
        delta.narrows_inputs = self.columns is not None

    def forget_resolved(self) -> None:
        super().forget_resolved()
        if self.scale == self._matched:
            self.__dict__["scale"] = AUTO

    def suited_rate(self) -> float | None:
        return None if self._matched is None else LORA_RATE * self._matched / self.value_scale

    def countable(self) -> tuple[Self, list[str]]:
        config, notes = super().countable()
        config._spread = self.spread  # a plan counts other positions
        return config, notes

    def follow_file(self, saved: Mapping[str, Any], states: Iterable[TrainedState]) -> None:
        scale = {**self.fields_of_earlier_versions(saved), **saved}.get("scale", AUTO)
        if scale in (AUTO, self.scale):
            return
        warnings.warn(
            f"the adapter's file was saved with scale={scale}, and the model's adapter was made with "
            f"scale={self.scale}: the file's is used from now on. Train with the learning rate that suits it",
            stacklevel=2,
        )
        self.scale = scale
        self.recommended_rate = self.suited_rate()
        for state in states:
            cast("Delta", state).value_scale = self.value_scale

    def divide_by_scale_(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Make the deltas of ``{layer: {"values": delta, ...}}`` the values of this config; in place."""
        if self.value_scale != 1:
            for found in tensors.values():
                found["values"] = found["values"] / self.value_scale
