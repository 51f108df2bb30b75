"""The ops as nodes of compiled graphs: ``torch.ops.sparse_peft.*``, with schemas and fakes.

Eager code calls the functions directly. Autograd is defined in functions over these ops, where ``F.linear`` stays
visible to the compiler. The ops need no autocast rules: they run below autograd, on operands that are cast already.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics.tokens import accumulation_dtype
from ..support import ChannelSupport, ExpertColumns, Support
from .codes import code_gather as _code_gather
from .codes import code_scatter_add as _code_scatter_add
from .delta_matmul import delta_matmul_add_ as _delta_matmul_add_
from .embedding import EmbeddingProduct, set_row_entries_
from .entries import restore_ as _restore_
from .entries import resync_ as _resync_
from .entries import scatter_add_ as _scatter_add_
from .entries import take_ as _take_
from .masked_dw import masked_dw as _masked_dw
from .support_grad import observed_support_grad

# Supports of layers, by the address of their positions: a graph passes tensors, but the structure and the plan of a
# support must not be computed again in every step.
_supports: weakref.WeakValueDictionary[int, Support] = weakref.WeakValueDictionary()


def _positions(support: Support) -> Tensor:
    return support.channels if isinstance(support, ChannelSupport | ExpertColumns) else support.stored[-1]


def remember(support: Support) -> None:
    """Let compiled graphs find a support by its positions or channels while it is alive."""
    if not isinstance(support, ChannelSupport | ExpertColumns) and support.device.type != "cpu":
        _ = support.indices  # kept there; a graph, which asks for them, keeps nothing
    _supports[_positions(support).data_ptr()] = support


def recall(shape: tuple[int, int], positions: Tensor) -> Support | None:
    """The support that has these very positions or channels; None if none is known."""
    support = _supports.get(positions.data_ptr())
    if support is None or support.shape != shape or _positions(support).numel() != positions.numel():
        return None
    return support


def _recall(shape: tuple[int, int], stored: Sequence[Tensor]) -> Support:
    return recall(shape, stored[-1]) or Support.of_stored(shape, stored)


@torch.library.custom_op("sparse_peft::support_grad", mutates_args=())
def support_grad(left: Tensor, right: Tensor, stored: Sequence[Tensor], rows: int, columns: int, key: int) -> Tensor:
    """``support_grad``, passed through the observer under ``key``."""
    return observed_support_grad(left, right, _recall((rows, columns), stored), key)


@support_grad.register_fake
def _(left: Tensor, right: Tensor, stored: Sequence[Tensor], rows: int, columns: int, key: int) -> Tensor:
    return left.new_empty(stored[-1].shape, dtype=accumulation_dtype(left.dtype))


@torch.library.custom_op("sparse_peft::masked_dw", mutates_args=())
def masked_dw(
    left: Tensor, right: Tensor, stored: Sequence[Tensor], rows: int, columns: int, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``masked_dw``, registered with torch."""
    return _masked_dw(left, right, _recall((rows, columns), stored), limit)


@masked_dw.register_fake
def _(
    left: Tensor, right: Tensor, stored: Sequence[Tensor], rows: int, columns: int, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(left.dtype)
    gradients = [left.new_empty(count, dtype=dtype) for count in (stored[-1].shape[0], limit)]
    return gradients[0], left.new_empty(limit, dtype=torch.int64), gradients[1]


@torch.library.custom_op("sparse_peft::embedding_rows", mutates_args=())
def embedding_rows(ids: Tensor, weight: Tensor, entries: Tensor, stored: Sequence[Tensor]) -> Tensor:
    """Rows of a weight, looked up by ids, with the entries of a support set in them."""
    rows = torch.nn.functional.embedding(ids, weight)
    support = _recall((weight.shape[0], weight.shape[1]), stored)
    set_row_entries_(rows.view(-1, weight.shape[1]), ids.reshape(-1).long(), entries, support)
    return rows


@embedding_rows.register_fake
def _(ids: Tensor, weight: Tensor, entries: Tensor, stored: Sequence[Tensor]) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


@torch.library.custom_op("sparse_peft::embedding_grad", mutates_args=())
def embedding_grad(
    ids: Tensor,
    grad: Tensor,
    stored: Sequence[Tensor],
    rows: int,
    padding: int,
    by_frequency: bool,
    key: int,
) -> Tensor:
    """The gradient of an embedding's weight at a support, passed through the observer under ``key``."""
    support = _recall((rows, grad.shape[-1]), stored)
    return EmbeddingProduct(rows, padding, by_frequency).support_grad(grad, ids, support, key)


@embedding_grad.register_fake
def _(
    ids: Tensor,
    grad: Tensor,
    stored: Sequence[Tensor],
    rows: int,
    padding: int,
    by_frequency: bool,
    key: int,
) -> Tensor:
    return grad.new_empty(stored[-1].shape, dtype=accumulation_dtype(grad.dtype))


delta_matmul_add_ = torch.library.custom_op("sparse_peft::delta_matmul_add_", _delta_matmul_add_, mutates_args={"out"})
scatter_add_ = torch.library.custom_op("sparse_peft::scatter_add_", _scatter_add_, mutates_args={"weight"})
take_ = torch.library.custom_op("sparse_peft::take_", _take_, mutates_args={"originals"})
resync_ = torch.library.custom_op("sparse_peft::resync_", _resync_, mutates_args={"weights"})
restore_ = torch.library.custom_op("sparse_peft::restore_", _restore_, mutates_args={"weights"})
for _op in (delta_matmul_add_, scatter_add_, take_, resync_, restore_):
    _op.register_fake(lambda *args: None)

code_gather = torch.library.custom_op("sparse_peft::code_gather", _code_gather, mutates_args=())
code_scatter_add = torch.library.custom_op("sparse_peft::code_scatter_add", _code_scatter_add, mutates_args=())


@code_gather.register_fake
def _(codebook: Tensor, codes: Tensor, bits: int, cols: int, dtype: torch.dtype) -> Tensor:
    return codebook.new_empty(codebook.shape[0], cols, dtype=dtype)


@code_scatter_add.register_fake
def _(grad: Tensor, codes: Tensor, bits: int, groups: int) -> Tensor:
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.new_empty(grad.shape[0], groups, 1 << bits, dtype=dtype)
