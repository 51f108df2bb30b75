"""Reading and writing the entries of a weight at a support.

The effective entry is ``round(original + value)``: the sum is formed in the wider of the two dtypes and rounded once
to the weight's, so that training, merging and a reloaded adapter give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .panels import panels


def read_entries(weight: Tensor, indices: Tensor) -> Tensor:
    """The weight's entries at flat row-major ``indices``, as a new tensor ``(entries,)`` of the weight's dtype."""
    if weight.is_contiguous():
        return weight.view(-1).index_select(0, indices)
    cols = weight.shape[1]
    return weight[indices // cols, indices % cols]


@torch.no_grad()
def write_entries_(weight: Tensor, indices: Tensor, entries: Tensor) -> None:
    """Overwrite the weight's entries at flat row-major ``indices``, in place; every other bit stays as it is."""
    # scatter_ wants int64 positions; in pieces, so that they are never larger than a panel
    for start, stop in panels(indices.numel(), torch.int64.itemsize):
        piece = indices[start:stop].long()
        if weight.is_contiguous():
            weight.view(-1).scatter_(0, piece, entries[start:stop])
        else:
            cols = weight.shape[1]
            weight[piece // cols, piece % cols] = entries[start:stop]


def effective_entries(originals: Tensor, values: Tensor) -> Tensor:
    """``round(original + value)`` in the originals' dtype, ``(entries,)``."""
    wide = torch.promote_types(originals.dtype, values.dtype)
    return (originals.to(wide) + values.to(wide)).to(originals.dtype)
