"""The gradient of a weight matrix at the entries of a support, without the dense gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics.tokens import accumulation_dtype, transposed_product
from ..support import ChannelSupport, Support
from .gradient_observers import UNOBSERVED, observer_of
from .gradient_paths import grad_by_path
from .one_hot import Factor, OneHot, row_grad
from .plans import plan_support_grad


def support_grad(left: Factor, right: Tensor, support: Support) -> Tensor:
    """``(left.T @ right)`` at the entries of a support.

    Args:
        left: ``(tokens, rows)``: the output gradient of a Linear layer; one-hot for an embedding's ids.
        right: ``(tokens, cols)``, same dtype: the input of a Linear layer; the output gradient of an embedding.
        support: of the stored weight ``(rows, cols)``.

    Returns:
        ``(entries,)`` in float32 (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> from sparse_peft.ops import support_grad
        >>> from sparse_peft.support import Support
        >>> grad, x = torch.ones(3, 2), torch.arange(6.0).view(3, 2)
        >>> support_grad(grad, x, Support((2, 2), torch.tensor([1, 2])))
        tensor([9., 6.])
    """
    if left.shape[0] == 0 or support.nnz == 0:
        return torch.zeros(support.nnz, dtype=accumulation_dtype(right.dtype), device=left.device)
    if isinstance(left, OneHot):
        return row_grad(left, right, support)
    if isinstance(support, ChannelSupport):
        if support.dim == 0:
            return transposed_product(left.index_select(1, support.lines), right).reshape(-1)
        return transposed_product(left, right.index_select(1, support.lines)).reshape(-1)
    return grad_by_path(plan_support_grad(support, left.dtype, left.device).path, left, right, support)


def observed_support_grad(left: Factor, right: Tensor, support: Support, key: int = UNOBSERVED) -> Tensor:
    """``support_grad``, passed through the layer's observer if it has one.

    Args:
        left, right, support: as in ``support_grad``.
        key: of the layer.
    """
    observer = observer_of(key)
    if observer is None:
        return support_grad(left, right, support)
    # backward may run inside the caller's autocast, which would round the observer's products
    with torch.autocast(left.device.type, enabled=False):
        return observer.support_grad(left, right, support)
