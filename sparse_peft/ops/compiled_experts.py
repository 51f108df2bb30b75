"""Products with fused experts as nodes of compiled graphs, which must not see writes to the base weights.

The effective entries are *set* in copies of panels, so the result does not depend on whether the weights already
contain them. No copy and no gradient of all experts exists. Which tokens an expert gets is known only when a graph
runs, so that each product is one op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..numerics.panels import panels
from ..numerics.tokens import accumulation_dtype
from ..support import ChannelSupport, ExpertColumns, Support
from .compiled_layer import ENTRIES
from .entries import effective_entries, write_support_
from .expert_products import ExpertProduct, SeveralExperts, SortedTokens, TokenwiseExperts
from .expert_support_grad import expert_parts
from .gradient_observers import UNOBSERVED
from .torch_library import recall

P = ParamSpec("P")
T = TypeVar("T")

# What the places of a support are, besides those of single entries, as a number that a graph can pass.
ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class _Effective:
    """Experts with the entries of a support set in copies of their rows.

    Attributes:
        weight: ``(experts, rows, cols)``, which may hold the entries already.
        entries: ``(entries,)`` effective ones.
        support: of all experts' entries.
        key: of the first expert, for observers.
    """

    weight: Tensor
    entries: Tensor
    support: Support
    key: int

    @property
    def experts(self) -> int:
        return len(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def expert(self, number: int) -> _EffectiveExpert:
        """The weight of one expert."""
        return _EffectiveExpert(self, number)

    def whole(self, dtype: torch.dtype) -> Tensor | None:
        """None: a graph writes the entries into copies."""
        return None

    def read(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``act``, which makes its own copies of what it reads."""
        return act(*args, **kwargs)

    def after_backward(self) -> None:
        """Values that change between a graph's passes are the caller's affair."""


@dataclass(frozen=True)
class _EffectiveExpert:
    """One expert's weight in panels of rows.

    Attributes:
        source: of all experts.
        number: the expert's.
    """

    source: _Effective
    number: int

    @property
    def shape(self) -> tuple[int, int]:
        _, rows, cols = self.source.weight.shape
        return rows, cols

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, weight[start:stop])`` in ``dtype``."""
        source, (rows, cols) = self.source, self.shape
        part, begin, end = expert_parts(source.support, source.experts)[self.number]
        weight, entries = source.weight[self.number], source.entries[begin:end]
        for start, stop in panels(rows, cols * max(dtype.itemsize, weight.dtype.itemsize)):
            panel = weight[start:stop].clone()
            within, first, last = part.of_rows(start, stop) if stop - start < rows else (part, 0, part.nnz)
            write_support_(panel, within, entries[first:last])
            yield start, stop, panel.to(dtype)


def _stored(support: Support) -> tuple[tuple[Tensor, ...], int]:
    """The positions of a support as tensors, and what they are."""
    if isinstance(support, ExpertColumns):
        return (support.channels,), COLUMNS
    if isinstance(support, ChannelSupport) and support.dim == ROWS:
        return (support.channels,), ROWS
    return support.stored, ENTRIES


def _support(weight: Tensor, stored: Sequence[Tensor], kind: int) -> Support:
    experts, rows, cols = weight.shape
    shape = experts * rows, cols
    if (known := recall(shape, stored[-1])) is not None:
        return known
    if kind == ROWS:
        return ChannelSupport(shape, 0, stored[0], validate=False)
    if kind == COLUMNS:
        return ExpertColumns(shape, experts, stored[0], validate=False)
    return Support.of_stored(shape, stored)


def _entries(weight: Tensor, stored: Sequence[Tensor], kind: int) -> int:
    """The number of entries of a support."""
    _, rows, cols = weight.shape
    return stored[-1].shape[0] * {ROWS: cols, COLUMNS: rows, ENTRIES: 1}[kind]


def _product(source: _Effective, owners: Tensor, is_sorted: bool, in_dim: int) -> ExpertProduct:
    routing: SeveralExperts = SortedTokens(owners) if is_sorted else TokenwiseExperts(owners)
    return ExpertProduct(source, source.support, routing, in_dim)


@torch.library.custom_op("sparse_peft::expert_product", mutates_args=())
def expert_product(
    x: Tensor,
    weight: Tensor,
    entries: Tensor,
    stored: Sequence[Tensor],
    kind: int,
    owners: Tensor,
    is_sorted: bool,
    in_dim: int,
) -> Tensor:
    """``(rows, out)``: the tokens' products with their experts' effective weights."""
    source = _Effective(weight, entries, _support(weight, stored, kind), UNOBSERVED)
    return _product(source, owners, is_sorted, in_dim).forward(x)


@expert_product.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    entries: Tensor,
    stored: Sequence[Tensor],
    kind: int,
    owners: Tensor,
    is_sorted: bool,
    in_dim: int,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 - in_dim])


@torch.library.custom_op("sparse_peft::expert_support_grad", mutates_args=())
def expert_support_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stored: Sequence[Tensor],
    kind: int,
    owners: Tensor,
    is_sorted: bool,
    in_dim: int,
    key: int,
) -> Tensor:
    """``(entries,)``: the gradient of the experts' weights at a support, passed through the observers under keys."""
    support = _support(weight, stored, kind)
    source = _Effective(weight, weight.new_empty(0), support, key)  # whose weights are not asked for
    return _product(source, owners, is_sorted, in_dim).support_grad(grad, x, support.nnz)


@expert_support_grad.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stored: Sequence[Tensor],
    kind: int,
    owners: Tensor,
    is_sorted: bool,
    in_dim: int,
    key: int,
) -> Tensor:
    return grad.new_empty(_entries(weight, stored, kind), dtype=accumulation_dtype(grad.dtype))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        originals: Tensor,
        kind: int,
        owners: Tensor,
        is_sorted: bool,
        in_dim: int,
        key: int,
        places: Tensor,
        row_ptr: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, values, weight, originals, owners, places, row_ptr)
        ctx.kind, ctx.is_sorted, ctx.in_dim, ctx.key = kind, is_sorted, in_dim, key
        stored = [places] if row_ptr is None else [row_ptr, places]
        entries = effective_entries(originals, values)
        return expert_product(x, weight, entries, stored, kind, owners, is_sorted, in_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, weight, originals, owners, places, row_ptr = ctx.saved_tensors
        kind, is_sorted, in_dim = ctx.kind, ctx.is_sorted, ctx.in_dim
        stored = [places] if row_ptr is None else [row_ptr, places]
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            entries = effective_entries(originals, values)
            grad_x = expert_product(grad, weight, entries, stored, kind, owners, is_sorted, 1 - in_dim)
        if ctx.needs_input_grad[1]:
            grad_values = expert_support_grad(grad, x, weight, stored, kind, owners, is_sorted, in_dim, ctx.key)
            grad_values = grad_values.to(values.dtype)
        return grad_x, grad_values, *(None,) * 9


def functional_experts(
    x: Tensor,
    values: Tensor,
    weight: Tensor,
    originals: Tensor,
    support: Support,
    routing: SeveralExperts,
    in_dim: int,
    key: int,
) -> Tensor:
    """``expert_product`` for ``torch.compile``.

    Args:
        x: ``(rows, in)``, the routed tokens.
        values: ``(entries,)`` trained delta, differentiable.
        weight: ``(experts, rows, cols)`` base weights.
        originals: ``(entries,)`` entries of the base model at the support.
        support: of the values.
        routing: of the rows of ``x``.
        in_dim: the dimension of input features of an expert's stored weight: 1 for ``(out, in)``.
        key: of the first expert, for observers.

    Returns:
        ``(rows, out)``.
    """
    is_sorted = not isinstance(routing, TokenwiseExperts)
    owners = routing.ids if isinstance(routing, TokenwiseExperts) else routing.ends(weight.shape[0]).to(x.device)
    stored, kind = _stored(support)
    row_ptr = stored[0] if len(stored) > 1 else None
    return _Experts.apply(x, values, weight, originals, kind, owners, is_sorted, in_dim, key, stored[-1], row_ptr)
