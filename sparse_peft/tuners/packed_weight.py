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


def keep_packing(base: nn.Module) -> None:
    """Keep bitsandbytes from repacking a 4-bit base in place.

    On CPUs with AVX512-BF16 its layer replaces the packed weight, at the first pass in eval mode, by another layout
    with rounded scales, which PEFT's backend reads as noise and nobody can turn back bit for bit.
    """
    if not hasattr(base, "support_avx512bf16_for_cpu"):
        return
    base.support_avx512bf16_for_cpu = False
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        base.state_dict()  # done already: saving is what makes bitsandbytes return to the portable layout
