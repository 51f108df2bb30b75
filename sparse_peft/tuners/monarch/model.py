"""The tuner of Monarch adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...ops import block_sizes, monarch_projection
from ..base_model import BaseSparseModel
from ..combination import Tensors
from ..files.adapter_file import is_reading
from ..forms import layer_of_factors
from ..low_rank import factor_sizes, shapes_for_rank
from ..targets import Targets, base_of, dense_weight, in_dim_of
from .config import MonarchConfig
from .layer import MonarchLinear
from .state import MonarchState


@dataclass(frozen=True)
class MonarchPlan:
    """What one layer's new adapter will be."""

    sizes: tuple[int, int]
    config: MonarchConfig
    start: tuple[Tensor, Tensor] | None

    def make_delta(self, name: str) -> MonarchState:
        return MonarchState(self.sizes, self.config, name, self.start)


class MonarchModel(BaseSparseModel[MonarchConfig, MonarchState]):
    """Creates a model with Monarch matrices beside its target layers (https://arxiv.org/abs/2204.00595).

    A layer's state has ``A`` ``(nblocks, blk_r, in / nblocks)`` and ``B`` ``(nblocks, out / nblocks,
    blk_r)``.

    Args:
        model (torch.nn.Module): the model to adapt.
        peft_config (sparse_peft.MonarchConfig): the adapter's config.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a target is no layer that the method trains, or has another method's adapter.
        ValueError: there is no target, a target shares its weight, or a field contradicts the model.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import MonarchConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, MonarchConfig(target_modules=["0"]))
        >>> tuple(model.base_model.model[0].deltas["default"].B.shape)
        (4, 8, 4)
    """

    layer_cls = MonarchLinear
    why_no_convolutions = "Monarch matrices are for the inputs and outputs of linear layers"
    counted_tensor = "B"

    def plan_layers(
        self,
        config: MonarchConfig,
        targets: Targets,
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> dict[str, MonarchPlan]:
        is_new = config.weight_shapes is None
        shapes = shapes_for_rank(config, targets, config.nblocks * config.blk_r, "nblocks * blk_r")
        if is_new and config.blk_r < config.nblocks:
            warnings.warn(
                f"blk_r={config.blk_r} with nblocks={config.nblocks}: the blocks do not mix, and "
                f"{1 - config.blk_r / config.nblocks:.0%} of each delta is zero whatever is trained; use blk_r of at "
                "least nblocks",
                stacklevel=2,
            )
        projects = config.init == "residual" and file_entries is None and not is_reading()
        return {
            name: MonarchPlan(
                factor_sizes(shapes[name], in_dim_of(module)),
                config,
                self._project(config, name, module) if projects else None,
            )
            for name, module in targets.items()
        }

    @staticmethod
    def _project(config: MonarchConfig, name: str, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """The factors that are closest to a layer's weight; None where they come from a file."""
        if base_of(module).weight.device.type == "meta":
            return None  # plans, and models whose file is still to come
        with torch.no_grad():
            weight = dense_weight(module)
            return monarch_projection(weight if in_dim_of(module) == 1 else weight.t(), config.nblocks, config.blk_r)

    @classmethod
    def combined_fields(cls, configs: Sequence[MonarchConfig], tensors: Tensors) -> dict[str, Any]:
        # one rank is for all layers, so smaller ones are padded
        nblocks = configs[0].nblocks
        most = max(found["A"].shape[1] for found in tensors.values()) // nblocks
        for found in tensors.values():
            _, height, rank = found["B"].shape
            more = most - rank // nblocks
            found["A"] = pad(found["A"], (0, 0, 0, more * nblocks))
            found["B"] = pad(found["B"].view(nblocks, height, nblocks, -1), (0, more)).flatten(2)
        return {"blk_r": most * nblocks, "init": "zero"}

    @classmethod
    def skeleton_layer(
        cls, config: MonarchConfig, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> nn.Module:
        def shapes_of(inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
            width, height = block_sizes(inputs, outputs, config.nblocks)
            return {
                "A": (config.nblocks, config.blk_r, width),
                "B": (config.nblocks, height, config.blk_r),
            }

        return layer_of_factors(name, shape, tensors, shapes_of)
