"""The layer of S2FT: mixed batches as one batched product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import BatchOrder, LinearProduct, add_channel_deltas_
from ...support import ChannelSupport
from ..base_layer import SparseTunerLayer
from ..residency import Stamp


@dataclass(frozen=True)
class _Stack:
    """Several adapters' channels of one layer, side by side, as long as nothing was written to their values.

    Attributes:
        names: the adapters, in the layer's order.
        stamp: of their values.
        weights: ``(adapters, in, out)``: what multiplies their inputs; shorter ones are filled up with zeros.
        channels: ``(adapters, most channels)`` int64.
        is_input: whether the channels are the layer's inputs.
    """

    names: tuple[str, ...]
    stamp: Stamp
    weights: Tensor
    channels: Tensor
    is_input: bool

    def serves(self, names: tuple[str, ...], x: Tensor) -> bool:
        return self.names == names and self.weights.dtype == x.dtype and self.stamp.is_current()


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
        used = set(adapter_names)
        names = tuple(name for name in self.deltas if name in used)
        stack = self._stack
        if stack is None or not stack.serves(names, x):
            stack = self._stack = self._stacked(names, x) if names else None
        trains = torch.is_grad_enabled() and any(self.deltas[name].values.requires_grad for name in names)
        if stack is None or trains:
            super()._mixed_deltas_(result, x, adapter_names)
            return
        numbers = {name: number for number, name in enumerate(names)}
        order = BatchOrder.of(tuple(numbers.get(name, -1) for name in adapter_names), len(names), x.device)
        add_channel_deltas_(result, x, stack.weights, stack.channels, order, stack.is_input)

    def _stacked(self, names: tuple[str, ...], x: Tensor) -> _Stack | None:
        """The adapters side by side; None where they do not go together."""
        supports: list[ChannelSupport] = [self.settled(name).support for name in names]
        if not isinstance(self.product, LinearProduct) or len({support.dim for support in supports}) > 1:
            return None
        deltas = tuple(self.deltas[name] for name in names)
        most, dim = max(support.count for support in supports), supports[0].dim
        with torch.no_grad(), torch.inference_mode(False):
            shape = list(supports[0].matrix_shape)
            shape[dim] = most
            weights = x.new_zeros(len(names), *shape)
            channels = torch.zeros(len(names), most, dtype=torch.int64, device=x.device)
            for n, (delta, support) in enumerate(zip(deltas, supports)):
                weights[n].narrow(dim, 0, support.count).copy_(delta().view(support.matrix_shape))
                channels[n, : support.count] = support.channels
            # stored (out, in) by nn.Linear; a product wants (in, out)
            weights = weights.transpose(1, 2).contiguous() if self.product.in_dim == 1 else weights
        return _Stack(names, Stamp(deltas), weights, channels, dim == self.product.in_dim)

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
