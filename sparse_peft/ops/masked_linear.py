"""A layer whose weight is masked: ``mask * (base + delta)``, formed and differentiated one panel of rows at a time.

With ``F`` the mask's values, 1 where a weight stays and ``beta`` where not, the weight is

    ``scale * F * (base + sum of deltas) + sum of deltas outside of the mask + residual``.

A delta is the sum of its parts: low-rank factors, single entries, a dense matrix. Only the input and trained tensors
are saved for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..numerics.bits import unpack_bits
from ..numerics.panels import panels
from ..numerics.tokens import accumulation_dtype
from ..support import Support
from .entries import add_to_support_, read_support
from .products import LinearProduct, MatrixProduct

TRAINED = (
    "down", "up", "values", "dense", "score_down", "score_up", "score_rows", "score_cols", "residual", "log_scale",
)  # fmt: skip
"""Names of what can train."""


@dataclass(frozen=True)
class MaskedPart:
    """One adapter's part of a masked weight ``(outputs, inputs)``.

    Attributes:
        tensors: some of ``TRAINED``: ``down`` ``(r, inputs)`` and ``up`` ``(outputs, r)``; ``values`` ``(entries,)``;
            ``dense`` ``(outputs, inputs)``; ``score_down``, ``score_up``, ``score_rows`` ``(outputs,)`` and
            ``score_cols`` ``(inputs,)`` of the mask's scores; ``residual`` ``(outputs, ceil(inputs / group))``, one
            number for each run of inputs; ``log_scale`` ``(outputs,)``. Differentiable.
        mask: ``(outputs, ceil(inputs / 8))`` uint8: packed bits of the weights that stay.
        beta: 0-d: the mask's value where its bit is not set.
        outside: whether the delta is added behind the mask.
        straight: whether the delta's gradient ignores the mask (straight-through).
        back_mask: packed bits of the mask in the product with the output's gradient; None for ``mask``.
        support: of the values.
        group: inputs of a run of the residual.
    """

    tensors: Mapping[str, Tensor]
    mask: Tensor
    beta: Tensor
    outside: bool = False
    straight: bool = False
    back_mask: Tensor | None = None
    support: Support | None = None
    group: int = 1

    def flow(self, start: int, stop: int, cols: int, dtype: torch.dtype, backward: bool = False) -> Tensor:
        """``(stop - start, cols)`` values of the mask."""
        packed = self.back_mask if backward and self.back_mask is not None else self.mask
        kept = unpack_bits(packed[start:stop], cols)
        return torch.where(kept, torch.ones((), dtype=dtype, device=kept.device), self.beta.to(dtype))

    def add_delta_(self, total: Tensor, tensors: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Add rows ``start`` to ``stop`` of the delta."""
        if "down" in tensors:
            total.addmm_(tensors["up"][start:stop].to(total.dtype), tensors["down"].to(total.dtype))
        if self.support is not None and "values" in tensors:
            within, first, last = self.support.of_rows(start, stop)
            add_to_support_(total, within, tensors["values"][first:last].to(total.dtype))
        if "dense" in tensors:
            total += tensors["dense"][start:stop]

    def scores(self, inside: Tensor, start: int, stop: int) -> Tensor:
        """Rows of the mask's scores, from the rows of base plus delta: magnitude, plus what is learned."""
        scores, tensors = inside.abs(), self.tensors
        if "score_rows" in tensors:
            scores.addmm_(tensors["score_up"][start:stop].to(scores.dtype), tensors["score_down"].to(scores.dtype))
            scores += tensors["score_rows"][start:stop, None]
            scores += tensors["score_cols"]
        return scores

    def reduce_(self, rate: Tensor, tensors: Mapping[str, Tensor], start: int, stop: int, grads: Grads) -> None:
        """Add what a gradient of the delta's rows is for its tensors."""
        if "down" in tensors:
            grads["up"][start:stop] += rate @ tensors["down"].to(rate.dtype).t()
            grads["down"].addmm_(tensors["up"][start:stop].to(rate.dtype).t(), rate)
        if self.support is not None and "values" in tensors:
            within, first, last = self.support.of_rows(start, stop)
            grads["values"][first:last] += read_support(rate, within)
        if "dense" in tensors:
            grads["dense"][start:stop] += rate

    def reduce_scores_(self, rate: Tensor, tensors: Mapping[str, Tensor], start: int, stop: int, grads: Grads) -> None:
        """Likewise for a gradient of the scores' rows."""
        grads["score_up"][start:stop] += rate @ tensors["score_down"].to(rate.dtype).t()
        grads["score_down"].addmm_(tensors["score_up"][start:stop].to(rate.dtype).t(), rate)
        grads["score_rows"][start:stop] += rate.sum(1)
        grads["score_cols"] += rate.sum(0)


Grads = dict[str, Tensor]
Trained = Sequence[Mapping[str, Tensor]]  # of each part


@dataclass(frozen=True)
class MaskedWeight:
    """A masked weight.

    Attributes:
        shape: ``(outputs, inputs)``.
        base: ``base(start, stop)``: rows of the base weight, in any float dtype.
        parts: of the adapters that act together: their deltas add up, and their masks multiply.
        product: of the layer; its weight is the matrix ``(outputs, inputs)``.
        minus_base: subtract the base weight from the result.
    """

    shape: tuple[int, int]
    base: Callable[[int, int], Tensor]
    parts: tuple[MaskedPart, ...]
    product: MatrixProduct = field(default=LinearProduct(1))
    minus_base: bool = False

    def bounds(self, dtype: torch.dtype) -> list[tuple[int, int]]:
        """Panels that some temporaries of them fit the limit."""
        return panels(self.shape[0], 4 * self.shape[1] * accumulation_dtype(dtype).itemsize)

    def inside(self, trained: Trained, start: int, stop: int) -> Tensor:
        """Rows of what the mask acts on, base plus deltas, in at least float32; a new tensor."""
        base = self.base(start, stop)
        total = base.to(self.wide(trained), copy=True, memory_format=torch.contiguous_format)
        for part, tensors in zip(self.parts, trained, strict=True):
            if not part.outside:
                part.add_delta_(total, tensors, start, stop)
        return total

    def wide(self, trained: Trained) -> torch.dtype:
        """The dtype to compute in: at least float32, and that of all that is added up."""
        kinds = (tensor.dtype for tensors in trained for tensor in tensors.values())
        return reduce(torch.promote_types, kinds, torch.promote_types(self.base(0, 0).dtype, torch.float32))

    def zero_grads(self, trained: Trained) -> list[Grads]:
        """Zeros for ``reduce_``."""
        dtype = self.wide(trained)
        return [{name: torch.zeros_like(t, dtype=dtype) for name, t in tensors.items()} for tensors in trained]

    def flow(self, start: int, stop: int, dtype: torch.dtype, backward: bool = False) -> Tensor:
        """Rows of the product of the masks' values."""
        cols = self.shape[1]
        flow = self.parts[0].flow(start, stop, cols, dtype, backward)
        for part in self.parts[1:]:
            flow *= part.flow(start, stop, cols, dtype, backward)
        return flow

    def scale(self, trained: Trained, start: int, stop: int, like: Tensor) -> Tensor | None:
        """``(stop - start, 1)`` factor of each output; None for 1."""
        logs = [tensors["log_scale"][start:stop] for tensors in trained if "log_scale" in tensors]
        return sum(logs[1:], logs[0]).to(like.dtype).exp()[:, None] if logs else None

    def rows(self, trained: Trained, start: int, stop: int, backward: bool = False) -> Tensor:
        """Rows of the weight, in at least float32."""
        total = self.inside(trained, start, stop)
        total *= self.flow(start, stop, total.dtype, backward)
        scale = self.scale(trained, start, stop, total)
        if scale is not None:
            total *= scale
        for part, tensors in zip(self.parts, trained, strict=True):
            if part.outside:
                part.add_delta_(total, tensors, start, stop)
            if "residual" in tensors:
                total += tensors["residual"][start:stop].repeat_interleave(part.group, 1)[:, : self.shape[1]]
        return total.sub_(self.base(start, stop)) if self.minus_base else total

    def reduce_(self, grad: Tensor, trained: Trained, start: int, stop: int, grads: Sequence[Grads]) -> None:
        """Add what a gradient of the weight's rows, ``grad``, is for the trained tensors."""
        inside = self.inside(trained, start, stop)
        grad, flow = grad.to(inside.dtype), self.flow(start, stop, inside.dtype)
        scale = self.scale(trained, start, stop, inside)
        scaled = grad if scale is None else grad * scale
        for part, tensors, own in zip(self.parts, trained, grads, strict=True):
            if "log_scale" in own:
                own["log_scale"][start:stop] += (scaled * inside * flow).sum(1)
            if "residual" in own:
                own["residual"][start:stop] += sums_of_runs(grad, part.group)
            rate = grad
            if not part.outside:
                rate = scaled.clone() if part.straight else scaled * flow
            if "score_rows" in own:
                of_scores = scaled * inside
                part.reduce_scores_(of_scores, tensors, start, stop, own)
                rate += of_scores * inside.sign()
            part.reduce_(rate, tensors, start, stop, own)


def sums_of_runs(matrix: Tensor, group: int) -> Tensor:
    """``(rows, ceil(cols / group))`` sums of each run of ``group`` columns."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % group))
    return padded.view(matrix.shape[0], -1, group).sum(2)


@dataclass(frozen=True)
class _Panels:
    """The weight in panels for the product."""

    weight: MaskedWeight
    trained: Trained
    backward: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop in self.weight.bounds(dtype):
            yield start, stop, self.weight.rows(self.trained, start, stop, self.backward).to(dtype)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: MaskedWeight, *flat: Tensor) -> Tensor:
        ctx.weight, ctx.shape = weight, x.shape
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *flat)
        return weight.product.forward(x, _Panels(weight, _unflatten(weight, flat)), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *flat = ctx.saved_tensors
        weight: MaskedWeight = ctx.weight
        trained, product = _unflatten(weight, flat), ctx.weight.product
        grad_x = grad_bias = None
        grads: list[Tensor | None] = [None] * len(flat)
        if ctx.needs_input_grad[0]:
            grad_x = product.input_grad(grad, _Panels(weight, trained, backward=True), ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_bias = product.bias_grad(grad)
        if any(ctx.needs_input_grad[3:]):
            totals = weight.zero_grads(trained)
            for start, stop in weight.bounds(grad.dtype):
                dense = product.matrix_grad(product.part(grad, start * product.taps, stop * product.taps), x)
                weight.reduce_(dense, trained, start, stop, totals)
            found = [totals[number][name] for number, part in enumerate(weight.parts) for name in part.tensors]
            grads = [total.to(tensor.dtype) for total, tensor in zip(found, flat, strict=True)]
        return grad_x, grad_bias, None, *grads


def _unflatten(weight: MaskedWeight, flat: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    tensors = iter(flat)
    return [{name: next(tensors) for name in part.tensors} for part in weight.parts]


def masked_linear(x: Tensor, bias: Tensor | None, weight: MaskedWeight) -> Tensor:
    """The output of a layer with a masked weight, without temporaries larger than a panel.

    Args:
        x: the layer's input, in the dtype to multiply in.
        bias: ``(outputs,)`` in ``x``'s dtype, or None.
        weight: see ``MaskedWeight``; gradients reach the tensors of its parts.

    Returns:
        The output, in ``x``'s dtype.
    """
    product = weight.product
    flat = [tensor for part in weight.parts for tensor in part.tensors.values()]
    return product.leave(_MaskedLinear.apply(product.enter(x), bias, weight, *flat), x)
