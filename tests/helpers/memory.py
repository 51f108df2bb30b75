"""Memory that a pass keeps for backward."""

import torch
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(model, x):
    """Bytes kept for backward, each storage once, parameters and the input not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    kept = {}

    def pack(t):
        if t.layout == torch.strided and t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return sum(kept.values()), y
