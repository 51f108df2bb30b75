"""Activations with contiguous tokens, transposed once for all layers that share them.

q, k and v share one input, gate and up another: in a backward pass, the later layers reuse the transposed copy of the
first. Nothing is kept after the backward pass.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..numerics.panels import panel_bytes

ALIGNMENT = 16  # bytes: the widest load of a kernel


class _Kept:
    """A transposed activation, with the activation itself so that its address stays in use."""

    def __init__(self, x: Tensor, result: Tensor) -> None:
        self.x, self.result, self.version = x, result, x._version

    def is_of(self, x: Tensor, dtype: torch.dtype) -> bool:
        return (
            self.x.data_ptr() == x.data_ptr()
            and self.result.dtype == dtype
            and self.version == x._version
            and self.x.dtype == x.dtype
            and self.x.shape == x.shape
            and self.x.stride() == x.stride()
        )


_kept: dict[torch.device, list[_Kept]] = {}


def _forget(device: torch.device) -> None:
    _kept.pop(device, None)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _keep(x: Tensor, result: Tensor) -> None:
    """Keep a result until another activation comes or the backward pass ends, up to one panel in all."""
    if not _in_backward() or x.is_inference() or result.nbytes > panel_bytes():
        return
    if x.device not in _kept:
        torch.autograd.Variable._execution_engine.queue_callback(partial(_forget, x.device))
    kept = _kept.setdefault(x.device, [])
    if kept and kept[0].x.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        kept.clear()
    if sum(one.result.nbytes for one in kept) + result.nbytes <= panel_bytes():
        kept.append(_Kept(x, result))


def token_contiguous(x: Tensor, dtype: torch.dtype, shared: bool = False) -> Tensor:
    """``x`` ``(tokens, features)`` as ``(features, padded tokens)``, with zeros after the last token.

    Rows are padded to a multiple of 16 bytes.

    Args:
        x: an activation, or a tile of its tokens.
        dtype: of the result.
        shared: whether other layers are likely to need the same; inside a backward pass it is kept for them.
    """
    if shared:
        for kept in _kept.get(x.device, ()):
            if kept.is_of(x, dtype):
                return kept.result
    tokens, features = x.shape
    per_load = ALIGNMENT // dtype.itemsize
    padded = -(-tokens // per_load) * per_load
    result = torch.empty(features, padded, dtype=dtype, device=x.device)
    result[:, :tokens].copy_(x.t())
    if padded > tokens:
        result[:, tokens:].zero_()
    if shared:
        _keep(x, result)
    return result
