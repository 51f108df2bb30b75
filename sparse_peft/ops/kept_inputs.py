"""How a layer's input is kept for the gradient of its values.

In this order: nothing, where the input is a product of tensors that autograd keeps anyway (a norm's output, a gated
activation), which is formed again in backward with the same bits; a rounded copy, where the adapter asks for one; else
the input as the layer multiplies it, one tensor for all layers that have the same input.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from threading import local
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Compression = Literal["bf16", "int8"]
COMPRESSIONS: tuple[str, ...] = get_args(Compression)

BLOCK = 256  # inputs that share a scale, in one row
# Steps of a recipe: more than a norm (a product with its weight, a cast, a product) has.
MOST_STEPS = 8
VIEWS = {"SliceBackward0", "AliasBackward0"}
RESHAPES = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}  # of all numbers, in their order
STEPS = {"MulBackward0", "ToCopyBackward0", *VIEWS, *RESHAPES}
TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.6 has none


class Kept(NamedTuple):
    """What is kept of an input.

    Attributes:
        tensors: for autograd to save.
        restore: the input from these.
    """

    tensors: tuple[Tensor, ...]
    restore: Callable[..., Tensor]


def keep_input(x: Tensor, computed: Tensor, compression: Compression | None, features: Tensor | None = None) -> Kept:
    """What is kept of a layer's input.

    Args:
        x: the input, with the autograd node that made it.
        computed: its values in the dtype that the layer computes in.
        compression: the rounding of what has to be kept.
        features: ``(used,)`` int64, those that are needed of what has to be kept; None for all.
    """
    packing = _packing()
    if packing == "first":
        return Kept((torch.zeros(1, dtype=torch.int64),), _of_second_pass)
    found = None if packing == "unknown" else _recipe_of(x)
    kept = _kept(x, computed, compression, features, found)
    return _note(kept) if packing == "second" else kept


def _kept(
    x: Tensor,
    computed: Tensor,
    compression: Compression | None,
    features: Tensor | None,
    found: tuple[_Recipe, tuple[Tensor, ...]] | None,
) -> Kept:
    if found is not None:
        # what restores the input must not refer to it
        (recipe, leaves), dtype, shape = found, computed.dtype, x.shape
        return Kept(leaves, lambda *saved: recipe.evaluate(iter(saved)).to(dtype).reshape(shape))
    if features is not None:
        computed = computed.index_select(-1, features)
    if compression is None or not computed.is_floating_point():
        return Kept((computed,), _itself)
    return (_as_int8 if compression == "int8" else _as_bfloat16)(computed)


def _itself(x: Tensor) -> Tensor:
    return x


# --------------------------------------------------------------------------------------------------- one cast for all

_thread = local()


def cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in a dtype, without gradient: layers called one after the other with one input get the same tensor."""
    if x.dtype == dtype:
        return x
    known = getattr(_thread, "cast", None)
    if known is not None:
        source, version, result = known[0](), known[1], known[2]()
        if source is x and version == x._version and result is not None and result.dtype == dtype:
            return result
    result = x.detach().to(dtype)
    if not x.is_inference():
        _thread.cast = weakref.ref(x), x._version, weakref.ref(result)
    return result


# ---------------------------------------------------------------------------------------------- gradient checkpointing
#
# A checkpointed block runs twice, and torch keeps for the first pass what the second one saves, one tensor for one. In
# the first, nothing tells whether the second will find a recipe: both save a number, under which the second notes what
# it keeps.

_CHECKPOINT_PASSES = {
    "_checkpoint_hook.__init__.<locals>.pack_hook": "first",
    "_recomputation_hook.__init__.<locals>.pack_hook": "second",
}
_numbers = itertools.count(1)
_noted: dict[int, Kept] = {}  # of blocks that ran again, until the first pass's node asks


def _packing() -> str:
    """What happens to saved tensors: ``"none"``, the ``"first"`` or ``"second"`` pass of a block, or ``"unknown"``.

    Blocks are those of torch's checkpointing without reentry. Its second pass packs nothing.
    """
    if TOP_HOOKS is None:
        return "unknown"
    hooks = TOP_HOOKS(True)
    if hooks is None:
        return "none"
    if getattr(hooks[0], "__module__", None) != "torch.utils.checkpoint":
        return "unknown"
    return _CHECKPOINT_PASSES.get(hooks[0].__qualname__, "unknown")


def _note(kept: Kept) -> Kept:
    """What the second pass keeps, to be found by the node of the first."""
    kept = Kept(tuple(tensor.detach() for tensor in kept.tensors), kept.restore)
    number = next(_numbers)
    saved = torch.tensor([number])
    _noted[number] = kept
    # torch drops it with the graph, also after an error
    weakref.finalize(saved.untyped_storage(), _noted.pop, number, None)
    # for this pass's own node, which only a block that calls backward itself asks
    return Kept((saved,), lambda _: kept.restore(*kept.tensors))


def _of_second_pass(number: Tensor) -> Tensor:
    kept = _noted.pop(int(number))
    return kept.restore(*kept.tensors)


# ------------------------------------------------------------------------------------------------------------ recipes


class _Leaf(NamedTuple):
    """A tensor that autograd keeps anyway; it is not referred to, so that it is freed with the graph."""

    dtype: torch.dtype

    def evaluate(self, saved: Iterator[Tensor]) -> Tensor:
        return next(saved)


class _Product(NamedTuple):
    """The product of two tensors."""

    left: _Leaf | _Product | _Cast
    right: _Leaf | _Product | _Cast
    dtype: torch.dtype

    def evaluate(self, saved: Iterator[Tensor]) -> Tensor:
        left = self.left.evaluate(saved)
        return left * self.right.evaluate(saved)


class _Cast(NamedTuple):
    """A tensor in another dtype."""

    source: _Leaf | _Product | _Cast
    dtype: torch.dtype

    def evaluate(self, saved: Iterator[Tensor]) -> Tensor:
        return self.source.evaluate(saved).to(self.dtype)


_Recipe = _Leaf | _Product | _Cast


def _recipe_of(x: Tensor) -> tuple[_Recipe, tuple[Tensor, ...]] | None:
    """How to form a tensor again from tensors that autograd keeps until it has passed its node, and these tensors.

    Products and casts give the same bits again. Where saved tensors are packed (offloading to the CPU), looking at
    them would unpack them, so nobody may ask there. Nothing is known of a tensor that was changed in place since.
    """
    node = x.grad_fn
    if node is None or node.name() not in STEPS or x._version or x.is_inference():
        return None
    leaves: list[Tensor] = []
    try:
        recipe = _recipe(_before_reshapes(node), MOST_STEPS, leaves)
    except RuntimeError:  # the node has passed its backward, or a tensor it kept was overwritten
        return None
    return None if recipe is None else (recipe, tuple(leaves))


def is_formed_again(x: Tensor) -> bool:
    """Whether a tensor is a product of tensors that autograd keeps, for plans."""
    return TOP_HOOKS is not None and _recipe(_before_reshapes(x.grad_fn), MOST_STEPS, []) is not None


def rounded_bytes(rows: int, width: int, compression: Compression, itemsize: int) -> int:
    """Bytes that are kept of an input ``(rows, width)``, for plans.

    Args:
        rows: tokens.
        width: input features.
        compression: its rounding.
        itemsize: bytes of one of its numbers.
    """
    if compression == "bf16":
        return rows * width * min(2, itemsize)
    blocks = -(-width // min(BLOCK, max(1, width)))
    return rows * (blocks * min(BLOCK, width) + 4 * blocks)


def _recipe(node: Any, steps: int, leaves: list[Tensor]) -> _Recipe | None:
    """The recipe of what a node made, whose tensors are added to ``leaves`` in the order in which it takes them."""
    if node is None or steps == 0:
        return None
    name = node.name()
    if name == "MulBackward0":
        return _product(node, steps, leaves)
    if name in VIEWS and _is_whole(node):
        return _recipe(node.next_functions[0][0], steps, leaves)
    if name == "ToCopyBackward0":
        source = _recipe(node.next_functions[0][0], steps - 1, leaves)
        return None if source is None else _Cast(source, node._input_metadata[0].dtype)
    return None


def _before_reshapes(node: Any) -> Any:
    """The node whose result has the numbers of a node's result, perhaps in another shape."""
    while node is not None and node.name() in RESHAPES:
        node = node.next_functions[0][0]
    return node


def _is_whole(view: Any) -> bool:
    """Whether a node of a part of a tensor, of which it has the shape, is one of all of it."""
    whole = view.next_functions[0][0]._input_metadata
    return len(whole) == 1 and whole[0].shape == view._input_metadata[0].shape


def _product(node: Any, steps: int, leaves: list[Tensor]) -> _Product | None:
    """A product whose factors are kept by its node, or formed by a node before it."""
    factors: list[_Recipe] = []
    for number, saved in enumerate((node._saved_self, node._saved_other)):
        if saved is not None:
            leaves.append(saved)
            factors.append(_Leaf(saved.dtype))
            continue
        factor = _recipe(node.next_functions[number][0], steps - 1, leaves)
        if factor is None:
            return None
        factors.append(factor)
    left, right = factors
    dtype = node._input_metadata[0].dtype
    # Python's numbers are kept as tensors of no dimension, which would be computed with in their own dtype
    return _Product(left, right, dtype) if torch.promote_types(left.dtype, right.dtype) == dtype else None


# -------------------------------------------------------------------------------------------------------- compression


def _as_bfloat16(x: Tensor) -> Kept:
    """Rounded to bfloat16 up or down at random, such that the mean is ``x``."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return Kept((x,), _itself)
    bits = x.to(torch.float32, copy=True).view(torch.int32)
    bits.add_(torch.randint_like(bits, 1 << 16)).bitwise_and_(-1 << 16)
    dtype = x.dtype
    return Kept((bits.view(torch.float32).to(torch.bfloat16),), lambda kept: kept.to(dtype))


def _as_int8(x: Tensor) -> Kept:
    """Integers of -127 to 127 times a scale for each block of a row, rounded at random such that the mean is ``x``."""
    blocks, scales = _blocks(x)
    codes = torch.empty(blocks.shape, dtype=torch.int8, device=x.device)
    for number in range(blocks.shape[1]):  # a block of all rows at a time: no temporary of the input's size
        scaled = blocks[:, number].float() / scales[:, number, None]
        codes[:, number] = scaled.add_(torch.rand_like(scaled)).floor_().clamp_(-127, 127).to(torch.int8)
    shape, dtype = x.shape, x.dtype

    def restore(codes: Tensor, scales: Tensor) -> Tensor:
        rows = (codes * scales[:, :, None]).flatten(1)
        return rows[:, : shape[-1]].to(dtype).reshape(shape)

    return Kept((codes, scales), restore)


def _blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(rows, blocks, BLOCK)`` numbers of the rows, zeros behind their end, and ``(rows, blocks)`` float32 scales."""
    rows = x.reshape(-1, x.shape[-1])
    width = min(BLOCK, max(1, rows.shape[1]))
    missing = -rows.shape[1] % width
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    blocks = padded.view(rows.shape[0], padded.shape[1] // width, width)
    largest = torch.linalg.vector_norm(blocks, torch.inf, -1).float() / 127
    return blocks, torch.where(largest > 0, largest, 1.0)
