"""Layer and tuner of the toy method."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_peft.numerics import sample_without_replacement
from sparse_peft.tuners.base_model import BaseSparseModel
from sparse_peft.tuners.delta_layer import SparseTunerLayer
from sparse_peft.tuners.targets import Targets, check_shapes, stored_shape

from .config import BandConfig
from .state import BandDelta


class BandLinear(SparseTunerLayer[BandDelta]):
    """A layer with a trained band."""

    config_cls = BandConfig


@dataclass(frozen=True)
class BandPlan:
    """How one layer's band is made."""

    shape: tuple[int, int]
    config: BandConfig

    def make_delta(self, name: str) -> BandDelta:
        cols = self.shape[1]
        (first,) = sample_without_replacement(cols, 1, seed=self.config.seed, name=name).tolist()
        return BandDelta(self.shape, min(self.config.width, cols), name, first)


class BandModel(BaseSparseModel[BandConfig, BandDelta]):
    """Creates a model whose target layers train a band of diagonals."""

    layer_cls = BandLinear

    def plan_layers(
        self, config: BandConfig, targets: Targets, adapter_name: str, file_entries: dict[str, int] | None
    ) -> dict[str, BandPlan]:
        shapes = {name: stored_shape(module) for name, module in targets.items()}
        check_shapes(config, shapes)
        config.weight_shapes = {name: list(shape) for name, shape in shapes.items()}
        return {name: BandPlan(shape, config) for name, shape in shapes.items()}
