"""The layer of SoRA."""

from __future__ import annotations

from torch import Tensor

from ..low_rank import LowRankLayer
from .config import SoRAConfig
from .state import GatedLowRank


class SoRALinear(LowRankLayer[GatedLowRank]):
    """A layer with gated low rank beside it; see ``TunerLayer``."""

    config_cls = SoRAConfig

    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        return self.low_rank_output(x, adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self.low_rank_weight(adapter)
