"""The layer of Monarch adapters."""

from __future__ import annotations

from torch import Tensor

from ..base_layer import TunerLayer
from .config import MonarchConfig
from .state import MonarchState


class MonarchLinear(TunerLayer[MonarchState]):
    """A layer with a Monarch matrix beside its weight: ``W x + M x``, where ``M`` is never formed.

    Monarch, https://arxiv.org/abs/2204.00595. Shapes: ``A`` ``(nblocks, blk_r, in / nblocks)``, ``B``
    ``(nblocks, out / nblocks, blk_r)``. Arguments are those of ``TunerLayer``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import MonarchConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, MonarchConfig(target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> type(layer).__name__, tuple(layer.get_delta_weight("default").shape)
        ('MonarchLinear', (32, 64))
    """

    config_cls = MonarchConfig
    takes_partitions = True

    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        state = self.deltas[adapter_name]
        return state.output(self._cast_input_dtype(x, state.A.dtype))

    def get_delta_weight(self, adapter: str) -> Tensor:
        weight = self.deltas[adapter].dense()
        return weight if self.product.in_dim == 1 else weight.t()
