"""The layer of S2FT."""

from __future__ import annotations

from ..delta_layer import SparseTunerLayer
from ..stacks import ChannelStack
from .config import S2FTConfig
from .delta import ChannelDelta


class S2FTLinear(SparseTunerLayer[ChannelDelta]):
    """A layer with trained channels; see ``SparseTunerLayer``.

    Its name says Linear because PEFT finds "all-linear" layers that have an adapter already by their class's name.
    """

    config_cls = S2FTConfig
    stack_cls = ChannelStack
