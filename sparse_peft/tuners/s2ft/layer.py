"""The layer of S2FT."""

from __future__ import annotations

from ..delta_layer import SparseTunerLayer
from ..stacks import ChannelStack
from .config import S2FTConfig
from .delta import ChannelDelta


class S2FTLinear(SparseTunerLayer[ChannelDelta]):
    """A layer with trained channels: whole rows or columns of ``W`` ``(out, in)``.

    S2FT, https://arxiv.org/abs/2412.06289. Arguments and paths are those of ``SparseTunerLayer``.

    Its name says Linear because PEFT finds "all-linear" layers that have an adapter already by their class's name.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import S2FTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, S2FTConfig(ratio=0.25, target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> type(layer).__name__, layer.path(), tuple(layer.get_delta_weight("default").shape)
        ('S2FTLinear', 'resident', (32, 64))
    """

    config_cls = S2FTConfig
    stack_cls = ChannelStack
