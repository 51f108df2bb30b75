"""Supports of whole blocks: the same budgets and criteria, counted in blocks.

Blocks lie on a grid from the upper left corner of the stored weight. Incomplete blocks at the right and lower edge
never train: every block has the same number of entries, and counts are known before positions are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from ..constraints import Count, validated
from .budget import Budget, Caps, Division, allocate, check_caps, divide
from .support import Support

Block = tuple[int, int]
"""``(rows, cols)`` of a block of the stored weight."""


def as_block(block_size: int | Sequence[int]) -> Block:
    """``(rows, cols)`` of a block, from one number or two.

    Raises:
        TypeError, ValueError: another value.

    Example:
        >>> from sparse_peft.support import as_block
        >>> as_block(4), as_block((2, 8))
        ((4, 4), (2, 8))
    """
    sizes = validated("block_size", block_size, Count | list[Count])
    pair = sizes if isinstance(sizes, list) else [sizes, sizes]
    if len(pair) != 2:
        raise ValueError(f"block_size={block_size!r}: one number, or the (rows, cols) of a block, is expected")
    return pair[0], pair[1]


def grid_of(shape: tuple[int, int], block: Block, name: str) -> tuple[int, int]:
    """Number of blocks in a stored weight, ``(down, across)``.

    Raises:
        ValueError: the weight is smaller than a block.
    """
    grid = shape[0] // block[0], shape[1] // block[1]
    if 0 in grid:
        raise ValueError(
            f"layer {name}: no block of {block[0]} x {block[1]} (block_size) fits its stored weight of {shape[0]} x "
            f"{shape[1]}; choose a smaller block_size, or leave the layer out with exclude_modules"
        )
    return grid


def divide_in_blocks(
    shapes: dict[str, tuple[int, int]], budget: Budget, block: Block, caps: Caps | None = None
) -> Division:
    """[`divide`][sparse_peft.support.divide] in blocks: every layer gets at least one.

    Args:
        shapes: ``{layer name: (rows, cols)}`` of the stored weights.
        budget: the number of entries, and how the layers share it.
        block: ``(rows, cols)`` of a block.
        caps: ``{layer name: blocks}`` that a layer may train at most; None for all.

    Raises:
        ValueError: a layer smaller than a block, or what ``divide`` raises.
    """
    grids = {name: grid_of(shape, block, name) for name, shape in shapes.items()}
    entries = divide(shapes, budget)
    per_block = block[0] * block[1]

    def blocks(count: int, names: Sequence[str]) -> int:
        most = sum(grids[name][0] * grids[name][1] for name in names)
        return min(max(len(names), round(count / per_block)), most)

    own = {name: blocks(count, [name]) for name, count in entries.own.items()}
    rest = [name for name in shapes if name not in own]
    division = Division(grids, own, blocks(entries.total, rest) if rest else 0, 1, caps, budget.matrices)
    check_caps(division, f"blocks of {block[0]} x {block[1]} without a zero")
    return division


def resolve_block_counts(
    shapes: dict[str, tuple[int, int]],
    budget: Budget,
    block: Block,
    scores: Callable[[str], Tensor] | None = None,
    largest: bool = True,
    caps: Caps | None = None,
) -> dict[str, int]:
    """Number of trained entries of each layer, in whole blocks: the budget to the nearest block.

    Args:
        shapes: ``{layer name: (rows, cols)}`` of the stored weights.
        budget: the number of entries, and how the layers share it.
        block: ``(rows, cols)`` of a block.
        scores: for ``allocation="global"``: ``scores(name)`` returns ``(rows, cols)`` scores of the layer's entries.
        largest: whether the largest scores train.
        caps: ``{layer name: blocks}`` that a layer may train at most; None for all.

    Raises:
        ValueError: as ``divide_in_blocks``, or ``"global"`` without scores.
    """
    division = divide_in_blocks(shapes, budget, block, caps)
    sums = None if scores is None else partial(_block_scores_of, scores, block)
    counts = allocate(division, budget.allocation, sums, largest)
    return {name: count * block[0] * block[1] for name, count in counts.items()}


def _block_scores_of(scores: Callable[[str], Tensor], block: Block, name: str) -> Tensor:
    return block_scores(scores(name), block)


def block_scores(scores: Tensor, block: Block) -> Tensor:
    """Sums of ``(rows, cols)`` scores over the blocks of the grid: ``(down, across)``.

    Example:
        >>> import torch
        >>> from sparse_peft.support import block_scores
        >>> block_scores(torch.ones(4, 6), (2, 3)).tolist()
        [[6.0, 6.0], [6.0, 6.0]]
    """
    height, width = block
    down, across = scores.shape[0] // height, scores.shape[1] // width
    return scores[: down * height, : across * width].reshape(down, height, across, width).sum((1, 3))


def whole_blocks(eligible: Tensor, block: Block) -> Tensor:
    """Which blocks of the grid have eligible entries only: ``(down, across)`` bool, of ``(rows, cols)`` bool."""
    height, width = block
    down, across = eligible.shape[0] // height, eligible.shape[1] // width
    return eligible[: down * height, : across * width].reshape(down, height, across, width).all(3).all(1)


def random_blocks(
    shape: tuple[int, int], block: Block, count: int, *, seed: int, name: str, among: Tensor | None = None
) -> Support:
    """``count`` blocks that depend on ``seed``, ``name``, the shape and ``among`` alone.

    Args:
        shape: ``(rows, cols)`` of the stored weight.
        block: ``(rows, cols)`` of a block.
        count: number of blocks.
        seed: any int.
        name: the layer's name.
        among: ``(rows, cols)`` bool: a block needs all of its entries in it; None for all.
    """
    grid = grid_of(shape, block, name)
    pool = None if among is None else whole_blocks(among, block)
    return expand_blocks(Support.random(grid, count, seed=seed, name=name, among=pool), shape, block)


def best_blocks(scores: Tensor, count: int, block: Block, largest: bool, name: str) -> Support:
    """The ``count`` blocks with the largest (or smallest) sums of ``(rows, cols)`` scores."""
    chosen = Support.from_scores(block_scores(scores, block), count, largest, name)
    rows, cols = scores.shape
    return expand_blocks(chosen, (rows, cols), block)


def expand_blocks(chosen: Support, shape: tuple[int, int], block: Block) -> Support:
    """The entries of chosen blocks of the weight's grid."""
    across = -(-shape[1] // block[1])  # from_blocks counts incomplete blocks at the edge too
    ids = chosen.rows.long() * across + chosen.cols.long()
    return Support.from_blocks(shape, block, ids, chosen.name)
