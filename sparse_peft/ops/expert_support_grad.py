"""The gradient of fused experts' weights at a support, each expert's from the tokens routed to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics.panels import panels
from ..numerics.tokens import accumulation_dtype
from ..support import Support
from . import triton_kernels
from .backends import forced_backend, kernel_backend
from .gradient_observers import UNOBSERVED, any_observed
from .gradient_paths import TokenGroups, sample_, sampled_tile
from .plans import plan_support_grad
from .support_grad import observed_support_grad
from .transposed import token_contiguous

ExpertParts = list[tuple[Support, int, int]]
ONE_BY_ONE = "experts"  # the path that forms each expert's gradient by the expert's own path


def expert_support_grad(
    left: Tensor, right: Tensor, ends: Tensor, support: Support, experts: int, key: int = UNOBSERVED
) -> Tensor:
    """``(left.T @ right)`` of each expert's tokens, at the entries of a support.

    Args:
        left: ``(tokens, rows)``, sorted by expert; ``rows`` of one expert's stored matrix.
        right: ``(tokens, cols)``, same order and dtype.
        ends: ``(experts,)`` integers: the token after each expert's last. Tokens after all of these are not read.
        support: of the stored weight ``(experts * rows, cols)``.
        experts: their number.
        key: of the first expert, for observers.

    Returns:
        ``(entries,)`` in float32 (float64 for float64 inputs), zero for experts without tokens.

    Example:
        >>> import torch
        >>> from sparse_peft.ops import expert_support_grad
        >>> from sparse_peft.support import Support
        >>> grad, x = torch.ones(3, 1), torch.arange(6.0).view(3, 2)
        >>> expert_support_grad(grad, x, torch.tensor([1, 3]), Support((2, 2), torch.tensor([1, 2])), experts=2)
        tensor([1., 6.])
    """
    observed = key != UNOBSERVED and any_observed(key, experts)
    path = ONE_BY_ONE if observed else _path(support, experts, left.dtype, left.device)
    if path == "triton":
        return _by_kernel(left, right, ends, support)
    values = torch.zeros(support.nnz, dtype=accumulation_dtype(left.dtype), device=left.device)
    groups = _groups(expert_parts(support, experts), ends)
    if path == "sampled":
        rows = left.shape[1]
        tile = sampled_tile(rows, right.shape[1], values.dtype)
        sample_(values, left, right, _joined(groups, support, rows, *tile))
        return values
    for expert, part, first, start, stop in groups:
        number = key + expert if observed else UNOBSERVED
        own = observed_support_grad(left[start:stop], right[start:stop], part, number)
        values[first : first + part.nnz] = own
    return values


class _Group(NamedTuple):
    """An expert that has tokens and entries: its support, its first entry, its first token and the one after it."""

    expert: int
    support: Support
    first: int
    start: int
    stop: int


def _groups(parts: ExpertParts, ends: Tensor) -> Iterator[_Group]:
    start = 0
    for expert, stop in enumerate(ends.tolist()):
        part, first, last = parts[expert]
        if stop > start and last > first:
            yield _Group(expert, part, first, start, stop)
        start = stop


def _joined(groups: Iterable[_Group], support: Support, rows: int, most: int, least: int) -> Iterator[TokenGroups]:
    """Neighbouring experts with few tokens each, which take a product together less time than one each.

    Args:
        groups: of the experts.
        support: of all experts.
        rows: of one expert.
        most: tokens in a tile.
        least: tokens that an expert is filled up to; experts with more have a product of their own.
    """
    joined: list[_Group] = []
    for group in groups:
        is_small = group.stop - group.start <= least
        is_next = joined and group.expert == joined[-1].expert + 1 and (len(joined) + 1) * least <= most
        if joined and not (is_small and is_next):
            yield _together(joined, support, rows)
            joined = []
        if is_small:
            joined.append(group)
        else:
            yield _together([group], support, rows)
    if joined:
        yield _together(joined, support, rows)


def _together(groups: list[_Group], support: Support, rows: int) -> TokenGroups:
    first, last = groups[0], groups[-1]
    if first is last:
        return TokenGroups(first.support, first.first, [(first.start, first.stop)])
    stop = last.first + last.support.nnz
    part = support.part(first.expert * rows, (last.expert + 1) * rows, first.first, stop)
    return TokenGroups(part, first.first, [(group.start, group.stop) for group in groups])


def _path(support: Support, experts: int, dtype: torch.dtype, device: torch.device) -> str:
    """The one path of all experts, where they have one that takes several."""
    plans = support.derived.setdefault("expert plans", {})
    key = (experts, forced_backend(), dtype, device)
    if key not in plans:
        parts = [part for part, first, last in expert_parts(support, experts) if last > first]
        paths = {plan_support_grad(part, dtype, device).path for part in parts}
        plans[key] = _common_path(paths, support, dtype, device)
    return plans[key]


def _common_path(paths: set[str], support: Support, dtype: torch.dtype, device: torch.device) -> str:
    if paths == {"sampled"}:
        return "sampled"
    if paths <= {"triton", "cuda"} and type(support) is Support:
        return kernel_backend("expert_support_grad", dtype, device, support.indices.dtype) or ONE_BY_ONE
    return ONE_BY_ONE


def _by_kernel(left: Tensor, right: Tensor, ends: Tensor, support: Support) -> Tensor:
    """One launch for all experts, where the transposed activations fit a panel."""
    values, ends = torch.zeros(support.nnz, dtype=torch.float32, device=left.device), ends.to(left.device)
    kernels = triton_kernels.kernels("expert_support_grad")
    for start, stop in panels(left.shape[0], (left.shape[1] + right.shape[1]) * left.element_size()):
        a = token_contiguous(left[start:stop], left.dtype)
        b = token_contiguous(right[start:stop], right.dtype)
        # tokens are numbered from the first of the tile
        kernels.expert_support_grad_(values, a, b, (ends - start).clamp(0, stop - start), support.indices)
    return values


def expert_parts(support: Support, experts: int) -> ExpertParts:
    """The part of each expert as a support of its ``(rows, cols)``, and the range of its entries; cached."""
    key = f"{experts} experts"
    if key not in support.derived:
        support.derived[key] = _divide(support, experts)
    return support.derived[key]


def _divide(support: Support, experts: int) -> ExpertParts:
    rows = support.shape[0] // experts
    if type(support) is not Support:
        return [support.of_rows(number * rows, (number + 1) * rows) for number in range(experts)]
    ranges = support.entry_ranges([(number * rows, (number + 1) * rows) for number in range(experts)])
    found = []
    for number, (first, last) in enumerate(ranges):
        found.append((support.part(number * rows, (number + 1) * rows, first, last), first, last))
    return found
