"""Where an engine keeps a checkpoint's parameters: under their own names, fused with others, or sharded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..tuners.plain_state import plain_state
from .patches import PatchError

Target = nn.Module | Mapping[str, Tensor]


class Chosen(NamedTuple):
    """Entries of a parameter that lie in an engine's part of it.

    Attributes:
        kept: which of the entries, as positions in their list.
        rows: of the engine's matrix.
        cols: likewise.
    """

    kept: Tensor
    rows: Tensor
    cols: Tensor


@dataclass(frozen=True, eq=False)
class Place:
    """The part of a parameter that an engine has, and where.

    Attributes:
        matrix: ``(rows, cols)`` view of the engine's memory.
        size: ``(rows, cols)`` of the whole parameter's matrix.
        first_row: of that matrix which lies in the view's first.
        first_col: likewise.
    """

    matrix: Tensor
    size: tuple[int, int]
    first_row: int = 0
    first_col: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether the engine has all of the parameter."""
        return tuple(self.matrix.shape) == self.size

    def choose(self, indices: Tensor) -> Chosen:
        """Which of a parameter's flat positions lie here."""
        indices = indices.to(self.matrix.device, torch.int64)
        rows, cols = indices // self.size[1] - self.first_row, indices % self.size[1] - self.first_col
        height, width = self.matrix.shape
        kept = ((rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)).nonzero().flatten()
        return Chosen(kept, rows[kept], cols[kept])

    def part_of(self, matrix: Tensor) -> Tensor:
        """The part of a whole parameter's matrix that lies here."""
        height, width = self.matrix.shape
        return matrix[self.first_row : self.first_row + height, self.first_col : self.first_col + width]


class Layout(Protocol):
    """Where an engine keeps parameters."""

    def place(self, name: str, shape: Sequence[int]) -> Place:
        """Of the parameter with this name and shape.

        Raises:
            PatchError: the engine has no such parameter, or one of another shape.
        """
        ...


def matrix_of(tensor: Tensor) -> Tensor:
    """A parameter as ``(rows, cols)``: a vector is a column, further dimensions are columns."""
    return tensor.view(len(tensor), -1)


def tensors_of(target: Target) -> dict[str, Tensor]:
    """An engine's parameters and buffers by name."""
    if isinstance(target, nn.Module):
        return {**dict(target.named_parameters(remove_duplicate=False)), **dict(target.named_buffers())}
    return dict(target)


class PlainLayout:
    """Parameters under the checkpoint's names.

    Args:
        target: a model, or its ``{name: tensor}``; the tensors themselves are written to.
    """

    def __init__(self, target: Target):
        self._tensors = tensors_of(target)

    def place(self, name: str, shape: Sequence[int]) -> Place:
        """See ``Layout``."""
        tensor = _found(self._tensors, name, name)
        if tuple(tensor.shape) != tuple(shape):
            raise _wrong_shape(name, tensor, shape)
        if not tensor.is_contiguous():
            raise PatchError(
                f"{name}: the engine's parameter is not contiguous; give its layout, or a contiguous copy"
            )
        matrix = matrix_of(tensor.detach())
        return Place(matrix, (matrix.shape[0], matrix.shape[1]))


def _found(tensors: Mapping[str, Tensor], engine_name: str, name: str) -> Tensor:
    if engine_name not in tensors:
        raise PatchError(
            f"{name}: the engine has no parameter {engine_name!r}; another model, or one whose parameters are fused: "
            "pass layout=FusedLayout(...)"
        )
    return tensors[engine_name]


def _wrong_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> PatchError:
    return PatchError(f"{name}: the engine's parameter is {tuple(tensor.shape)}, the trainer's {tuple(shape)}")


# {module of a checkpoint: (module of the engine, all modules that are fused there, in order)}
_QKV = ("qkv_proj", ("q_proj", "k_proj", "v_proj"))
_GATE_UP = ("gate_up_proj", ("gate_proj", "up_proj"))
FUSED = dict.fromkeys(_QKV[1], _QKV) | dict.fromkeys(_GATE_UP[1], _GATE_UP)
# {a checkpoint's projection of one expert: (the engine's tensor, which half of its rows)}; None: all rows
EXPERTS: dict[str, tuple[str, int | None]] = {
    "gate_proj": ("w13_weight", 0),
    "w1": ("w13_weight", 0),
    "up_proj": ("w13_weight", 1),
    "w3": ("w13_weight", 1),
    "down_proj": ("w2_weight", None),
    "w2": ("w2_weight", None),
}
# How tensor parallelism cuts modules: by rows of the weight, or by columns. All others are on each rank.
BY_ROWS = {*FUSED, "w1", "w3", "embed_tokens", "lm_head"}
BY_COLUMNS = {"o_proj", "down_proj", "w2"}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
# transformers' parameters of all experts; the engine's lie the same way
STACKED = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
_ALL_EXPERTS = re.compile(r"(.+\.experts)\.(\w+)")


class FusedLayout:
    """Parameters as vLLM and SGLang keep them: fused projections, stacked experts, tensor-parallel shards.

    ``q_proj``, ``k_proj`` and ``v_proj`` lie one below the other in ``qkv_proj``, ``gate_proj`` and ``up_proj`` in
    ``gate_up_proj``. Experts' ``gate_proj`` and ``up_proj`` (or ``w1`` and ``w3``) lie in ``experts.w13_weight``
    ``(experts, 2 * width, hidden)``, ``down_proj`` (``w2``) in ``experts.w2_weight``. So do transformers' parameters
    of all experts, ``experts.gate_up_proj`` and ``experts.down_proj``, on one rank. A module that the engine has under
    its own name is taken from there.

    Args:
        target: the engine's model on this rank, or its ``{name: tensor}``.
        shapes: ``{name: shape}`` of the checkpoint's weights, see ``checkpoint_shapes``.
        rank: of this process in the tensor-parallel group.
        size: of that group. Key and value heads that are fewer than ranks are on several.

    Example:
        >>> receiver = Receiver(engine, layout=FusedLayout(engine, checkpoint_shapes(model)))
    """

    def __init__(self, target: Target, shapes: Mapping[str, Sequence[int]], *, rank: int = 0, size: int = 1):
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank}: 0 to size - 1 = {size - 1} is expected")
        self._tensors, self._shapes, self._rank, self._size = tensors_of(target), dict(shapes), rank, size

    def place(self, name: str, shape: Sequence[int]) -> Place:
        """See ``Layout``."""
        if name in self._tensors:
            return self._cut(name, matrix_of(self._tensors[name].detach()), shape)
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            return self._expert(name, shape, *expert.groups())
        stack = _ALL_EXPERTS.fullmatch(name)
        if stack is not None and stack[2] in STACKED:
            tensor = _found(self._tensors, f"{stack[1]}.{STACKED[stack[2]]}", name)
            return self._cut(name, matrix_of(tensor.detach()), shape)
        module, _, kind = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        if leaf not in FUSED:
            raise PatchError(f"{name}: the engine has no parameter of this name, and no layout is known for it")
        fused, members = FUSED[leaf]
        tensor = matrix_of(_found(self._tensors, f"{parent}.{fused}.{kind}", name).detach())
        heights = self._heights(name, [f"{parent}.{member}.{kind}" for member in members], len(tensor))
        start = sum(heights[: members.index(leaf)])
        return self._cut(name, tensor[start : start + heights[members.index(leaf)]], shape)

    def _expert(self, name: str, shape: Sequence[int], parent: str, number: str, leaf: str) -> Place:
        if leaf not in EXPERTS:
            raise PatchError(f"{name}: no layout is known for {leaf!r} of experts")
        stacked, half = EXPERTS[leaf]
        tensor = _found(self._tensors, f"{parent}.{stacked}", name).detach()
        if int(number) >= len(tensor):
            raise PatchError(f"{name}: the engine has {len(tensor)} experts")
        matrix = tensor[int(number)]
        height = len(matrix) // 2
        return self._cut(name, matrix if half is None else matrix[half * height : (half + 1) * height], shape)

    def _heights(self, name: str, members: Sequence[str], height: int) -> list[int]:
        """Rows of each fused member on this rank."""
        missing = [member for member in members if member not in self._shapes]
        if missing:
            raise PatchError(f"{name}: shapes= has no {missing[0]!r}, which the engine fuses it with")
        full = [self._shapes[member][0] for member in members]
        # the largest is cut evenly; members with fewer heads than ranks share the remaining rows evenly
        own = [full[0] // self._size]
        rest = (height - own[0]) // (len(members) - 1)
        return own + [rest] * (len(members) - 1)

    def _cut(self, name: str, matrix: Tensor, shape: Sequence[int]) -> Place:
        """The shard of a parameter whose own part on this rank is ``matrix``."""
        rows, cols = shape[0], prod(shape[1:])
        leaf = name.split(".")[-2] if "." in name else name
        first_row = self._first(rows, matrix.shape[0]) if leaf in BY_ROWS else 0
        first_col = self._first(cols, matrix.shape[1]) if leaf in BY_COLUMNS else 0
        is_cut = leaf in BY_ROWS or rows == matrix.shape[0], leaf in BY_COLUMNS or cols == matrix.shape[1]
        if not all(is_cut) or first_row + matrix.shape[0] > rows or first_col + matrix.shape[1] > cols:
            raise _wrong_shape(name, matrix, (rows, cols))
        return Place(matrix, (rows, cols), first_row, first_col)

    def _first(self, full: int, own: int) -> int:
        """The first row or column of this rank's shard; shards of fewer heads than ranks are repeated."""
        copies = max(1, own * self._size // full)
        return self._rank // copies * own


def checkpoint_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """``{name: shape}`` of a model's tensors without adapters, for ``FusedLayout``; of models with one as well.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.sync import checkpoint_shapes
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> checkpoint_shapes(get_peft_model(model, SparseConfig(density=0.5, target_modules=["0"])))
        {'0.weight': (4, 8), '0.bias': (4,)}
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: tuple(tensor.shape) for name, tensor in plain_state(inner).items()}
