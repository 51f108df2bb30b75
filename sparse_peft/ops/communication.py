"""Sums and gathers over the processes that share one layer, with gradients.

The processes of a tensor-parallel group have the same batch and the same loss. A product that each of them computes a
part of is one product, so gradients of what all of them have are sums of their parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Group = dist.ProcessGroup


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        return _summed(part, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, features: int, group: Group) -> Tensor:
        ctx.range = feature_range(features, group)
        return gather_features(part, features, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        start, stop = ctx.range
        return grad[..., start:stop].contiguous(), None, None


class _OwnFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.features, ctx.group = x.shape[-1], group
        start, stop = feature_range(x.shape[-1], group)
        return x[..., start:stop].contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_features(grad, ctx.features, ctx.group), None


class _OwnEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, slots: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.size = group, values.numel()
        ctx.save_for_backward(slots)
        return values.index_select(0, slots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return _summed(grad.new_zeros(ctx.size).index_copy_(0, slots, grad), ctx.group), None, None


def _summed(part: Tensor, group: Group) -> Tensor:
    total = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def feature_range(features: int, group: Group) -> tuple[int, int]:
    """The first and the last + 1 of the features that this process has, as torch chunks them."""
    each, rank = -(-features // dist.get_world_size(group)), dist.get_rank(group)
    return min(rank * each, features), min((rank + 1) * each, features)


def gather_features(part: Tensor, features: int, group: Group) -> Tensor:
    """All processes' parts ``(..., own features)`` side by side, ``(..., features)``; without a gradient."""
    size = dist.get_world_size(group)
    each = -(-features // size)
    padded = F.pad(part.detach(), (0, each - part.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat(parts, dim=-1)[..., :features]


def sum_gradients(x: Tensor, group: Group) -> Tensor:
    """``x``, which all processes have, each of which computes a part of what follows from it."""
    return _SumGradients.apply(x, group) if torch.is_grad_enabled() and x.requires_grad else x


def sum_parts(part: Tensor, group: Group) -> Tensor:
    """The sum of the processes' parts, on each of them."""
    return _SumParts.apply(part, group)


def gathered_features(part: Tensor, features: int, group: Group) -> Tensor:
    """``gather_features`` with a gradient."""
    return _GatherFeatures.apply(part, features, group)


def own_features(x: Tensor, group: Group) -> Tensor:
    """This process's part of features ``(..., features)`` that all processes have."""
    return _OwnFeatures.apply(x, group)


def own_entries(values: Tensor, slots: Tensor, group: Group) -> Tensor:
    """``values[slots]``; the gradient of ``values`` has the entries of all processes.

    Args:
        values: ``(entries,)``, the same on all processes.
        slots: int64, of the entries that this process computes with; no two processes have one in common.
        group: the processes.
    """
    return _OwnEntries.apply(values, slots, group)
