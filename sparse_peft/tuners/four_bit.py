"""bitsandbytes' 4-bit weights: reading them exactly, and keeping their packed form as it is.

On CPUs with AVX512 bitsandbytes 0.50 reads some of them wrong, and repacks the others in place.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import QuantizationBackend
from ..numerics import panels
from ..ops import code_gather
from .layer_parts import weight_of


@dataclass(frozen=True)
class FourBit:
    """``weight[o, i] = absmax[(o * cols + i) // block] * table[code[o, i]]``.

    Attributes:
        codes: ``(rows, cols / 2)`` uint8, a view of the packed weight.
        table: ``(16,)`` float32, NF4's or FP4's values.
        absmax: ``(blocks,)`` float32.
        block: weights that share an absolute maximum.
        cols: weights in a row.
        dtype: of the weight that was packed.
    """

    codes: Tensor
    table: Tensor
    absmax: Tensor
    block: int
    cols: int
    dtype: torch.dtype

    @classmethod
    def of(cls, base: nn.Module) -> FourBit | None:
        """A 4-bit layer's; None for other layers, and for odd rows, whose codes do not begin with a byte."""
        weight = getattr(base, "weight", None)
        state = getattr(weight, "quant_state", None)
        if (
            weight is None
            or state is None
            or not hasattr(state, "absmax")
            or state.code.numel() != 16
            or state.shape[1] % 2
        ):
            return None
        return cls.unpacked(weight.data, state)

    @classmethod
    def unpacked(cls, packed: Tensor, state: Any) -> FourBit:
        """Of what ``bitsandbytes.functional.quantize_4bit`` returns for a matrix with an even number of columns."""
        absmax = state.absmax
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise  # noqa: PLC0415  (an optional package)

            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        rows, cols = state.shape
        codes = packed.view(torch.uint8).view(rows, cols // 2)
        return cls(codes, state.code.float(), absmax.float(), state.blocksize, cols, state.dtype)

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

    def dense(self) -> Tensor:
        """The weight as a new tensor ``(rows, cols)`` of its dtype."""
        weight = torch.empty(len(self.codes), self.cols, dtype=self.dtype, device=self.codes.device)
        table = self.table.view(1, 1, 16)
        for start, stop in panels(len(self.codes), 4 * self.cols):
            part = code_gather(table.expand(stop - start, 1, 16), self.codes[start:stop], 4, self.cols, torch.float32)
            self.scale_(part, start)
            weight[start:stop] = part
        return weight


def base_weight(base: nn.Module, backend: QuantizationBackend) -> Tensor:
    """A quantised layer's weight in floats, ``(out_features, in_features)``."""
    misread = FourBit.of(base) if is_misread(base) else None
    return backend.get_base_weight(base) if misread is None else misread.dense()


def is_misread(base: nn.Module) -> bool:
    """Whether bitsandbytes decodes a layer's weight, and multiplies by it, in a wrong way on the weight's device."""
    weight = base._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if weight is None or state is None or not weight.is_cpu:
        return False
    cols, block = state.shape[1], state.blocksize
    return cols % 2 == 0 and cols % block != 0 and _misreads(cols, block, state.quant_type)


@functools.cache
def _misreads(cols: int, block: int, quant_type: str) -> bool:
    """Whether bitsandbytes decodes rows of this length wrong on this CPU, tried with a small matrix."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: PLC0415  (an optional package)

    # ascending numbers: no two blocks have the same maximum; whole blocks, as bitsandbytes 0.46 needs on a CPU
    together = block // math.gcd(cols, block)
    rows = -(-(block // cols + 2) // together) * together
    weight = torch.linspace(0, 1, rows * cols, device="cpu").view(-1, cols)
    packed, state = quantize_4bit(weight, blocksize=block, quant_type=quant_type)
    return not torch.allclose(dequantize_4bit(packed, state), FourBit.unpacked(packed, state).dense())


def prepare_four_bit(modules: Iterable[nn.Module]) -> None:
    """Keep bitsandbytes from repacking 4-bit layers, and warn of layers that it repacked or misreads.

    On CPUs with AVX512-BF16 a 4-bit layer replaces its packed weight, at the first pass in evaluation mode whose input
    needs no gradient, by another layout with scales rounded to bfloat16. From then on its product has no gradient, and
    PEFT's backend reads the layout as noise. Every 4-bit layer of the model keeps the portable layout, also those that
    are not adapted, because gradients pass through them.

    Args:
        modules: of the model, before an adapter is made or a pass chooses what it trains.
    """
    repacked, misread = 0, []
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # not the tensor torch's stubs want
            repacked += _restore_layout(module)
        if is_misread(module):
            misread.append(weight_of(module))
    if repacked:
        warnings.warn(
            f"bitsandbytes repacked the 4-bit weights of {repacked} layers for this CPU, at a pass in evaluation mode "
            "before the adapter was made, and rounded their scales to bfloat16. Outputs now differ slightly from "
            "those on a freshly loaded base. Make the adapter before the first pass, and run the base with "
            "`model.disable_adapter()`.",
            stacklevel=2,
        )
    if misread:
        state = misread[0].quant_state  # type: ignore[attr-defined]  # of bitsandbytes' subclass of torch's parameter
        warnings.warn(
            f"bitsandbytes reads the 4-bit weights of {len(misread)} layers wrong on this CPU, such as one of "
            f"{state.shape[1]} inputs, because blocks of {state.blocksize} weights end within its rows. The base "
            "model's own outputs are wrong. Load it in 8 or 16 bits, or on a GPU.",
            stacklevel=2,
        )


def _restore_layout(module: nn.Module) -> bool:
    """Unpack a layer that bitsandbytes repacked for this CPU; whether it was."""
    repacked = getattr(getattr(weight_of(module), "quant_state", None), "packing_format_for_cpu", False)
    if repacked:
        module.state_dict()  # saving is what makes bitsandbytes return to the portable layout
    return repacked
