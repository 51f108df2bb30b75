"""The layer of S2FT."""

from __future__ import annotations

from ..delta_layer import SparseTunerLayer
from ..stacks import ChannelStack


class S2FTLinear(SparseTunerLayer):
    """A layer with trained channels; see ``SparseTunerLayer``.

    Its name says Linear because PEFT finds "all-linear" layers that have an adapter already by their class's name.
    """

    delta_container = "sparse_peft_s2ft_adapter"
    adapter_layer_names = (delta_container,)
    stack_cls = ChannelStack

    def __repr__(self) -> str:
        return f"sparse_peft.{super().__repr__()}"
