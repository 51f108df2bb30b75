"""The closest Monarch matrix of a dense one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...constraints import Count, validated
from ...ops import monarch_dense, monarch_projection


class MonarchFactors(NamedTuple):
    """A Monarch matrix ``(outputs, inputs)``.

    Attributes:
        A: ``(nblocks, blk_r, p)``, ``p`` being the inputs of a block.
        B: ``(nblocks, s, blk_r)``, ``s`` being the outputs of one.
        shape: ``(outputs, inputs)``.

    Example:
        >>> import torch
        >>> from sparse_peft import MonarchFactors
        >>> MonarchFactors(torch.ones(2, 1, 3), torch.ones(2, 2, 1), (4, 6)).to_dense().shape
        torch.Size([4, 6])
    """

    A: Tensor
    B: Tensor
    shape: tuple[int, int]

    def to_dense(self) -> Tensor:
        """The matrix itself, to go on with a dense weight."""
        return monarch_dense(self.A, self.B, self.shape[1], self.shape[0])


def monarch_project(weight: Tensor, nblocks: int = 4, blk_r: int = 4) -> MonarchFactors:
    """The Monarch matrix that is closest to a dense weight, in the Frobenius norm.

    Its relative error is the root of the share of the squared singular values, of all parts that a pair of blocks
    covers, that is left out (Dao et al. 2022, section 3.2, https://arxiv.org/abs/2204.00595; here for weights of any
    shape and blocks of any rank).

    Args:
        weight: ``(outputs, inputs)`` floats.
        nblocks: number of blocks of each factor.
        blk_r: rank of a block.

    Raises:
        ValueError: no matrix, or sizes below 1.
        TypeError: a weight that is not of floats.

    Example:
        >>> import torch
        >>> from sparse_peft import monarch_project
        >>> weight = torch.randn(32, 64)
        >>> factors = monarch_project(weight, nblocks=4, blk_r=32)  # blocks of full rank
        >>> bool(torch.allclose(factors.to_dense(), weight, atol=1e-5))
        True
    """
    validated("nblocks", nblocks, Count)
    validated("blk_r", blk_r, Count)
    if weight.ndim != 2:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: a matrix (outputs, inputs) is expected")
    if not weight.is_floating_point():
        raise TypeError(f"weight of dtype {weight.dtype}: floats are expected; dequantise it first")
    first, second = monarch_projection(weight, nblocks, blk_r)
    return MonarchFactors(first, second, (weight.shape[0], weight.shape[1]))
