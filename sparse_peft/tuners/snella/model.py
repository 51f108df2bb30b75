"""The tuner of SNELL and SNELLA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ...ops import PIECES, ConvProduct, LinearProduct, MatrixProduct, is_convolution
from ..base_model import BaseSparseModel
from ..forms import layer_of_factors
from ..low_rank import factor_sizes, shapes_for_rank
from ..targets import Targets, base_of, in_dim_of
from .config import SnellaConfig
from .layer import SnellaLinear
from .state import KernelState


@dataclass(frozen=True)
class KernelPlan:
    """What one layer's new adapter will be."""

    sizes: tuple[int, int]
    config: SnellaConfig
    product: MatrixProduct
    kept: int | None

    def make_delta(self, name: str) -> KernelState:
        return KernelState(self.sizes, self.config, self.product, name, self.kept)


class SnellaModel(BaseSparseModel[SnellaConfig, KernelState]):
    """Creates a model with deltas computed from distances beside the weights of its target layers.

    SNELL, https://arxiv.org/abs/2411.01800. A layer's state has ``A`` ``(2, in, r / 2)`` and ``B`` ``(2, out, r /
    2)``.

    Args:
        model (torch.nn.Module): the model to adapt.
        peft_config (sparse_peft.SnellaConfig): the adapter's config.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a target is no layer that the method trains, or has another method's adapter.
        ValueError: there is no target, a target shares its weight, or a field contradicts the model.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SnellaConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SnellaConfig(r=8, sparsity=0.9, target_modules=["0"]))
        >>> state = model.base_model.model[0].deltas["default"]
        >>> state.entries, state.numel
        (204, 2048)
    """

    layer_cls = SnellaLinear
    takes_groups = False
    counted_tensor = "B"

    def plan_layers(
        self,
        config: SnellaConfig,
        targets: Targets,
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> dict[str, KernelPlan]:
        shapes = shapes_for_rank(config, targets, config.r, "r")
        twin = self.twin_of(config, adapter_name)  # which may keep fewer entries by now than the config says
        plans = {}
        for name, module in targets.items():
            in_dim, base = in_dim_of(module), base_of(module)
            known = None
            if twin is not None and isinstance(module, SnellaLinear) and twin in module.deltas:
                known = module.deltas[twin]
            plans[name] = KernelPlan(
                factor_sizes(shapes[name], in_dim),
                config,
                ConvProduct.of(base) if is_convolution(base) else LinearProduct(in_dim),
                None if known is None else known.entries,
            )
        return plans

    @classmethod
    def skeleton_layer(
        cls, config: SnellaConfig, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> nn.Module:
        width = config.r // PIECES
        return layer_of_factors(
            name, shape, tensors, lambda ins, outs: {"A": (PIECES, ins, width), "B": (PIECES, outs, width)}
        )
