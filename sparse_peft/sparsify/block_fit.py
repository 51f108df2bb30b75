"""The factors ``left @ core @ right`` of a weight, fitted by exact steps.

``left`` and ``right`` are block-diagonal with blocks of ``b x b``, and each group of the core's inputs keeps ``n`` of
``m``. With weights ``u_i`` of the outputs and ``v_j`` of the inputs, the loss is
``sum u_i v_j (W - left @ core @ right)²_ij``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

_RANK_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # of systems with a unit diagonal
_LEAST_INPUT = 1e-6  # of the mean: weights of inputs that the data hardly has are still fitted to something


def blockwise(blocks: Tensor, x: Tensor) -> Tensor:
    """The block-diagonal matrix of ``(n, b, b)`` times the vectors ``(..., n * b)``."""
    parts = x.reshape(-1, *blocks.shape[:2]).transpose(0, 1)
    return (parts @ blocks.mT).transpose(0, 1).reshape(x.shape)


def times_left(left: Tensor, matrix: Tensor) -> Tensor:
    """``left @ matrix`` for blocks ``(n, b, b)``."""
    return (left @ matrix.reshape(*left.shape[:2], -1)).view(matrix.shape)


def times_right(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix @ right`` for blocks ``(n, b, b)``."""
    return (_by_inputs(matrix, right.shape[1]) @ right).transpose(0, 1).reshape(matrix.shape)


def identity_blocks(size: int, block: int, like: Tensor) -> Tensor:
    """``(size / block, block, block)`` of the tensor's dtype and device."""
    return torch.eye(block, dtype=like.dtype, device=like.device).repeat(size // block, 1, 1)


def _by_inputs(matrix: Tensor, block: int) -> Tensor:
    """``(rows, cols)`` as ``(cols / block, rows, block)``."""
    return matrix.view(matrix.shape[0], -1, block).transpose(0, 1)


@dataclass
class Factors:
    """A weight ``left @ core @ right``.

    Attributes:
        core: ``(outputs, inputs)``.
        kept: ``(outputs, inputs)`` bool: where the core may be non-zero.
        left: ``(outputs / block, block, block)``.
        right: ``(inputs / block, block, block)``.
    """

    core: Tensor
    kept: Tensor
    left: Tensor
    right: Tensor

    def product(self, dtype: torch.dtype) -> Tensor:
        """``left @ core @ right``, computed in a dtype."""
        left, core, right = (part.to(dtype) for part in (self.left, self.core, self.right))
        return times_right(times_left(left, core), right)

    def copy(self, dtype: torch.dtype) -> Factors:
        """A copy in a dtype."""
        core, left, right = (part.to(dtype, copy=True) for part in (self.core, self.left, self.right))
        return Factors(core, self.kept.clone(), left, right)


class BlockFit:
    """Fits the factors of a weight.

    Args:
        target: ``(outputs, inputs)`` float32 or float64.
        start: factors of the same dtype, changed in place.
        outputs: ``(outputs,)`` weights of the outputs.
        inputs: ``(inputs,)`` weights of the inputs.
        n, m: the core's pattern.
    """

    def __init__(self, target: Tensor, start: Factors, outputs: Tensor, inputs: Tensor, n: int, m: int) -> None:
        self.target, self.now, self.block = target, start, start.left.shape[1]
        self.outputs = (outputs / outputs.mean().clamp(min=torch.finfo(outputs.dtype).tiny)).to(target.dtype)[:, None]
        inputs = inputs / inputs.mean().clamp(min=torch.finfo(inputs.dtype).tiny)
        self.inputs = inputs.clamp(min=_LEAST_INPUT).to(target.dtype)
        chosen = torch.tensor(list(combinations(range(m), n)), device=target.device)
        self.supports = torch.zeros(len(chosen), m, dtype=torch.bool, device=target.device).scatter_(1, chosen, True)
        self.m = m

    def loss(self, factors: Factors) -> float:
        """The loss of factors of any dtype."""
        error = self.target - factors.product(self.target.dtype)
        rows = (error.square_() * self.inputs).sum(1).double()
        return float(rows @ self.outputs.squeeze(1).double())

    def sweep(self) -> None:
        """Fit each factor once."""
        self._fit_left()
        self._fit_right()
        self._fit_core()

    def _fit_left(self) -> None:
        """Rows of a block are separate least-squares problems with the same system."""
        inner = times_right(self.now.core, self.now.right)
        rest = (self.target - times_left(self.now.left, inner)).view(-1, self.block, inner.shape[1])
        inner = inner.view(rest.shape)
        weighted = inner * self.inputs
        self.now.left += _solved(weighted @ inner.mT, weighted @ rest.mT).mT

    def _fit_right(self) -> None:
        """Columns of a block are separate least-squares problems with the same system."""
        inner = times_left(self.now.left, self.now.core)
        rest = _by_inputs(self.target - times_right(inner, self.now.right), self.block)
        inner = _by_inputs(inner, self.block)
        weighted = (inner * self.outputs).mT
        self.now.right += _solved(weighted @ inner, weighted @ rest)

    def _fit_core(self) -> None:
        """Row after row of all blocks at once, which do not depend on each other; in it group after group."""
        now, b = self.now, self.block
        rest = (self.target - now.product(self.target.dtype)).mul_(self.inputs).mul_(self.outputs)
        pulls = times_right(times_left(now.left.mT, rest), now.right.mT).view(-1, b, rest.shape[1])
        del rest
        left_gram = now.left.mT @ (now.left * self.outputs.view(-1, b, 1))
        right_gram = (now.right * self.inputs.view(-1, 1, b)) @ now.right.mT
        inverses = self._inverses(right_gram)
        core, kept = now.core.view(pulls.shape), now.kept.view(pulls.shape)
        change = torch.zeros_like(pulls)
        for row in range(b):
            moved = (left_gram[:, row, None, :row] @ change[:, :row]).squeeze(1)
            pull = _by_inputs(pulls[:, row], b) - _by_inputs(moved, b) @ right_gram
            new, stays = self._fitted_row(
                _by_inputs(core[:, row], b), pull, left_gram[:, row, row], right_gram, inverses
            )
            new, stays = (part.transpose(0, 1).flatten(1) for part in (new, stays))
            change[:, row] = new - core[:, row]
            core[:, row], kept[:, row] = new, stays

    def _inverses(self, gram: Tensor) -> Tensor:
        """Of the systems of all supports, zero outside: ``(inputs / b, b / m, m, supports * m)``."""
        m = self.m
        groups = gram.unflatten(2, (-1, m)).unflatten(1, (-1, m)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        pairs = self.supports[:, :, None] & self.supports[:, None, :]
        systems = torch.where(pairs, groups[:, :, None], 0.0)
        found = _pseudo_inverse(systems)
        return found.transpose(2, 3).flatten(3)

    def _fitted_row(
        self, row: Tensor, pull: Tensor, scale: Tensor, gram: Tensor, inverses: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best values and supports of a row's groups, in order.

        Args:
            row: ``(inputs / b, outputs / b, b)`` of the core.
            pull: likewise; half of the negative gradient of the loss.
            scale: ``(outputs / b,)``: ``gram`` times it is the row's system.
            gram: ``(inputs / b, b, b)``.
            inverses: of ``_inverses``.
        """
        new, stays = row.clone(), torch.empty_like(row, dtype=torch.bool)
        scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)[:, None]
        for group in range(self.block // self.m):
            at = slice(group * self.m, (group + 1) * self.m)
            old = row[:, :, at]
            wanted = pull[:, :, at] / scale + old @ gram[:, at, at]
            found = (wanted @ inverses[:, group]).unflatten(2, (-1, self.m))
            best = (found * wanted[:, :, None]).sum(3).argmax(2)
            chosen = found.gather(2, best[:, :, None, None].expand(-1, -1, 1, self.m)).squeeze(2)
            pull = pull - scale * ((chosen - old) @ gram[:, at])
            new[:, :, at], stays[:, :, at] = chosen, self.supports[best]
        return new, stays


def _pseudo_inverse(systems: Tensor) -> Tensor:
    """Of symmetric positive semi-definite systems ``(..., n, n)``, in float64 and scaled to a unit diagonal."""
    diagonal = systems.diagonal(dim1=-2, dim2=-1).double()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    scaled = systems.double() * scale[..., :, None] * scale[..., None, :]
    inverse = torch.linalg.pinv(scaled, hermitian=True, rtol=_RANK_TOLERANCE[systems.dtype])
    return (inverse * scale[..., :, None] * scale[..., None, :]).to(systems.dtype)


def _solved(systems: Tensor, sides: Tensor) -> Tensor:
    return _pseudo_inverse(systems) @ sides
