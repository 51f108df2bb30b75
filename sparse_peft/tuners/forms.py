"""Forms of a trained delta: entries, low-rank factors, plain LoRA, sizes, a layer of its shape.

Export, composition, summaries and plans use these forms and know no method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops import write_support_
from ..support import Support


@dataclass(frozen=True)
class Entries:
    """Entries that are added to a stored weight.

    Attributes:
        support: their positions.
        values: ``(entries,)``, in the order of the positions.
    """

    support: Support
    values: Tensor


@dataclass(frozen=True)
class LoraFactors:
    """A delta in LoRA's form, ``scale * B @ A``.

    Attributes:
        A: ``(rank, in_features)`` float32; of a convolution with its kernel behind.
        B: ``(out_features, rank)`` likewise.
        scale: LoRA's ``alpha / rank``.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def bytes(self) -> int:
        """Of both factors."""
        return sum(factor.numel() * factor.element_size() for factor in (self.A, self.B))

    def padded(self, rank: int) -> LoraFactors:
        """The same delta with more ranks, of zeros."""
        more = rank - self.rank
        a = torch.cat([self.A, self.A.new_zeros(more, *self.A.shape[1:])])
        b = torch.cat([self.B, self.B.new_zeros(self.B.shape[0], more, *self.B.shape[2:])], dim=1)
        return LoraFactors(a, b, self.scale)


@dataclass(frozen=True)
class StateSizes:
    """Sizes of one adapter's state in one layer.

    Attributes:
        parameters: numbers of elements of the trained tensors.
        position_bytes: memory of positions and other buffers.
        file_bytes: of its tensors in a file.
        entries: trained entries of the weight; None without a sparse part.
        rank: of the low-rank part; None without.
        channels: ``(dim, count)`` where whole rows (0) or columns (1) train.
        formed_bytes: of tensors that each pass forms from the parameters and keeps for backward.
    """

    parameters: tuple[int, ...]
    position_bytes: int
    file_bytes: int
    entries: int | None = None
    rank: int | None = None
    channels: tuple[int, int] | None = None
    formed_bytes: int = 0


class Forms:
    """Forms of one adapter's delta in one layer.

    A method names the parts that its delta is the sum of, in ``sparse_part`` and ``low_rank_part``. The other forms
    follow from these, and a method overrides those that it has a better one of. Tensors are detached, on the
    device of the parameters.
    """

    name: str  # the layer's
    why_no_parts: ClassVar[str] = "it is given neither by entries nor by low-rank factors"

    def sparse_part(self) -> Entries | None:
        """The entries of the stored weight that the delta changes one by one; None without such a part."""
        return None

    def low_rank_part(self) -> tuple[Tensor, Tensor] | None:
        """``(rank, inputs)`` and ``(outputs, rank)``, whose product is part of the delta; None without."""
        return None

    @property
    def is_sparse(self) -> bool:
        """Whether the delta consists of entries alone."""
        return self.low_rank_part() is None and self.sparse_part() is not None

    def as_sparse(self) -> Entries:
        """The delta as entries of the stored weight.

        Raises:
            ValueError: it has other parts than entries.
        """
        entries = self.sparse_part()
        if entries is None or self.low_rank_part() is not None:
            factors = "it has low-rank factors" if self.low_rank_part() is not None else self.why_no_parts
            raise self.no_form("sparse form", factors)
        return entries

    def lora_factors(self, in_dim: int) -> LoraFactors:
        """The delta as plain LoRA, exact up to rounding.

        Args:
            in_dim: which dimension of the stored weight is the input's.

        Returns:
            float32 factors; of rank 0 if the delta is zero.

        Raises:
            ValueError: it has no such form.
        """
        entries, factors = self.sparse_part(), self.low_rank_part()
        if entries is not None and factors is not None:
            raise self.no_form("LoRA form", "it is low rank plus a sparse delta, which together are of full rank")
        if entries is not None:
            return factors_of_lines(entries, *lines_of(entries.support), in_dim)
        if factors is not None:
            down, up = factors
            return LoraFactors(down.float(), up.float())
        raise self.no_form("LoRA form", self.why_no_parts)

    def no_form(self, form: str, reason: str) -> ValueError:
        """The error for a form that the delta lacks: the reason, and the alternatives."""
        cures = ["merge it into the base model (sparse_peft.adapters.export, or merge_and_unload)"]
        if self.sparse_part() is not None or self.low_rank_part() is not None:
            cures.append(
                "save an approximation of low rank (sparse_peft.adapters.export with form='low_rank' and a rank)"
            )
        return ValueError(f"layer {self.name}: the delta has no {form} because {reason}; {', or '.join(cures)}")


# ---------------------------------------------------------------------------------------------------- LoRA


def lines_of(support: Support) -> tuple[int, Tensor]:
    """``(dim, lines)``: the rows (0) or columns (1) that have entries, whichever are fewer."""
    rows, cols = support.rows.long().unique(), support.cols.long().unique()
    return (0, rows) if rows.numel() < cols.numel() else (1, cols)


def factors_of_lines(entries: Entries, dim: int, lines: Tensor, in_dim: int) -> LoraFactors:
    """LoRA of a delta with few rows or columns: one factor has them, the other selects their places.

    A delta of ``k`` whole columns is ``D S``, with ``D`` the columns and ``S`` ``(k, in)`` the rows of the identity
    that select them: LoRA of rank ``k`` whose ``A`` is ``S``. Rows likewise, with ``B`` the selection.

    Args:
        entries: of the stored weight.
        dim: whether ``lines`` are rows (0) or columns (1) of it.
        lines: ``(rank,)`` int64; every entry lies in one of them.
        in_dim: which dimension of the stored weight is the input's.
    """
    support, values = entries.support, entries.values
    dense = torch.zeros(support.shape, device=values.device)
    write_support_(dense, support, values.float())
    selection = torch.zeros(lines.numel(), support.shape[dim], device=lines.device).scatter_(1, lines[:, None], 1.0)
    if dim == 1:
        left, right = dense.index_select(1, lines), selection
    else:
        left, right = selection.t(), dense.index_select(0, lines)
    return LoraFactors(right, left) if in_dim == 1 else LoraFactors(left.t(), right.t())


# ---------------------------------------------------------------------------------------------------- skeletons


def weightless_layer(shape: tuple[int, int], in_dim: int = 1, taps: int = 1) -> nn.Module:
    """A layer whose weight has this stored shape and no memory, for adapters without their base model.

    Args:
        shape: ``(rows, cols)`` of the stored weight.
        in_dim: which dimension is the input's; 0 for transformers' ``Conv1D``.
        taps: of a convolution's kernel; 1 for linear layers.
    """
    rows, cols = shape
    layer: nn.Module
    with torch.device("meta"):
        if taps > 1:
            layer = nn.Conv1d(cols // taps, rows, taps, bias=False)
        elif in_dim == 0:
            layer = Conv1D(cols, rows)
            del layer.bias
        else:
            layer = nn.Linear(cols, rows, bias=False)
    size = (rows, cols // taps, taps) if taps > 1 else shape
    layer.weight = nn.Parameter(torch.empty(1, device="cpu").expand(size), requires_grad=False)
    return layer


def layer_of_factors(
    layer: str,
    shape: tuple[int, int],
    tensors: Mapping[str, Tensor],
    shapes_of: Callable[[int, int], Mapping[str, tuple[int, ...]]],
) -> nn.Module:
    """The weightless layer that low-rank factors fit; nothing is allocated of a size that the file does not have.

    Args:
        layer: its name.
        shape: ``(rows, cols)`` of the stored weight.
        tensors: the layer's, from a file.
        shapes_of: ``shapes_of(inputs, outputs)`` are the shapes that the factors must have, by names.

    Raises:
        ValueError: they fit no weight of this shape.
    """
    rows, cols = shape
    for in_dim, (inputs, outputs) in ((1, (cols, rows)), (0, (rows, cols))):
        wanted = shapes_of(inputs, outputs)
        found = {name: tuple(tensors[name].shape) for name in wanted if name in tensors}
        # missing tensors are named when the file is loaded
        if found == wanted or len(found) < len(wanted):
            return weightless_layer(shape, in_dim)
    raise ValueError(
        f"layer {layer}: factors of shapes {', '.join(map(str, found.values()))}, where a weight of {rows} x {cols} "
        f"has {', '.join(map(str, shapes_of(cols, rows).values()))}; the adapter's file is damaged: save or download "
        "it again"
    )
