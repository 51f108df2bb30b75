"""Weights as codes: each weight an index into a small table of its row, or of its part of the row.

``rows`` weight rows of ``cols`` weights are cut into ``groups`` parts each; weight ``j`` of a row belongs to part
``floor(j * groups / cols)``. A code of ``bits`` bits selects one of ``2**bits`` table entries. Packed, the codes of a
row are one stream of bits, the highest bit of a byte first, padded to whole bytes: at 4 bits the even columns are the
high halves, as in bitsandbytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..support.codebooks import column_groups
from . import triton_kernels
from .dispatch import kernel_backend
from .panels import panels

BITS = (2, 3, 4, 8)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits={bits!r}: one of {', '.join(map(str, BITS))} is expected")


def packed_width(cols: int, bits: int) -> int:
    """Bytes in a packed row of ``cols`` codes."""
    _check_bits(bits)
    return -(-cols * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``(rows, cols)`` of any integer dtype into uint8 ``(rows, packed_width(cols, bits))``.

    Raises:
        ValueError: ``bits`` that are not supported, or a code that needs more.
    """
    width = packed_width(codes.shape[1], bits)
    if codes.numel() and not 0 <= int(codes.amin()) <= int(codes.amax()) < 1 << bits:
        raise ValueError(
            f"codes from {int(codes.amin())} to {int(codes.amax())}: {bits} bits hold 0 to {(1 << bits) - 1}"
        )
    packed = torch.zeros(codes.shape[0], width, dtype=torch.uint8, device=codes.device)
    for start, stop in panels(codes.shape[0], 8 * width * 2):
        places = torch.arange(bits - 1, -1, -1, dtype=torch.uint8, device=codes.device)
        stream = (codes[start:stop].to(torch.uint8)[..., None] >> places & 1).flatten(1)
        stream = torch.nn.functional.pad(stream, (0, 8 * width - stream.shape[1])).view(-1, width, 8)
        for place in range(8):
            packed[start:stop] |= stream[..., place] << (7 - place)
    return packed


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """Codes ``(rows, cols)`` uint8 from packed ones ``(rows, packed_width(cols, bits))``.

    Raises:
        ValueError: rows of another width than ``cols`` codes take.
    """
    if packed.shape[1] != packed_width(cols, bits):
        raise ValueError(
            f"packed rows of {packed.shape[1]} bytes: {cols} codes of {bits} bits take {packed_width(cols, bits)}"
        )
    if 8 % bits == 0:  # no code lies in two bytes
        places = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=packed.device)
        return (packed[..., None] >> places & ((1 << bits) - 1)).flatten(1)[:, :cols]
    bit = torch.arange(cols, device=packed.device) * bits
    byte, shift = bit // 8, 16 - bits - bit % 8
    padded = torch.nn.functional.pad(packed, (0, 1)).to(torch.int16)
    # 15 bits suffice: of the first byte's bits, those above the code are cut off before the two are joined
    high = padded.index_select(1, byte) & (0xFF >> (bit % 8)).to(torch.int16)
    low = padded.index_select(1, byte + 1)
    over = (shift - 8).clamp(min=0).to(torch.int16)  # the code ends within the first byte
    under = (8 - shift).clamp(min=0).to(torch.int16)
    codes = torch.where(shift >= 8, high >> over, (high << under) | (low >> shift.clamp(max=8).to(torch.int16)))
    return codes.to(torch.uint8)


def _check_tables(codebook_shape: torch.Size, codes: Tensor, bits: int, cols: int) -> None:
    _check_bits(bits)
    rows, groups, entries = codebook_shape
    expected = (rows, packed_width(cols, bits))
    if entries != 1 << bits or not 1 <= groups <= cols or tuple(codes.shape) != expected:
        raise ValueError(
            f"codebook {tuple(codebook_shape)} and codes {tuple(codes.shape)} for {cols} columns at {bits} bits: "
            f"(rows, 1 to {cols} groups, {1 << bits}) and {expected} are expected"
        )


def code_gather(codebook: Tensor, codes: Tensor, bits: int, cols: int, dtype: torch.dtype) -> Tensor:
    """The weights that codes stand for.

    Args:
        codebook: ``(rows, groups, 2**bits)``.
        codes: packed ``(rows, packed_width(cols, bits))`` uint8.
        bits: of a code.
        cols: weights in a row.
        dtype: of the result.

    Returns:
        ``(rows, cols)``.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check_tables(codebook.shape, codes, bits, cols)
    rows, groups, entries = codebook.shape
    out = torch.empty(rows, cols, dtype=dtype, device=codebook.device)
    if kernel_backend("code_gather", codebook.dtype, codebook.device) == "triton" and dtype != torch.float64:
        triton_kernels.kernels("codes").gather_(out, codebook.contiguous(), codes.contiguous(), bits)
        return out
    offset = column_groups(cols, groups, codes.device) * entries
    for start, stop in panels(rows, cols * torch.int64.itemsize):
        places = unpack_codes(codes[start:stop], bits, cols).long() + offset
        out[start:stop] = codebook[start:stop].flatten(1).gather(1, places)
    return out


def code_scatter_add(grad: Tensor, codes: Tensor, bits: int, groups: int) -> Tensor:
    """The codebook's gradient: for each table entry the sum of the gradients of the weights that use it.

    Args:
        grad: ``(rows, cols)`` gradient of the weights.
        codes: packed ``(rows, packed_width(cols, bits))`` uint8.
        bits: of a code.
        groups: tables in a row.

    Returns:
        ``(rows, groups, 2**bits)`` float32 (float64 for float64 gradients); the order of summation is fixed.

    Raises:
        ValueError: shapes that do not belong together.
    """
    rows, cols = grad.shape
    shape = torch.Size((rows, groups, 1 << bits))
    _check_tables(shape, codes, bits, cols)
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    out = torch.zeros(shape, dtype=dtype, device=grad.device)
    if kernel_backend("code_scatter_add", grad.dtype, grad.device) == "triton":
        triton_kernels.kernels("codes").scatter_add_(out, grad.contiguous(), codes.contiguous(), bits)
        return out
    group = column_groups(cols, groups, codes.device)
    ends = torch.searchsorted(group, torch.arange(groups + 1, device=codes.device)).tolist()
    for start, stop in panels(rows, cols * torch.int64.itemsize):
        places = unpack_codes(codes[start:stop], bits, cols)
        part = grad[start:stop].to(dtype)
        if grad.device.type == "cpu":
            offset = group * (1 << bits)
            out[start:stop].flatten(1).scatter_add_(1, places.long() + offset, part)
            continue
        # scatter_add is not deterministic on a GPU: a masked sum for each table entry is
        for code in range(1 << bits):
            chosen = part.masked_fill(places != code, 0)
            for n, (first, last) in enumerate(zip(ends[:-1], ends[1:])):
                out[start:stop, n, code] = chosen[:, first:last].sum(1)
    return out
