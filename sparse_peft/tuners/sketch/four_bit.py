"""bitsandbytes' 4-bit weights: their packed codes are indices that are there already."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FourBit:
    """``weight[o, i] = absmax[(o * cols + i) // block] * table[code[o, i]]``.

    Attributes:
        codes: ``(rows, cols / 2)`` uint8, a view of the packed weight.
        table: ``(16,)`` float32, NF4's or FP4's values.
        absmax: ``(blocks,)`` float32.
        block: weights that share an absolute maximum.
        cols: weights in a row.
    """

    codes: Tensor
    table: Tensor
    absmax: Tensor
    block: int
    cols: int

    @classmethod
    def of(cls, base: nn.Module) -> FourBit | None:
        """A 4-bit layer's; None for other layers, and for odd rows, whose codes do not begin with a byte."""
        state = getattr(getattr(base, "weight", None), "quant_state", None)
        if state is None or not hasattr(state, "absmax") or state.code.numel() != 16 or state.shape[1] % 2:
            return None
        absmax = state.absmax
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        rows, cols = state.shape
        codes = base.weight.data.view(torch.uint8).view(rows, cols // 2)
        return cls(codes, state.code.float(), absmax.float(), state.blocksize, cols)

    def scale_(self, panel: Tensor, start: int) -> None:
        """Multiply rows from ``start`` on, ``(rows, cols)``, by their absolute maxima, in place."""
        first, last = start * self.cols, start * self.cols + panel.numel()
        if self.cols % self.block == 0:
            absmax = self.absmax[first // self.block : last // self.block]
            panel.view(-1, self.block).mul_(absmax[:, None])
            return
        begin = first // self.block
        absmax = self.absmax[begin : -(-last // self.block)].repeat_interleave(self.block)
        panel.view(-1).mul_(absmax[first - begin * self.block : last - begin * self.block])
