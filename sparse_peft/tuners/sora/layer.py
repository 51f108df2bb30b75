"""The layer of SoRA."""

from __future__ import annotations

from torch import Tensor

from ..low_rank import LowRankLayer
from .config import SoRAConfig
from .state import GatedLowRank


class SoRALinear(LowRankLayer[GatedLowRank]):
    """A layer with gated low rank beside it: ``W x + scale * B (gate * A x)``.

    SoRA, https://arxiv.org/abs/2311.11696. Shapes: ``A`` ``(r, in)``, ``B`` ``(out, r)``, ``gate`` ``(r,)``. Arguments
    are those of ``TunerLayer``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SoRAConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SoRAConfig(r=4, target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> type(layer).__name__, tuple(layer.get_delta_weight("default").shape)
        ('SoRALinear', (32, 64))
    """

    config_cls = SoRAConfig
    takes_partitions = True

    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        return self.low_rank_output(x, adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self.low_rank_weight(adapter)
