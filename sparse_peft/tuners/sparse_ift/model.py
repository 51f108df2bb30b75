"""The tuner of sparse low-rank factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..base_model import BaseSparseModel
from ..forms import layer_of_factors
from ..low_rank import factor_sizes, shapes_for_rank
from ..targets import Targets, in_dim_of
from .config import SparseIFTConfig
from .layer import SparseIFTLinear
from .state import SparseFactors


@dataclass(frozen=True)
class FactorsPlan:
    """What one layer's new adapter will be."""

    sizes: tuple[int, int]
    config: SparseIFTConfig

    def make_delta(self, name: str) -> SparseFactors:
        return SparseFactors(self.sizes, self.config, name)


class SparseIFTModel(BaseSparseModel[SparseIFTConfig, SparseFactors]):
    """Creates a model with sparse low-rank factors beside its target layers.

    Sparse-IFT, https://arxiv.org/abs/2303.11525. A layer's state has ``A_values`` ``(r * in,)`` and ``B_values``
    ``(r * out,)``, with their positions in factors of rank ``r'``.

    Args:
        model (torch.nn.Module): the model to adapt.
        peft_config (sparse_peft.SparseIFTConfig): the adapter's config.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a target is no layer that the method trains, or has another method's adapter.
        ValueError: there is no target, a target shares its weight, or a field contradicts the model.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseIFTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SparseIFTConfig(r=2, target_modules=["0"]))
        >>> model.base_model.model[0].deltas["default"].support("A").density
        0.25
    """

    layer_cls = SparseIFTLinear
    takes_groups = False
    counted_tensor = "B_values"

    def plan_layers(
        self,
        config: SparseIFTConfig,
        targets: Targets,
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> dict[str, FactorsPlan]:
        shapes = shapes_for_rank(config, targets, config.rank, "r / (1 - sparsity)")
        return {
            name: FactorsPlan(factor_sizes(shapes[name], in_dim_of(module)), config)
            for name, module in targets.items()
        }

    @classmethod
    def skeleton_layer(
        cls, config: SparseIFTConfig, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> nn.Module:
        return layer_of_factors(
            name, shape, tensors, lambda ins, outs: {"A_values": (config.r * ins,), "B_values": (config.r * outs,)}
        )
