"""What an optimizer keeps of masked weights becomes zero."""

from __future__ import annotations

import torch
from torch import Tensor

from ...numerics.bits import unpack_bits
from ...numerics.panels import panels
from .state import PrunedState


@torch.no_grad()
def clear_masked_(state: PrunedState, optimizer: torch.optim.Optimizer | None, values: bool = False) -> None:
    """Set the optimizer's numbers of masked weights to zero, of parameters with one number for a weight.

    Args:
        state: of one layer.
        optimizer: whose state it is; None for none.
        values: set the masked weights' deltas to zero, too.

    Raises:
        NotImplementedError: a state in 8 bits.
    """
    for name, parameter in state.own_parameters.items():
        if name not in ("values", "dense"):
            continue
        kept = [parameter.data] if values else []
        kept += _state_tensors(optimizer, parameter, state.name)
        for tensor in kept:
            _clear_(state, tensor, name == "values")


def _state_tensors(optimizer: torch.optim.Optimizer | None, parameter: Tensor, layer: str) -> list[Tensor]:
    found = [] if optimizer is None else list((optimizer.state.get(parameter) or {}).values())
    tensors = [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.shape == parameter.shape]
    if any(not tensor.is_floating_point() for tensor in tensors):
        raise NotImplementedError(
            f"layer {layer}: {type(optimizer).__name__} keeps its state in integers, whose zero is not known; use an "
            "optimizer with a state in floats, such as AdamW"
        )
    return tensors


def _clear_(state: PrunedState, tensor: Tensor, by_entry: bool) -> None:
    cols = state.sizes_[1]
    if by_entry:
        tensor.masked_fill_(~kept_entries(state), 0)
        return
    for start, stop in panels(tensor.shape[0], 2 * cols):
        tensor[start:stop].masked_fill_(~unpack_bits(state.mask[start:stop], cols), 0)


def kept_entries(state: PrunedState) -> Tensor:
    """``(entries,)`` bool: which trained entries the mask keeps."""
    positions, cols = state.own_buffers["positions"].long(), state.sizes_[1]
    rows, places = positions // cols, positions % cols
    return (state.mask[rows, places // 8].long() >> (7 - places % 8) & 1).to(torch.bool)
