"""Codebooks: small tables for the rows of a weight, and the table entry that replaces each weight.

A row of ``cols`` weights is cut into ``groups`` parts with one table each. Weight ``j`` belongs to part
``floor(j * groups / cols)``, also where ``cols`` is no multiple of ``groups``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.errors import layer_prefix
from ..numerics.kmeans import SortedRows, lloyd, optimal, starts
from ..numerics.panels import panels
from ..ops.codes import column_groups

CODEBOOK_METHODS = ("dp", "lloyd", "quantile", "uniform", "nf4")
"""Ways to fit tables; see [`fit_codebooks`][sparse_peft.calibrate.fit_codebooks]."""
DEFAULT_BINS = 64
# Memory of a sorted row of weights and its running sums, in bytes per weight.
_SORTED_BYTES = 80


@dataclass(frozen=True)
class Sketch:
    """A weight as a table for each part of each row, and an index into it for each weight.

    Attributes:
        codebooks: ``(rows, groups, 2**bits)`` float32.
        codes: ``(rows, ceil(cols * bits / 8))`` uint8, packed as by ``sparse_peft.ops.pack_codes``.
        bits: per code.
        groups: tables per row.
        cols: weights per row.

    Raises:
        ValueError: tables and codes whose shapes or dtypes do not match.
    """

    codebooks: Tensor
    codes: Tensor
    bits: int
    groups: int
    cols: int

    def __post_init__(self) -> None:
        rows, width = self.codes.shape
        tables, packed = (rows, self.groups, 1 << self.bits), -(-self.cols * self.bits // 8)
        if tuple(self.codebooks.shape) != tables or width != packed or self.codes.dtype != torch.uint8:
            raise ValueError(
                f"codebooks {tuple(self.codebooks.shape)} and {self.codes.dtype} codes {tuple(self.codes.shape)} for "
                f"{self.cols} columns at {self.bits} bits in {self.groups} groups: {tables} and uint8 "
                f"{(rows, packed)} are expected"
            )


class Parts:
    """Rows cut into parts of equal width; parts that are one column shorter repeat their last column.

    Args:
        cols: columns of a row.
        groups: parts of a row.
        device: of the rows.
        name: the layer's name, for error messages.

    Raises:
        ValueError: more groups than columns, or fewer than one.
    """

    def __init__(self, cols: int, groups: int, device: torch.device, name: str = "") -> None:
        if not 1 <= groups <= cols:
            raise ValueError(f"{layer_prefix(name)}groups={groups}: 1 to {cols} parts of {cols} columns are possible")
        self.cols, self.groups = cols, groups
        self.width = -(-cols // groups)
        self.even = cols % groups == 0
        if not self.even:
            first = torch.searchsorted(column_groups(cols, groups, device), torch.arange(groups + 1, device=device))
            columns = first[:-1, None] + torch.arange(self.width, device=device)
            self.real = columns < first[1:, None]
            self._columns = torch.minimum(columns, first[1:, None] - 1).flatten()

    def split(self, rows: Tensor) -> Tensor:
        """``(rows, cols)`` as ``(rows * groups, width)``."""
        if not self.even:
            rows = rows.index_select(1, self._columns)
        return rows.reshape(-1, self.width)

    def without_repeats(self, weights: Tensor) -> Tensor:
        """Weights ``(rows * groups, width)`` with 0 for repeated columns."""
        if self.even:
            return weights
        return weights * self.real.repeat(weights.shape[0] // self.groups, 1)

    def join(self, parts: Tensor) -> Tensor:
        """The inverse of ``split``."""
        parts = parts.reshape(-1, self.groups * self.width)
        return parts if self.even else parts[:, self.real.flatten()]


def _check_weight(weight: Tensor, bits: int, name: str) -> None:
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"{layer_prefix(name)}a {weight.dtype} weight of shape {tuple(weight.shape)}: a floating point matrix "
            "with at least one weight is expected"
        )
    if not 1 <= bits <= 8:
        raise ValueError(f"{layer_prefix(name)}bits={bits}: 1 to 8 bits are expected")


def check_finite(weight: Tensor, name: str) -> None:
    """Check that all weights are finite.

    Raises:
        ValueError: NaN or infinite numbers among them.
    """
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{layer_prefix(name)}{bad} of {weight.numel()} weights are NaN or infinite, so no table entry is "
            "nearest; repair the checkpoint, or leave the layer out with exclude_modules"
        )


def _normal_float(bits: int, device: torch.device) -> Tensor:
    """``(2**bits,)`` from -1 to 1: NormalFloat (QLoRA, section 3, https://arxiv.org/abs/2305.14314)."""
    half = 1 << (bits - 1)
    tail = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    positive = torch.special.ndtri(torch.linspace(tail, 0.5, half + 1, dtype=torch.float64, device=device)[:-1])
    negative = -torch.special.ndtri(torch.linspace(tail, 0.5, half, dtype=torch.float64, device=device)[:-1])
    table = torch.cat((positive, negative, positive.new_zeros(1))).sort().values
    return table / table.abs().amax()


def _clustered(rows: SortedRows, entries: int, method: str, bins: int | None) -> Tensor:
    if method == "dp":
        bins = rows.values.shape[1] if bins is None else bins
        return lloyd(rows, optimal(rows, entries, max(entries, bins)))
    found = [lloyd(rows, start) for start in starts(rows, entries).values()]
    errors = torch.stack([rows.error(tables) for tables in found])
    return torch.stack(found).take_along_dim(errors.argmin(0)[None, :, None], 0).squeeze(0)


def _tables(values: Tensor, weights: Tensor, bits: int, method: str, bins: int | None) -> Tensor:
    entries = 1 << bits
    if method == "nf4":
        return values.abs().amax(1, keepdim=True).double() * _normal_float(bits, values.device)
    weights = torch.where(weights.amax(1, keepdim=True) > 0, weights, 1.0)  # parts without any mass: equal weights
    rows = SortedRows(values, weights)
    if method in ("uniform", "quantile"):
        return starts(rows, entries)[method]
    exact, all_of_them = rows.distinct(entries)
    if bool(all_of_them.all()):
        return exact
    return torch.where(all_of_them[:, None], exact, _clustered(rows, entries, method, bins).to(torch.float32))


@torch.no_grad()
def fit_codebooks(
    weight: Tensor,
    bits: int,
    groups: int = 1,
    *,
    weights: Tensor | None = None,
    method: str = "dp",
    bins: int | None = DEFAULT_BINS,
    name: str = "",
) -> Tensor:
    """A table for each part of each row, a panel of rows at a time.

    Args:
        weight: ``(rows, cols)`` in floats.
        bits: per code; a table has ``2**bits`` entries.
        groups: parts of a row.
        weights: mass of each weight, ``(cols,)`` or ``(rows, cols)``, at least 0; equal by default.
        method: ``"dp"``, k-means by dynamic programming over ``bins`` bins and then Lloyd's iteration;
            ``"lloyd"``, the best of Lloyd's iteration from three starts; ``"quantile"``; ``"uniform"``, a grid from
            the smallest to the largest weight (round to nearest); ``"nf4"``, NormalFloat scaled by the largest
            absolute weight, at other ``bits`` the same construction. The first two reconstruct a part bit for bit if
            it has no more distinct weights than entries.
        bins: of ``"dp"``. It is exact if a part has no more distinct weights than bins; None makes all parts exact.
        name: the layer's name, for error messages.

    Returns:
        ``(rows, groups, 2**bits)`` float32, each table ascending.

    Raises:
        ValueError: weights that are NaN or infinite, or arguments out of range.

    Example:
        >>> import torch
        >>> from sparse_peft.calibrate import assign_codes, fit_codebooks
        >>> weight = torch.tensor([[0.0, 1.0, 1.0, 2.0, 3.0]])
        >>> tables = fit_codebooks(weight, bits=2)
        >>> tables.tolist(), assign_codes(weight, tables).tolist()
        ([[[0.0, 1.0, 2.0, 3.0]]], [[0, 1, 1, 2, 3]])
    """
    _check_weight(weight, bits, name)
    if method not in CODEBOOK_METHODS:
        raise ValueError(f"{layer_prefix(name)}method={method!r}: one of {', '.join(CODEBOOK_METHODS)} is expected")
    rows, cols = weight.shape
    if bins is not None and bins < 1:
        raise ValueError(f"{layer_prefix(name)}bins={bins}: at least 1 is expected, or None for exact tables")
    if weights is not None:
        if tuple(weights.shape) not in ((cols,), (rows, cols)):
            raise ValueError(
                f"{layer_prefix(name)}weights of shape {tuple(weights.shape)}: ({cols},) or ({rows}, {cols}) is "
                "expected"
            )
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(
                f"{layer_prefix(name)}weights that are negative or not finite: masses of at least 0 are expected"
            )
    parts = Parts(cols, groups, weight.device, name)
    out = torch.empty(rows, groups, 1 << bits, device=weight.device)
    for start, stop in panels(rows, cols * _SORTED_BYTES):
        panel = weight[start:stop].to(torch.float32)
        check_finite(panel, name)
        counts = torch.ones_like(panel) if weights is None else weights if weights.ndim == 1 else weights[start:stop]
        counts = parts.without_repeats(parts.split(counts.expand_as(panel)))
        out[start:stop] = _tables(parts.split(panel), counts, bits, method, bins).view(stop - start, groups, -1)
    return out


def midpoints(codebooks: Tensor) -> Tensor:
    """Borders between the nearest table entries: ``(..., entries - 1)`` of ascending ``(..., entries)`` float32.

    An addition, an exact halving and a comparison give the same numbers on every device. Between neighbouring floats
    the sum is rounded to one of them; the border is then the lower one, so each float is assigned to itself.
    """
    lower, upper = codebooks[..., :-1], codebooks[..., 1:]
    middle = (lower + upper) * 0.5
    return torch.where(middle < upper, middle, lower)


@torch.no_grad()
def assign_codes(weight: Tensor, codebooks: Tensor) -> Tensor:
    """The nearest table entry of each weight, a panel of rows at a time; the lowest of equally near ones.

    Only additions, exact halvings and comparisons of float32 numbers decide. The codes of a weight and its tables are
    therefore the same on every device and with any number of threads.

    Args:
        weight: ``(rows, cols)`` in floats; compared in float32.
        codebooks: ``(rows, groups, entries)`` float32, each table ascending.

    Returns:
        ``(rows, cols)`` uint8.

    Raises:
        ValueError: shapes that do not match, or tables that do not ascend.
    """
    rows, cols = weight.shape
    if codebooks.ndim != 3 or codebooks.shape[0] != rows or codebooks.dtype != torch.float32:
        raise ValueError(
            f"{codebooks.dtype} codebooks {tuple(codebooks.shape)} for a weight of shape {tuple(weight.shape)}: "
            f"float32 ({rows}, groups, entries) is expected"
        )
    if not bool((codebooks[..., 1:] >= codebooks[..., :-1]).all()):
        raise ValueError("codebooks with entries that do not ascend have no midpoints; sort each table")
    parts = Parts(cols, codebooks.shape[1], weight.device)
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
    for start, stop in panels(rows, cols * 4 * torch.float32.itemsize):
        panel = parts.split(weight[start:stop].to(torch.float32)).contiguous()
        borders = midpoints(codebooks[start:stop]).flatten(0, 1).contiguous()
        codes[start:stop] = parts.join(torch.searchsorted(borders, panel, out_int32=True).to(torch.uint8))
    return codes


def ascending(codebooks: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the entries of each table, and adapt the codes ``(rows, cols)``: the weights stay the same."""
    tables, order = codebooks.sort(dim=2, stable=True)
    places = order.argsort(dim=2).to(torch.uint8)
    offset = column_groups(codes.shape[1], codebooks.shape[1], codes.device) * codebooks.shape[2]
    renamed = torch.empty_like(codes)
    for start, stop in panels(codes.shape[0], codes.shape[1] * torch.int64.itemsize):
        renamed[start:stop] = places[start:stop].flatten(1).gather(1, codes[start:stop].long() + offset)
    return tables, renamed


def _mixed(numbers: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014) of int64 numbers, modulo 2**64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ (numbers >> shift & (1 << (64 - shift)) - 1)) * factor
    return numbers ^ (numbers >> 31 & (1 << 33) - 1)


@torch.no_grad()
def codes_checksum(codes: Tensor) -> int:
    """A 64-bit checksum of codes and their positions, the same on every device; any changed code changes it.

    Args:
        codes: ``(rows, cols)`` uint8, packed or not.

    Returns:
        A signed 64-bit number.
    """
    rows, cols = codes.shape
    words = -(-cols // 8)
    factors = _mixed(torch.arange(1, words + 1, device=codes.device)) | 1
    total = torch.tensor(rows * (1 << 32) + cols, device=codes.device)
    for start, stop in panels(rows, 4 * words * 8):
        panel = torch.nn.functional.pad(codes[start:stop], (0, 8 * words - cols)).contiguous().view(torch.int64)
        number = torch.arange(start, stop, device=codes.device)
        total = total + _mixed((panel * factors).sum(1) + _mixed(~number)).sum()
    return int(_mixed(total))
