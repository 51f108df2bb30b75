"""Monarch matrices: products of two block-diagonal matrices with a fixed permutation between them.

Monarch (Dao et al. 2022, section 3, https://arxiv.org/abs/2204.00595), here with blocks of any rank and of any shape,
as in MoRe (https://arxiv.org/abs/2408.17383). With ``n`` blocks of rank ``q`` the factors are ``first`` ``(n, q, p)``
and ``second`` ``(n, s, q)``. Block ``k`` of the first maps ``p`` inputs to ``q`` numbers; block ``l`` of the second
reads those of the ``n * q`` numbers whose index is ``l`` modulo ``n``. Its output ``s`` is output ``s * n + l`` of the
whole. ``p`` and ``s`` are the inputs and outputs divided by ``n``, rounded up; padding is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def block_sizes(inputs: int, outputs: int, nblocks: int) -> tuple[int, int]:
    """``(p, s)``: inputs of a block of the first factor, outputs of one of the second."""
    return math.ceil(inputs / nblocks), math.ceil(outputs / nblocks)


def monarch_product(x: Tensor, first: Tensor, second: Tensor, outputs: int) -> Tensor:
    """A Monarch matrix times vectors, by two batched products; the matrix is never formed.

    Args:
        x: ``(..., inputs)``.
        first: ``(n, q, p)``, with ``n * p`` at least the inputs.
        second: ``(n, s, q)``.
        outputs: at most ``n * s``.

    Returns:
        ``(..., outputs)``.

    Example:
        >>> import torch
        >>> from sparse_peft.ops import monarch_product
        >>> monarch_product(torch.ones(3, 10), torch.ones(4, 2, 3), torch.ones(4, 2, 2), 7).shape
        torch.Size([3, 7])
    """
    nblocks, rank, width = first.shape
    inputs = x.shape[-1]
    missing = nblocks * width - inputs
    # torch copies also where nothing is padded, and layers of one input would keep a copy each
    flat = (pad(x, (0, missing)) if missing else x).reshape(-1, nblocks, width)
    middle = torch.bmm(flat.transpose(0, 1), first.transpose(1, 2))  # (n, tokens, q)
    mixed = middle.transpose(0, 1).reshape(-1, rank, nblocks).permute(2, 0, 1)
    out = torch.bmm(mixed, second.transpose(1, 2)).permute(1, 2, 0)  # (tokens, s, n)
    return out.flatten(1)[:, :outputs].reshape(*x.shape[:-1], outputs)


def monarch_factors(first: Tensor, second: Tensor, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """The same matrix as thin factors ``(n * q, inputs)`` and ``(outputs, n * q)``, most of whose entries are zero."""
    nblocks, rank, _ = first.shape
    down = torch.block_diag(*first)[:, :inputs]
    up = first.new_zeros(second.shape[1], nblocks, rank, nblocks)
    each = torch.arange(nblocks, device=first.device)
    up[:, each, :, each] = second
    return down, up.reshape(-1, rank * nblocks)[:outputs]


def monarch_dense(first: Tensor, second: Tensor, inputs: int, outputs: int) -> Tensor:
    """The matrix itself, ``(outputs, inputs)``."""
    down, up = monarch_factors(first, second, inputs, outputs)
    return up @ down


def _places(nblocks: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``(n * q,)`` of each number between the factors: its first block, its second, and how many before have both."""
    number = torch.arange(nblocks * rank, device=device)
    first, second = number // rank, number % nblocks
    both = first * nblocks + second
    before = torch.tril(both[:, None] == both, diagonal=-1).sum(1)
    return first, second, before


def monarch_projection(weight: Tensor, nblocks: int, rank: int) -> tuple[Tensor, Tensor]:
    """The Monarch matrix that is closest to a dense one, in the Frobenius norm.

    The pair of blocks ``(l, k)`` of the factors covers a part of the matrix of its own, and has it with a low rank; a
    singular value decomposition of each part is therefore the optimum.

    Args:
        weight: ``(outputs, inputs)``.
        nblocks: ``n``.
        rank: ``q``.

    Returns:
        ``(n, q, p)`` and ``(n, s, q)``, float32, or float64 for a weight in float64.
    """
    outputs, inputs = weight.shape
    width, height = block_sizes(inputs, outputs, nblocks)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    padded = pad(wide, (0, nblocks * width - inputs, 0, nblocks * height - outputs))
    parts = padded.view(height, nblocks, nblocks, width).permute(1, 2, 0, 3)  # (l, k, s, p)
    first_block, second_block, order = _places(nblocks, rank, weight.device)
    u, sigma, vh = torch.linalg.svd(parts, full_matrices=False)
    known = order < sigma.shape[-1]  # a part may have fewer singular values than ranks
    place = second_block, first_block, order.clamp(max=sigma.shape[-1] - 1)
    root = sigma[place].sqrt() * known
    down = vh[place] * root[:, None]  # (n * q, p)
    up = u.transpose(2, 3)[place] * root[:, None]  # (n * q, s)
    first = down.view(nblocks, rank, width)
    second = up.view(rank, nblocks, height).permute(1, 2, 0)
    return first, second.contiguous()


def monarch_sum(parts: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The exact weighted sum of Monarch matrices with equal numbers of blocks, as one with a higher rank.

    Args:
        parts: factors ``(n, q, p)`` and ``(n, s, q)`` of each; the ranks may differ.
        weights: one number for each.

    Returns:
        Factors of rank ``n * t``, ``t`` being the ranks that the matrices have for a pair of blocks, together.
    """
    nblocks, _, width = parts[0][0].shape
    height = parts[0][1].shape[1]
    ranks = [math.ceil(first.shape[1] / nblocks) for first, _ in parts]
    total = sum(ranks)
    first = parts[0][0].new_zeros(nblocks, total, nblocks, width)  # (k, number of the pair, l, p)
    second = parts[0][1].new_zeros(nblocks, height, nblocks, total)  # (l, s, k, number of the pair)
    start = 0
    for (down, up), weight, count in zip(parts, weights, ranks, strict=True):
        rank = down.shape[1]
        lower, upper, order = _places(nblocks, rank, down.device)
        first[lower, order + start, upper] = down.reshape(-1, width)
        second[upper, :, lower, order + start] = up.permute(2, 0, 1).reshape(-1, height) * weight
        start += count
    return first.flatten(1, 2), second.flatten(2)
