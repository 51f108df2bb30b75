"""The tuner of sparse-aware fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...compat import resolve_quantization_backend
from ..base_model import BaseSparseModel
from ..low_rank import check_rank, factor_sizes
from ..targets import Targets, base_of, check_shapes, in_dim_of, stored_shape
from .config import PruneConfig
from .layer import PruneLinear
from .state import PrunedState


@dataclass(frozen=True)
class PrunePlan:
    """What one layer's new adapter will be: arguments of ``PrunedState``."""

    sizes: tuple[int, int]
    config: PruneConfig

    def make_delta(self, name: str) -> PrunedState:
        return PrunedState(self.sizes, self.config, name)


class PruneModel(BaseSparseModel[PruneConfig, PrunedState]):
    """Creates a model whose target layers compute with ``mask * (W + delta)``.

    PST, https://arxiv.org/abs/2205.11005, has this form; see [`PruneConfig`][sparse_peft.PruneConfig] for the others.

    Args:
        model (torch.nn.Module): the model to adapt.
        peft_config (sparse_peft.PruneConfig): the adapter's config.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a target is no layer that the method trains, is quantised, or has another method's adapter.
        ValueError: there is no target, a target shares its weight, or a pattern does not fit its shape.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import PruneConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, PruneConfig(pattern="2:4", target_modules=["0"]))
        >>> sorted(name for name, _ in model.base_model.model[0].deltas["default"].named_parameters())
        ['A', 'B']
    """

    layer_cls = PruneLinear
    takes_groups = False
    counted_tensor = "mask"
    needs_base_weights = True

    @classmethod
    def check_targets(cls, model: nn.Module, targets: Targets) -> None:
        super().check_targets(model, targets)
        for name, module in targets.items():
            base = base_of(module)
            if resolve_quantization_backend(base) is not None:
                raise TypeError(
                    f"Target module {name} of type {type(base).__name__} is quantised: its masked weights would not "
                    "stay zero; use a base in float32, bfloat16 or float16, and quantise the result"
                )

    def plan_layers(
        self,
        config: PruneConfig,
        targets: Targets,
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> Mapping[str, PrunePlan]:
        shapes = {name: stored_shape(module) for name, module in targets.items()}
        check_shapes(config, shapes)
        config.weight_shapes = {name: list(shape) for name, shape in shapes.items()}
        plans = {}
        for name, module in targets.items():
            inputs, outputs = factor_sizes(shapes[name], in_dim_of(module))
            self._check_pattern(config, (outputs, inputs), name)
            if "low_rank" in str(config.trains):
                check_rank(name, config.r, shapes[name], "r")
            plans[name] = PrunePlan((outputs, inputs), config)
        return plans

    @staticmethod
    def _check_pattern(config: PruneConfig, sides: tuple[int, int], name: str) -> None:
        opening = config.opening()
        for pattern in (opening.pattern, *(opening.ladder if config.plan.shrinks == "ladder" else ())):
            pattern.check(sides, name)
        if config.plan.back:
            opening.pattern.check(sides[::-1], f"{name} (transposed)")


def states_of(model: nn.Module, adapter_name: str) -> dict[str, tuple[PruneLinear, PrunedState]]:
    """``{layer name: (layer, state)}`` of one adapter.

    Raises:
        ValueError: the model has no such adapter of this method.
    """
    layers = (layer for layer in PruneModel.sparse_layers(model) if isinstance(layer, PruneLinear))
    found = {layer.name: (layer, layer.settled(adapter_name)) for layer in layers if adapter_name in layer.deltas}
    if not found:
        raise ValueError(f"adapter_name={adapter_name!r}: {type(model).__name__} has no PruneConfig adapter of it")
    return found
