"""The layer of S2FT: mixed batches as one batched product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import BatchOrder, LinearProduct, add_channel_deltas_
from ...support import ChannelSupport
from ..base_layer import BASE_ADAPTER, SparseTunerLayer
from ..residency import Stamp


@dataclass(frozen=True)
class _Stack:
    """Several adapters' channels of one layer, side by side, as long as nothing was written to their values.

    Attributes:
        names: the adapters.
        stamp: of their values.
        weights: ``(adapters, in, out)``: what multiplies their inputs; shorter ones are filled up with zeros.
        channels: ``(adapters, most channels)`` int64.
    """

    names: tuple[str, ...]
    stamp: Stamp
    weights: Tensor
    channels: Tensor


class S2FTLinear(SparseTunerLayer):
    """A layer with trained channels; see :class:`~sparse_peft.tuners.base_layer.SparseTunerLayer`.

    Its name says Linear because PEFT finds "all-linear" layers that have an adapter already by their class's name.

    A batch whose inputs use several adapters costs the base's product and one batched product for all of them. Their
    values lie side by side for it, in the input's dtype, from the first such batch until adapters are switched.
    """

    delta_container = "sparse_peft_s2ft_adapter"
    adapter_layer_names = (delta_container,)
    _stack: _Stack | None = None

    def _mixed_deltas_(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> None:
        names = tuple(name for name in dict.fromkeys(adapter_names) if name != BASE_ADAPTER and name in self.deltas)
        supports = [self._delta(name).support for name in names]
        alike = len({(support.dim, support.width) for support in supports}) == 1
        trained = torch.is_grad_enabled() and any(self.deltas[name].values.requires_grad for name in names)
        if trained or not alike or not isinstance(self.product, LinearProduct):
            super()._mixed_deltas_(result, x, adapter_names)
            return
        stack = self._stacked(names, supports, x)
        numbers = {name: number for number, name in enumerate(names)}
        order = BatchOrder.of(tuple(numbers.get(name, -1) for name in adapter_names), len(names), x.device)
        is_input = supports[0].dim == self.product.in_dim
        add_channel_deltas_(result, x, stack.weights, stack.channels, order, is_input)

    def _stacked(self, names: tuple[str, ...], supports: list[ChannelSupport], x: Tensor) -> _Stack:
        stack = self._stack
        if stack is not None and stack.names == names and stack.weights.dtype == x.dtype and stack.stamp.is_current():
            return stack
        deltas = tuple(self._delta(name) for name in names)
        transposed = self.product.in_dim == 1
        most, dim = max(support.count for support in supports), supports[0].dim
        with torch.no_grad(), torch.inference_mode(False):
            shape = list(supports[0].matrix_shape)
            shape[dim] = most
            weights = x.new_zeros(len(names), *shape)
            channels = torch.zeros(len(names), most, dtype=torch.int64, device=x.device)
            for n, (delta, support) in enumerate(zip(deltas, supports)):
                weights[n].narrow(dim, 0, support.count).copy_(delta().view(support.matrix_shape))
                channels[n, : support.count] = support.channels
            weights = weights.transpose(1, 2).contiguous() if transposed else weights
            self._stack = _Stack(names, Stamp(deltas), weights, channels)
        return self._stack

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self._stack = None
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self._stack = None
        super().delete_adapter(adapter_name)

    def _apply(self, fn, *args, **kwargs):
        self._stack = None
        return super()._apply(fn, *args, **kwargs)

    def __getstate__(self):
        return {**super().__getstate__(), "_stack": None}

    def __repr__(self) -> str:
        return f"sparse_peft.{super().__repr__()}"
