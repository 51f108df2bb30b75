"""Products of routed tokens with the weights of fused experts, trained at a support.

The experts' weights are one stored matrix ``(experts * rows, cols)``: expert ``e`` has the rows ``e * rows`` to
``(e + 1) * rows``. Each expert multiplies the tokens routed to it. The values' gradient is formed from these tokens,
one expert at a time, so that no gradient or copy of all experts exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from ..support import Support
from .expert_support_grad import expert_parts, expert_support_grad
from .kept_inputs import keep_input
from .products import LinearProduct, WeightPanels

P = ParamSpec("P")
T = TypeVar("T")


class Segment(NamedTuple):
    """The rows ``start`` to ``stop`` of an activation are the tokens of one expert."""

    expert: int
    start: int
    stop: int


class Routing(ABC):
    """Which expert multiplies which rows of an activation."""

    @abstractmethod
    def segments(self) -> Iterator[Segment]:
        """The experts with tokens, in the order of their rows."""

    def sort(self, x: Tensor) -> Tensor:
        """The rows in the order of the segments."""
        return x

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of ``sort``."""
        return x


@dataclass(frozen=True)
class OneExpert(Routing):
    """All rows belong to one expert."""

    expert: int
    tokens: int

    def segments(self) -> Iterator[Segment]:
        if self.tokens:
            yield Segment(self.expert, 0, self.tokens)


class SeveralExperts(Routing):
    """Rows of several experts."""

    @abstractmethod
    def ends(self, experts: int) -> Tensor:
        """``(experts,)`` the row after each expert's last one, once they are sorted."""


@dataclass(frozen=True)
class EveryExpert(SeveralExperts):
    """Each expert has the same number of rows, one after the other."""

    experts: int
    tokens: int

    def ends(self, experts: int) -> Tensor:
        return torch.arange(1, experts + 1) * self.tokens

    def segments(self) -> Iterator[Segment]:
        for expert in range(self.experts if self.tokens else 0):
            yield Segment(expert, expert * self.tokens, (expert + 1) * self.tokens)


@dataclass(frozen=True)
class SortedTokens(SeveralExperts):
    """Rows sorted by expert.

    Attributes:
        offsets: ``(experts,)`` row after each expert's last one.
    """

    offsets: Tensor

    def ends(self, experts: int) -> Tensor:
        return self.offsets

    def segments(self) -> Iterator[Segment]:
        start = 0
        for expert, stop in enumerate(self.offsets.tolist()):
            if stop > start:
                yield Segment(expert, start, stop)
            start = stop


@dataclass(frozen=True)
class TokenwiseExperts(SeveralExperts):
    """Each row has an expert of its own.

    Attributes:
        ids: ``(rows,)`` its number.
    """

    ids: Tensor

    @cached_property
    def order(self) -> Tensor:
        """``(rows,)`` the rows sorted by expert."""
        return self.ids.argsort(stable=True)

    def ends(self, experts: int) -> Tensor:
        return torch.bincount(self.ids, minlength=experts).cumsum(0)

    def segments(self) -> Iterator[Segment]:
        experts, counts = torch.unique(self.ids, return_counts=True)
        start = 0
        for expert, tokens in zip(experts.tolist(), counts.tolist(), strict=True):
            yield Segment(expert, start, start + tokens)
            start += tokens

    def sort(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.order)

    def restore(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy_(0, self.order, x)


class ExpertSource(Protocol):
    """The effective weights of the experts, in forward and again in backward."""

    @property
    def experts(self) -> int:
        """Number of experts."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""
        ...

    @property
    def key(self) -> int:
        """The key of the first expert, for observers; that of expert ``e`` is larger by ``e``."""
        ...

    def expert(self, number: int) -> WeightPanels:
        """The weight of one expert."""
        ...

    def whole(self, dtype: torch.dtype) -> Tensor | None:
        """``(experts, rows, cols)``, the weights of all experts; None where that would take a copy."""
        ...

    def read(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``act``, which reads weights in backward; nothing else changes them meanwhile."""
        ...

    def after_backward(self) -> None:
        """Called after the values' gradient was formed."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How an activation is made again in backward from tensors that are kept anyway.

    Attributes:
        make: returns the activation, given the tensors.
        tensors: what it is made from.
    """

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def without_products(self) -> Recipe:
        """The recipe with the first tensor formed again, too, where it is a product of what autograd keeps anyway."""
        source, *others = self.tensors
        kept, make = keep_input(source, source, None), self.make
        if kept.tensors and kept.tensors[0] is source:
            return self
        restore, count = kept.restore, len(kept.tensors)  # what makes the activation must not refer to tensors
        return Recipe(lambda *saved: make(restore(*saved[:count]), *saved[count:]), (*kept.tensors, *others))


# By the dimension of input features.
_PRODUCTS = LinearProduct(0), LinearProduct(1)


@dataclass(frozen=True)
class ExpertProduct:
    """One product of an activation with experts' weights.

    Attributes:
        source: of the weights.
        support: of all experts' entries; None for the base weights alone.
        routing: of the activation's rows.
        in_dim: the dimension of input features of an expert's stored weight: 1 for ``(out, in)``.
        first: number of the entry that the values begin with.
        scale: factor between the values and the delta.
        grouped: multiplies sorted tokens by ``(experts, in, out)`` weights, given their ``offs``; None if the experts
            multiply one after the other.
    """

    source: ExpertSource
    support: Support | None
    routing: Routing
    in_dim: int
    first: int = 0
    scale: float = 1.0
    grouped: Callable[..., Tensor] | None = None

    @property
    def outputs(self) -> int:
        """Output features of an expert."""
        return self.source.expert(0).shape[1 - self.in_dim]

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, out)`` of ``(rows, in)``."""
        return self._each(x, _PRODUCTS[self.in_dim])

    def input_grad(self, grad: Tensor) -> Tensor:
        """``(rows, in)`` of ``(rows, out)``."""
        return self.source.read(self._multiply_back, grad)

    def _multiply_back(self, grad: Tensor) -> Tensor:
        if self.grouped is not None and isinstance(self.routing, SortedTokens) and _suits_grouped_products(grad):
            weight = self.source.whole(grad.dtype)
            if weight is not None:
                weight = weight if self.in_dim == 1 else weight.transpose(-2, -1)
                return self.grouped(grad, weight, offs=self.routing.offsets)
        # the gradient of x @ W.T is grad @ W: the product with the other dimension as input
        return self._each(grad, _PRODUCTS[1 - self.in_dim])

    def _each(self, x: Tensor, product: LinearProduct) -> Tensor:
        if isinstance(self.routing, OneExpert) and self.routing.tokens:
            return product.forward(x, self.source.expert(self.routing.expert), None)
        x = self.routing.sort(x)
        result = x.new_zeros(len(x), self.source.expert(0).shape[1 - product.in_dim])
        for expert, start, stop in self.routing.segments():
            result[start:stop] = product.forward(x[start:stop], self.source.expert(expert), None)
        return self.routing.restore(result)

    def support_grad(self, grad: Tensor, x: Tensor, entries: int) -> Tensor:
        """The values' gradient ``(entries,)``, each expert's from its own tokens.

        Experts without tokens get zeros.
        """
        assert self.support is not None
        routing, experts = self.routing, self.source.experts
        if isinstance(routing, OneExpert):
            return self._one_support_grad(routing.expert, grad, x, entries)
        assert isinstance(routing, SeveralExperts)
        left, right = routing.sort(grad), routing.sort(x)
        if self.in_dim == 0:
            left, right = right, left
        return expert_support_grad(left, right, routing.ends(experts), self.support, experts, self.source.key)

    def _one_support_grad(self, expert: int, grad: Tensor, x: Tensor, entries: int) -> Tensor:
        """The gradient of one expert's entries, among ``entries`` that may be its own or all."""
        assert self.support is not None
        part, first, _ = expert_parts(self.support, self.source.experts)[expert]
        product = _PRODUCTS[self.in_dim]
        own = product.support_grad(grad, product.keep(x, part), part, self.source.key + expert)
        if entries == part.nnz:
            return own
        values = torch.zeros(entries, dtype=own.dtype, device=own.device)
        values[first - self.first : first - self.first + part.nnz] = own
        return values


def _suits_grouped_products(x: Tensor) -> bool:
    """Whether torch's grouped product takes an activation as it lies in memory: in rows of 16 bytes, without gaps."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0 and x.shape[1] * x.element_size() % 16 == 0


class _ExpertFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor | None,
        product: ExpertProduct,
        run: Callable[[], Tensor],
        recipe: Recipe,
    ) -> Tensor:
        ctx.product, ctx.make, ctx.x_dtype, ctx.shape = product, recipe.make, x.dtype, x.shape
        ctx.values = None if values is None else (values.dtype, values.numel())
        ctx.save_for_backward(*(recipe.tensors if ctx.needs_input_grad[1] else ()))
        return run()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        product: ExpertProduct = ctx.product
        grad, grad_x, grad_values = grad.reshape(ctx.shape[0], product.outputs), None, None
        if ctx.needs_input_grad[0]:
            grad_x = product.input_grad(grad).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            dtype, entries = ctx.values
            x = ctx.make(*ctx.saved_tensors).reshape(ctx.shape).to(grad.dtype)
            grad_values = product.support_grad(grad, x, entries)
            if product.scale != 1:
                # of one expert an observer may have kept it
                one = isinstance(product.routing, OneExpert)
                grad_values = grad_values * product.scale if one else grad_values.mul_(product.scale)
            grad_values = grad_values.to(dtype)
            product.source.after_backward()
        return grad_x, grad_values, None, None, None


def expert_product(
    x: Tensor,
    values: Tensor | None,
    product: ExpertProduct,
    run: Callable[[], Tensor] | None = None,
    recipe: Recipe | None = None,
) -> Tensor:
    """The product of routed tokens with experts' effective weights, with gradients for ``x`` and ``values``.

    Args:
        x: ``(rows, in)``, the routed tokens.
        values: ``(entries,)`` trained, of which the source adds ``product.scale`` times as much to the weights; None
            for the base weights alone.
        product: the product.
        run: computes the result where the base's own function can, of any shape that is ``(rows, out)`` without its
            ones; by default experts multiply their tokens one after the other.
        recipe: of ``x`` in backward; by default ``x`` itself is kept.

    Returns:
        The result of ``run``, or ``(rows, out)``.
    """
    run = run or (lambda: product.forward(x))
    if not torch.is_grad_enabled():
        return run()
    return _ExpertFunction.apply(x, values, product, run, recipe or Recipe(_same, (x,)))


def _same(x: Tensor) -> Tensor:
    return x


class _DenseExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, source: ExpertSource, places: Sequence[Tensor], scale: float
    ) -> Tensor:
        ctx.source, ctx.dtype, ctx.scale = source, values.dtype, scale
        ctx.save_for_backward(*places)
        return weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        values = grad.reshape(-1).index_select(0, places).mul_(ctx.scale).to(ctx.dtype)
        ctx.source.after_backward()
        return values, None, None, None, None


def dense_experts(
    values: Tensor | None, source: ExpertSource, support: Support | None, numbers: Sequence[int], scale: float = 1.0
) -> Tensor:
    """Experts' effective weights as a tensor ``(len(numbers), rows, cols)`` of its own, differentiable.

    For functions of the base that are no products; their gradient of these weights is dense.

    Args:
        values: ``(entries,)`` of the experts ``numbers``, which are one or all.
        source: of the weights.
        support: of all experts' entries.
        numbers: of the experts.
        scale: factor between the values and the delta.
    """
    with torch.no_grad():
        panels = [panel for number in numbers for _, _, panel in source.expert(number).panels(source.dtype)]
        rows, cols = source.expert(0).shape
        weight = torch.cat(panels).view(len(numbers), rows, cols)
    if values is None or support is None or not torch.is_grad_enabled():
        return weight
    places = support.indices if len(numbers) > 1 else expert_parts(support, source.experts)[numbers[0]][0].indices
    return _DenseExpert.apply(values, weight, source, (places,), scale)
