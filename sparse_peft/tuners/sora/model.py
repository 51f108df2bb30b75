"""The tuner of SoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...support import matches_layer
from ..base_model import BaseSparseModel
from ..combination import Tensors
from ..low_rank import check_rank, factor_sizes, skeleton_of_factors
from ..targets import check_shapes, in_dim_of, stored_shape
from .config import SoRAConfig
from .layer import SoRALinear
from .state import GatedLowRank


@dataclass(frozen=True)
class RankPlan:
    """What one layer's new adapter will be."""

    sizes: tuple[int, int]
    rank: int
    config: SoRAConfig

    def make_delta(self, name: str) -> GatedLowRank:
        config = self.config
        return GatedLowRank(self.sizes, self.rank, config.scale, config.dropout, config.init_gate, name)


class SoRAModel(BaseSparseModel[SoRAConfig, GatedLowRank]):
    """Creates a model with gated low rank beside its target layers (SoRA, https://arxiv.org/abs/2311.11696).

    A layer's state has ``A`` ``(r, in)``, ``B`` ``(out, r)`` and ``gate`` ``(r,)``.

    Args:
        model (torch.nn.Module): the model to adapt.
        peft_config (sparse_peft.SoRAConfig): the adapter's config.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a target is no layer that the method trains, or has another method's adapter.
        ValueError: there is no target, a target shares its weight, or a field contradicts the model.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SoRAConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SoRAConfig(r=4, target_modules=["0"]))
        >>> model.base_model.model[0].deltas["default"].alive
        4
    """

    layer_cls = SoRALinear
    takes_groups = False
    counted_tensor = "gate"

    def plan_layers(
        self,
        config: SoRAConfig,
        targets: dict[str, nn.Module],
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> dict[str, RankPlan]:
        shapes = {name: stored_shape(module) for name, module in targets.items()}
        ranks, _ = self.first_sizes(
            config,
            targets,
            adapter_name,
            in_file=file_entries,
            recorded="ranks",
            choose=lambda: ({name: self._rank(config, name) for name in targets}, {}),
        )
        check_shapes(config, shapes)
        for name, rank in ranks.items():
            check_rank(name, rank, shapes[name], "ranks")
        config.ranks = ranks
        config.weight_shapes = {name: list(shape) for name, shape in shapes.items()}
        if (config.target_of(sum(ranks.values())) or 0) > sum(ranks.values()):
            raise ValueError(
                f"target_rank={config.target_rank}: the layers have {sum(ranks.values())} ranks together; it is the "
                "number of all layers' ranks that are left, and no more than they begin with"
            )
        return {
            name: RankPlan(factor_sizes(shapes[name], in_dim_of(module)), ranks[name], config)
            for name, module in targets.items()
        }

    @staticmethod
    def _rank(config: SoRAConfig, name: str) -> int:
        return next((r for pattern, r in config.rank_pattern.items() if matches_layer(pattern, name)), config.r)

    @classmethod
    def combined_fields(cls, configs: Sequence[SoRAConfig], tensors: Tensors) -> dict[str, Any]:
        ranks = {name: found["gate"].numel() for name, found in tensors.items()}
        most = max(1, *ranks.values())
        # the scales are in B now
        return {"r": most, "alpha": most, "rank_pattern": {}, "target_rank": None, "ranks": ranks}

    @classmethod
    def skeleton_layer(
        cls, config: SoRAConfig, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> nn.Module:
        rank = tensors["gate"].numel() if "gate" in tensors else config.r
        return skeleton_of_factors(name, shape, tensors, rank)

    @classmethod
    def fit_state(cls, config: SoRAConfig, state: GatedLowRank, parameters: dict[str, Tensor]) -> None:
        gate = parameters.get("gate")
        if gate is not None and config.compact_every is not None and gate.numel() <= config.r:
            state.resize(gate.numel())
            config.ranks = {**(config.ranks or {}), state.name: gate.numel()}
