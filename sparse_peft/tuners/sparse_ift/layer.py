"""The layer of sparse low-rank factors."""

from __future__ import annotations

from torch import Tensor

from ..low_rank import LowRankLayer
from .config import SparseIFTConfig
from .state import SparseFactors


class SparseIFTLinear(LowRankLayer[SparseFactors]):
    """A layer with sparse factors beside it: ``W x + scale * B (A x)``.

    Sparse-IFT, https://arxiv.org/abs/2303.11525. Shapes: ``A`` ``(r', in)`` with ``r * in`` entries, ``B`` ``(out,
    r')`` with ``r * out``. Arguments are those of ``TunerLayer``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseIFTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> layer = get_peft_model(base, SparseIFTConfig(r=2, target_modules=["0"])).base_model.model[0]
        >>> type(layer).__name__, tuple(layer.get_delta_weight("default").shape)
        ('SparseIFTLinear', (32, 64))
    """

    config_cls = SparseIFTConfig

    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        return self.low_rank_output(x, adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self.low_rank_weight(adapter)
