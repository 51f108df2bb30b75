"""Weights as codes: each weight an index into a small table of its row, or of its part of the row.

``rows`` weight rows of ``cols`` weights are cut into ``groups`` parts each; weight ``j`` of a row belongs to part
``floor(j * groups / cols)``. A code of ``bits`` bits selects one of ``2**bits`` table entries. Packed, the codes of a
row are one stream of bits, the highest bit of a byte first, padded to whole bytes: at 4 bits the even columns are the
high halves, as in bitsandbytes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..numerics.panels import panels
from . import triton_kernels
from .backends import kernel_backend

BITS = (2, 3, 4, 8)

# Larger blocks fall out of a CPU's cache, and their temporaries come from fresh pages each time: 1 MiB took a third of
# the time of a whole 1,536 x 1,536 weight.
CPU_TILE_BYTES = 2**20
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits={bits!r}: one of {', '.join(map(str, BITS))} is expected")


def column_groups(cols: int, groups: int, device: torch.device | None = None) -> Tensor:
    """``(cols,)`` int64 part of a row that each column belongs to."""
    return torch.arange(cols, device=device) * groups // cols


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
    # eight codes of three bits lie in three bytes
    triples = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 3)).view(packed.shape[0], -1, 3).int()
    words = triples[..., 0] << 16 | triples[..., 1] << 8 | triples[..., 2]
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8, device=packed.device)
    for place in range(8):
        codes[..., place] = words >> (21 - 3 * place) & 7
    return codes.flatten(1)[:, :cols]


def _tiles(rows: int, cols: int, device: torch.device) -> list[tuple[int, int]]:
    """Blocks of rows that are unpacked at a time."""
    bytes_per_row = cols * torch.int64.itemsize
    return panels(rows, bytes_per_row, max(1, CPU_TILE_BYTES // bytes_per_row) if device.type == "cpu" else None)


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
        triton_kernels.kernels("codes").code_gather_(out, codebook.contiguous(), codes.contiguous(), bits)
        return out
    if _bytes_are_indices(cols, groups, bits, dtype):
        _gather_bytes_(out.view(rows * groups, -1), codebook.reshape(rows * groups, entries), codes, bits)
        return out
    offset = column_groups(cols, groups, codes.device) * entries
    for start, stop in _tiles(rows, cols, codes.device):
        places = unpack_codes(codes[start:stop], bits, cols).long()
        places = places if groups == 1 else places.add_(offset)
        out[start:stop] = codebook[start:stop].flatten(1).gather(1, places)
    return out


def _bytes_are_indices(cols: int, groups: int, bits: int, dtype: torch.dtype) -> bool:
    """Whether looking up all codes of a byte at once is possible, and cheaper than to unpack them."""
    if 8 % bits or bits == 8 or 8 // bits * dtype.itemsize not in _WIDE:
        return False
    codes_per_byte = 8 // bits
    whole = groups == 1 or cols % (groups * codes_per_byte) == 0
    return whole and cols >= 256 * codes_per_byte * groups


def _gather_bytes_(out: Tensor, tables: Tensor, codes: Tensor, bits: int) -> None:
    """``out`` ``(tables, cols)`` from ``tables`` ``(tables, 2**bits)``, with a table of all 256 bytes for each."""
    (rows, cols), entries, count = out.shape, 1 << bits, 8 // bits
    codes, tables = codes.reshape(rows, -1), tables.to(out.dtype)
    wide = _WIDE[count * out.dtype.itemsize]
    for start, stop in _tiles(rows, cols, codes.device):
        of_bytes = torch.empty(stop - start, *(entries,) * count, count, dtype=out.dtype, device=out.device)
        for place in range(count):
            ones = [1] * count
            ones[place] = entries
            of_bytes[..., place] = tables[start:stop].view(-1, *ones)
        found = of_bytes.flatten(1).view(wide).gather(1, codes[start:stop].long())
        out[start:stop] = found.view(out.dtype)[:, :cols]


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
        triton_kernels.kernels("codes").code_scatter_add_(out, grad.contiguous(), codes.contiguous(), bits)
        return out
    group = column_groups(cols, groups, codes.device)
    ends = torch.searchsorted(group, torch.arange(groups + 1, device=codes.device)).tolist()
    for start, stop in _tiles(rows, cols, codes.device):
        places = unpack_codes(codes[start:stop], bits, cols)
        part = grad[start:stop].to(dtype)
        if grad.device.type == "cpu":
            places = places.long()
            places = places if groups == 1 else places.add_(group * (1 << bits))
            out[start:stop].flatten(1).scatter_add_(1, places, part)
            continue
        # scatter_add is not deterministic on a GPU: a masked sum for each table entry is
        for code in range(1 << bits):
            chosen = part.masked_fill(places != code, 0)
            for n, (first, last) in enumerate(itertools.pairwise(ends)):
                out[start:stop, n, code] = chosen[:, first:last].sum(1)
    return out
