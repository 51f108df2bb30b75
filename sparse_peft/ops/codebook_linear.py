"""A linear layer whose weight is decoded from codes while it is multiplied, with gradients for the codebooks.

The weight is ``scale * (base + sum over i of tables_i[codes_i])``, of which each part may be missing. A panel of its
rows is decoded, multiplied and dropped, in the forward pass and again in backward; the gradient of a panel's weights
is reduced to the tables' before the next is formed. Source: SketchTune (Zhang et al., ICML 2025), panels ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..numerics.panels import panels
from ..numerics.tokens import accumulation_dtype, flatten_tokens
from .codes import code_gather, code_scatter_add
from .gradient_paths import gradient_panels
from .products import LinearProduct


@dataclass(frozen=True)
class Codes:
    """Codes of a weight's rows, packed as ``sparse_peft.ops.codes`` has them.

    Attributes:
        packed: ``(rows, packed_width(cols, bits))`` uint8.
        bits: of a code.
    """

    packed: Tensor
    bits: int


@dataclass(frozen=True)
class CodedWeight:
    """A weight ``(rows, cols)`` without its tables.

    Attributes:
        shape: ``(rows, cols)``: outputs and inputs.
        codes: for each table.
        base: ``base(start, stop)`` gives these rows of what the decoded tables are added to, in any float dtype.
        scale_: ``scale_(panel, start)`` multiplies rows from ``start`` on by what they are scaled with, in place.
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
        total = None
        for table, codes in zip(tables, self.codes, strict=True):
            wide = dtype if alone else torch.promote_types(table.dtype, accumulation_dtype(dtype))
            part = code_gather(table[start:stop], codes.packed[start:stop], codes.bits, cols, wide)
            total = part if total is None else total.add_(part)
        if self.base is not None:
            base = self.base(start, stop)
            # in the layout of a base that is stored transposed, whose product's bits depend on it
            total = total.add_(base) if base.is_contiguous() else torch.add(base, total)
        if self.scale_ is not None:
            self.scale_(total, start)
        return total.to(dtype)

    def table_grads(self, tables: Sequence[Tensor], left: Tensor, right: Tensor) -> list[Tensor]:
        """The tables' gradients from the weight's, ``left.T @ right``, of which a panel is alive at a time."""
        grads = [torch.empty_like(table) for table in tables]
        for start, stop, dense in gradient_panels([(left, right)], self.shape):
            if self.scale_ is not None:
                self.scale_(dense, start)
            for grad, codes in zip(grads, self.codes, strict=True):
                grad[start:stop] = code_scatter_add(dense, codes.packed[start:stop], codes.bits, grad.shape[1])
        return grads


@dataclass(frozen=True)
class _Decoded:
    """The weight with its tables, as a source of panels for the product."""

    coded: CodedWeight
    tables: Sequence[Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.coded.shape

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        rows, cols = self.shape
        for start, stop in panels(rows, cols * accumulation_dtype(dtype).itemsize):
            yield start, stop, self.coded.rows(self.tables, start, stop, dtype)


class _CodebookLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, coded, *tables):
        ctx.coded = coded
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *tables)
        ctx.shape = x.shape
        return coded.product.forward(x, _Decoded(coded, tables), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *tables = ctx.saved_tensors
        coded = ctx.coded
        grad_x = grad_bias = None
        grads = [None] * len(tables)
        if ctx.needs_input_grad[0]:
            grad_x = coded.product.input_grad(grad, _Decoded(coded, tables), ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_bias = coded.product.bias_grad(grad)
        if any(ctx.needs_input_grad[3:]):
            grads = coded.table_grads(tables, flatten_tokens(grad).contiguous(), flatten_tokens(x))
        return grad_x, grad_bias, None, *grads


def codebook_linear(x: Tensor, tables: Sequence[Tensor], bias: Tensor | None, coded: CodedWeight) -> Tensor:
    """``x @ W.T + bias`` for a coded weight, with no temporary of the weight's size larger than a panel.

    A table's gradient is the sum of the gradients of all weights that use an entry, in at least float32.

    Args:
        x: ``(..., cols)``, in the dtype to multiply in.
        tables: ``(rows, groups, 2**bits)`` floats, one for each of ``coded.codes``; differentiable.
        bias: ``(rows,)`` in ``x``'s dtype, or None.
        coded: the weight without its tables; saved for backward are ``x`` and the tables only.

    Returns:
        ``(..., rows)`` in ``x``'s dtype.
    """
    return _CodebookLinear.apply(x, bias, coded, *tables)
