"""Activations as matrices of tokens, and products summed over the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .panels import panels


def flatten_tokens(x: Tensor) -> Tensor:
    """``(..., features)`` as ``(tokens, features)``.

    Example:
        >>> import torch
        >>> from sparse_peft.numerics import flatten_tokens
        >>> tuple(flatten_tokens(torch.zeros(2, 3, 5)).shape)
        (6, 5)
    """
    return x.reshape(-1, x.shape[-1])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float32 for half precision, otherwise the dtype itself.

    Example:
        >>> import torch
        >>> from sparse_peft.numerics import accumulation_dtype
        >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right``, summed over the tokens in at least float32.

    Half precision is cast a tile of tokens at a time, on GPUs not at all: their products accumulate in float32.

    Args:
        left: ``(tokens, rows)``.
        right: ``(tokens, cols)``.

    Returns:
        ``(rows, cols)`` in float32, or float64 if one of the two is float64.

    Example:
        >>> import torch
        >>> from sparse_peft.numerics import transposed_product
        >>> left, right = torch.ones(4, 2, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16)
        >>> product = transposed_product(left, right)
        >>> tuple(product.shape), product.dtype
        ((2, 3), torch.float32)
    """
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    if left.dtype == right.dtype == dtype:
        return left.t() @ right
    if left.is_cuda and left.dtype == right.dtype:
        return torch.mm(left.t(), right, out_dtype=dtype)
    product = torch.zeros(left.shape[1], right.shape[1], dtype=dtype, device=left.device)
    for start, stop in panels(left.shape[0], max(left.shape[1], right.shape[1]) * dtype.itemsize):
        product.addmm_(left[start:stop].to(dtype).t(), right[start:stop].to(dtype))
    return product
