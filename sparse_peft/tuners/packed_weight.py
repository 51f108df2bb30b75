"""Keeping a quantised layer's packed weight while a merged, re-quantised one stands in its place."""

from __future__ import annotations

import copy

from torch import nn


class PackedWeight:
    """A quantised base layer as it was: given back bit for bit by ``restore``.

    Re-quantising rounds the whole weight, so subtracting the delta again would not bring the packed weight back. The
    backends replace the weight object (bitsandbytes, torchao) or the whole layer (HQQ) and edit the attributes of the
    old one on the way; all three are kept.
    """

    def __init__(self, tuner_layer: nn.Module):
        self.layer = tuner_layer.get_base_layer()
        self.weight = getattr(self.layer, "weight", None)
        self.attributes = dict(self.weight.__dict__) if self.weight is not None else {}
        self.state = copy.copy(getattr(self.layer, "state", None))

    def restore(self, tuner_layer: nn.Module) -> None:
        tuner_layer.base_layer = self.layer
        if self.weight is not None:
            self.weight.__dict__.clear()
            self.weight.__dict__.update(self.attributes)
            # registered directly: setattr on a module refuses to replace a parameter with a bare tensor subclass
            self.layer._parameters["weight"] = self.weight
        if self.state is not None:
            self.layer.state = self.state
