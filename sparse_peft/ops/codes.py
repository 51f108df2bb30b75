"""Weights as codes: indices into a small table of the row, or of a part of the row.

A row of ``cols`` weights has ``groups`` parts; weight ``j`` belongs to part ``floor(j * groups / cols)``. A code of
``bits`` bits selects one of ``2**bits`` table entries. The packed codes of a row are one stream of bits, highest bit
first, padded to whole bytes: at 4 bits the even columns are the high halves, as in bitsandbytes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..numerics.panels import panels
from . import triton_kernels
from .backends import kernel_backend

BITS = (2, 3, 4, 8)

# Larger tiles do not fit a CPU's cache, and their temporaries take fresh pages each time: with tiles of 1 MiB, weights
# of 1,536 x 1,536 took a third of the time.
CPU_TILE_BYTES = 2**20
# {bytes: dtype of this size}
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits={bits!r}: one of {', '.join(map(str, BITS))} is expected")


def column_groups(cols: int, groups: int, device: torch.device | None = None) -> Tensor:
    """``(cols,)`` int64 part of a row that each column belongs to."""
    return torch.arange(cols, device=device) * groups // cols


def packed_width(cols: int, bits: int) -> int:
    """Bytes of a packed row of ``cols`` codes."""
    _check_bits(bits)
    return -(-cols * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``(rows, cols)`` of any integer dtype into uint8 ``(rows, packed_width(cols, bits))``.

    Raises:
        ValueError: unsupported ``bits``, or a code that needs more.
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
        ValueError: rows whose width does not match ``cols`` codes.
    """
    if packed.shape[1] != packed_width(cols, bits):
        raise ValueError(
            f"packed rows of {packed.shape[1]} bytes: {cols} codes of {bits} bits take {packed_width(cols, bits)}"
        )
    if 8 % bits == 0:  # no code spans two bytes
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
    """Ranges of rows that are unpacked at a time."""
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
    """The weights of a codebook and codes.

    Args:
        codebook: ``(rows, groups, 2**bits)``.
        codes: packed ``(rows, packed_width(cols, bits))`` uint8.
        bits: per code.
        cols: weights per row.
        dtype: of the result.

    Returns:
        ``(rows, cols)``.

    Raises:
        ValueError: shapes that do not match.
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
    """Whether all codes of a byte can be looked up at once, and faster than by unpacking them."""
    if 8 % bits or bits == 8 or 8 // bits * dtype.itemsize not in _WIDE:
        return False
    codes_per_byte = 8 // bits
    whole = groups == 1 or cols % (groups * codes_per_byte) == 0
    return whole and cols >= 256 * codes_per_byte * groups


def _gather_bytes_(out: Tensor, tables: Tensor, codes: Tensor, bits: int) -> None:
    """Look up all codes of a byte at once, in a table of the 256 bytes for each of the tables.

    Args:
        out: ``(tables, cols)``, written.
        tables: ``(tables, 2**bits)``.
        codes: packed uint8, reshaped to ``(tables, bytes)``.
        bits: per code.
    """
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
    """The codebook's gradient: for each table entry, the sum of the gradients of its weights.

    Args:
        grad: ``(rows, cols)`` gradient of the weights.
        codes: packed ``(rows, packed_width(cols, bits))`` uint8.
        bits: per code.
        groups: tables per row.

    Returns:
        ``(rows, groups, 2**bits)`` float32 (float64 for float64 gradients); the order of summation is fixed.

    Raises:
        ValueError: shapes that do not match.
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
        # scatter_add is not deterministic on a GPU, in contrast to a masked sum for each table entry
        for code in range(1 << bits):
            chosen = part.masked_fill(places != code, 0)
            for n, (first, last) in enumerate(itertools.pairwise(ends)):
                out[start:stop, n, code] = chosen[:, first:last].sum(1)
    return out
