"""A linear layer whose weight is decoded from codes during the product, with gradients for the codebooks.

The weight is ``scale * (base + sum over i of tables_i[codes_i])``, where each part is optional. It is decoded one
panel of rows at a time, in the forward pass and again in backward. There each panel's gradient is reduced to the
tables' before the next is formed. Source: SketchTune, https://arxiv.org/abs/2410.06364; the panels are this package's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..numerics.panels import panels
from ..numerics.tokens import accumulation_dtype, flatten_tokens
from .codes import code_gather, code_scatter_add
from .gradient_paths import gradient_panels
from .products import LinearProduct


@dataclass(frozen=True)
class Codes:
    """Codes of a weight's rows, packed by ``pack_codes``.

    Attributes:
        packed: ``(rows, packed_width(cols, bits))`` uint8.
        bits: per code.
    """

    packed: Tensor
    bits: int


@dataclass(frozen=True)
class CodedWeight:
    """A coded weight ``(rows, cols)`` without its tables.

    Attributes:
        shape: ``(outputs, inputs)``.
        codes: for each table, at least one.
        base: ``base(start, stop)`` returns rows of the weight that the tables are added to, in any float dtype.
        scale_: ``scale_(panel, start)`` multiplies the rows from ``start`` by their scales, in place.
    """

    shape: tuple[int, int]
    codes: tuple[Codes, ...]
    base: Callable[[int, int], Tensor] | None = None
    scale_: Callable[[Tensor, int], None] | None = None
    product: LinearProduct = field(default=LinearProduct(1), init=False)

    def rows(self, tables: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows ``start`` to ``stop`` in ``dtype``; sums in at least float32, rounded once."""
        cols = self.shape[1]
        alone = len(tables) == 1 and self.base is None and self.scale_ is None
        parts = []
        for table, codes in zip(tables, self.codes, strict=True):
            wide = dtype if alone else torch.promote_types(table.dtype, accumulation_dtype(dtype))
            parts.append(code_gather(table[start:stop], codes.packed[start:stop], codes.bits, cols, wide))
        total = parts[0]
        for part in parts[1:]:
            total = total.add_(part)
        if self.base is not None:
            base = self.base(start, stop)
            # the result keeps the layout of a transposed base, since the bits of its product depend on it
            total = total.add_(base) if base.is_contiguous() else torch.add(base, total)
        if self.scale_ is not None:
            self.scale_(total, start)
        return total.to(dtype)

    def table_grads(self, tables: Sequence[Tensor], left: Tensor, right: Tensor) -> list[Tensor]:
        """The tables' gradients from the weight's, ``left.T @ right``, one panel at a time."""
        grads = [torch.empty_like(table) for table in tables]
        for start, stop, dense in gradient_panels([(left, right)], self.shape):
            if self.scale_ is not None:
                self.scale_(dense, start)
            for grad, codes in zip(grads, self.codes, strict=True):
                grad[start:stop] = code_scatter_add(dense, codes.packed[start:stop], codes.bits, grad.shape[1])
        return grads


@dataclass(frozen=True)
class _Decoded:
    """The weight with its tables, in panels for the product."""

    coded: CodedWeight
    tables: Sequence[Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.coded.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tables[0].dtype

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        rows, cols = self.shape
        for start, stop in panels(rows, cols * accumulation_dtype(dtype).itemsize):
            yield start, stop, self.coded.rows(self.tables, start, stop, dtype)


class _CodebookLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, coded: CodedWeight, *tables: Tensor) -> Tensor:
        ctx.coded = coded
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *tables)
        ctx.shape = x.shape
        return coded.product.forward(x, _Decoded(coded, tables), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tables = ctx.saved_tensors
        coded = ctx.coded
        grad_x = grad_bias = None
        grads: Sequence[Tensor | None] = [None] * len(tables)
        if ctx.needs_input_grad[0]:
            grad_x = coded.product.input_grad(grad, _Decoded(coded, tables), ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_bias = coded.product.bias_grad(grad)
        if any(ctx.needs_input_grad[3:]):
            grads = coded.table_grads(tables, flatten_tokens(grad).contiguous(), flatten_tokens(x))
        return grad_x, grad_bias, None, *grads


def codebook_linear(x: Tensor, tables: Sequence[Tensor], bias: Tensor | None, coded: CodedWeight) -> Tensor:
    """``x @ W.T + bias`` for a coded weight, without temporaries larger than a panel.

    The gradient of a table entry is the sum of the gradients of its weights, in at least float32. Only ``x`` and the
    tables are saved for backward.

    Args:
        x: ``(..., cols)``, in the dtype to multiply in.
        tables: ``(rows, groups, 2**bits)`` floats, one for each of ``coded.codes``; differentiable.
        bias: ``(rows,)`` in ``x``'s dtype, or None.
        coded: the weight without its tables.

    Returns:
        ``(..., rows)`` in ``x``'s dtype.
    """
    return _CodebookLinear.apply(x, bias, coded, *tables)
