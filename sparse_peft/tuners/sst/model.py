"""The tuner of Sparse Spectral Training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..base_model import BaseSparseModel
from ..files.adapter_file import is_reading
from ..low_rank import factor_sizes, shapes_for_rank
from ..targets import Targets, base_of, dense_weight, in_dim_of
from .config import SSTConfig
from .layer import SSTLinear
from .state import SpectralState


@dataclass(frozen=True)
class SSTPlan:
    """What one layer's new adapter will be.

    Attributes:
        sizes: ``(inputs, outputs)``.
        config: the adapter's.
        source: the module whose weight is decomposed, or another adapter's state; None where a file brings it.
    """

    sizes: tuple[int, int]
    config: SSTConfig
    source: nn.Module | SpectralState | None

    def make_delta(self, name: str) -> SpectralState:
        state = SpectralState(self.sizes, self.config, name)
        if isinstance(self.source, SpectralState):
            state.load_state_dict(self.source.state_dict())
        elif self.source is not None and not state.S.is_meta:
            with torch.no_grad():
                weight = dense_weight(self.source)
                state.decompose(weight if in_dim_of(self.source) == 1 else weight.t())
            state.activate(state.drawn(0))
        return state


class SSTModel(BaseSparseModel[SSTConfig, SpectralState]):
    """Creates a model whose target layers train by their singular value decomposition.

    SST, https://arxiv.org/abs/2405.15481. A layer's state has ``S`` ``(k,)``, ``U`` ``(out, r)`` and ``V`` ``(r,
    in)``, and the other singular vectors.

    Args:
        model (torch.nn.Module): the model to adapt.
        peft_config (sparse_peft.SSTConfig): the adapter's config.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a target is no layer that the method trains, or has another method's adapter.
        ValueError: there is no target, a target shares its weight, or a field contradicts the model.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SSTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SSTConfig(r=4, target_modules=["0"]))
        >>> model.base_model.model[0].deltas["default"]
        SpectralState(values=32, r=4)
    """

    layer_cls = SSTLinear
    why_no_convolutions = "singular vectors are those of linear layers"
    counted_tensor = "S"
    needs_base_weights = True

    def plan_layers(
        self,
        config: SSTConfig,
        targets: Targets,
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> dict[str, SSTPlan]:
        shapes = shapes_for_rank(config, targets, config.r, "r")
        twin = self.twin_of(config, adapter_name)
        plans = {}
        for name, module in targets.items():
            source: nn.Module | SpectralState | None = module
            if twin is not None and isinstance(module, SSTLinear) and twin in module.deltas:
                source = module.deltas[twin]
            elif is_reading() or file_entries is not None or base_of(module).weight.device.type == "meta":
                source = None
            plans[name] = SSTPlan(factor_sizes(shapes[name], in_dim_of(module)), config, source)
        return plans
