"""The trained state of one adapter in one layer: values and the positions they belong to."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..dynamics.zero import shape_of
from ..ops import ENTRY_COMBINATIONS, Combination, Compression, combine_on_supports, read_support
from ..support import Support
from .base_state import TrainedState
from .files.checks import check_loaded_entries
from .files.positions import (
    FLAT,
    NAMES,
    PACKED,
    UNSET,
    file_layout,
    is_read,
    is_unset,
    memory_bytes,
    memory_form,
    pack,
    support_of,
    unpack,
    unset_form,
)
from .forms import Entries, StateSizes
from .support_recipe import SupportRecipe


class Delta(TrainedState):
    """``scale * values[e]`` is added to the stored weight at entry ``e`` of a support.

    All that is computed from a delta uses these products: passes, merging, forms, combinations. Optimizers and files
    have the values themselves. A scale that is a power of two rounds nothing.

    Subclasses name the buffers of their positions in ``position_names``, and convert between buffers and supports.

    Args:
        shape: ``(rows, cols)`` of the weight as stored.
        entries: number of trained entries.
        name: the layer's name, for error messages.
        draw: ``draw(weight, shape)`` chooses the support if no file brings it; ``weight()`` gives the base's.
        scale: factor between the values and the delta.

    Attributes:
        value_scale: this factor.
        capacity: entries that swaps pad it to; None for as many as there are.
        compression: rounding of the layer's input that is kept for the values' gradient.
        keeps_zeros: whether entries at zeros of the base weight stay zero.
        narrows_inputs: whether only the inputs that have entries are kept for the values' gradient.
    """

    combinations: ClassVar[tuple[str, ...]] = ENTRY_COMBINATIONS
    why_these_combinations = (
        "a sparse delta is no product of factors; 'linear' is the exact sum on the union of the supports"
    )
    capacity: int | None = None
    compression: Compression | None = None
    keeps_zeros: bool = False
    narrows_inputs: bool = False
    _zeros: tuple[Support, Tensor] | None = None  # of which positions, and which of these are zeros of the base weight

    def __init__(
        self,
        shape: tuple[int, int],
        entries: int,
        name: str,
        draw: Callable[[Callable[[], Tensor], tuple[int, int]], Support],
        scale: float = 1.0,
    ):
        super().__init__(name)
        self.shape = shape
        self.value_scale = scale
        self.draw = draw
        self.values = nn.Parameter(torch.zeros(entries))
        self._support: Support | None = None
        self._support_of: tuple[Tensor, int] | None = None
        self.keep_dtype()

    @property
    def entries(self) -> int:
        """Number of trained entries, also while ZeRO stage 3 has the values in partitions."""
        return shape_of(self.values).numel()

    def forward(self, scaled: bool = True) -> Tensor:
        """The delta at the entries, ``(entries,)``; called, not read, so that hooks of sharding wrappers run.

        Args:
            scaled: False for the values themselves.
        """
        values = self.values if self._zeros is None else self.values.masked_fill(self._zeros[1], 0)
        return self.scaled(values) if scaled else values

    def unscaled(self) -> Tensor:
        """``self(scaled=False)``, without torch's call of a module where it has no hooks."""
        hooked = (
            self._forward_pre_hooks or self._forward_hooks or self._backward_pre_hooks or self._backward_hooks
        ) or "forward" in self.__dict__
        return self(scaled=False) if hooked else self.forward(scaled=False)

    def of_entries(self, values: Tensor, first: int, last: int) -> Tensor:
        """The delta at the entries ``first`` to ``last``, of which these are the values, detached."""
        if self._zeros is not None:
            values = values.masked_fill(self._zeros[1][first:last], 0)
        return self.scaled(values.detach())

    @property
    def knows_zeros(self) -> bool:
        """Whether nothing is left to be found out about zeros of the base weight."""
        return not self.keeps_zeros or (self._zeros is not None and self._zeros[0] is self.known_support())

    @torch.no_grad()
    def note_zeros(self, weight: Tensor) -> None:
        """Find the entries at zeros of the base's own weight, as stored; their values become zero."""
        zeros = read_support(weight, self.support) == 0
        self._zeros = self.support, zeros
        if zeros.numel() and bool(zeros.all()):
            warnings.warn(
                f"layer {self.name}: all {zeros.numel()} trained entries are at zeros of the base weight, which "
                "preserve_zeros=True keeps, so that nothing trains; choose larger weights, with selection='nonzero' "
                "or 'magnitude'",
                UserWarning,
                stacklevel=2,
            )
        if bool(self.values[zeros].any()):
            self.values.masked_fill_(zeros, 0)
            self.changes += 1

    def scaled(self, values: Tensor) -> Tensor:
        """The delta of these values: the values themselves where the scale is 1."""
        if torch.compiler.is_compiling():
            return values * self._scale_in_graphs  # an input of the graph: another scale needs no other graph
        return values if self.value_scale == 1 else values * self.value_scale

    @property
    def value_scale(self) -> float:
        return self._value_scale

    @value_scale.setter
    def value_scale(self, scale: float) -> None:
        self._value_scale = scale
        # on the CPU, where torch takes it as a number
        self._scale_in_graphs = torch.tensor(scale, dtype=torch.float64, device="cpu")

    @property
    def stamped(self) -> Iterable[str]:
        return (self.value_name,)

    def randomise(self) -> None:
        nn.init.normal_(self.values, std=1 / self.value_scale)

    @classmethod
    def combine(cls, states: Sequence[Self], weights: Sequence[float], how: Combination) -> dict[str, Tensor]:
        first = states[0]
        support, values = combine_on_supports(
            [state.support for state in states],
            [state.scaled(state.values) for state in states],
            weights,
            how,
            first.name,
        )
        return {"values": values, **first.file_positions(support)}

    # ------------------------------------------------------------------ forms

    def sparse_part(self) -> Entries:
        return Entries(self.support, self.scaled(self.values.detach()))

    def sizes(self, save_dtype: torch.dtype) -> StateSizes:
        entries = self.entries
        return replace(super().sizes(save_dtype), entries=entries, position_bytes=memory_bytes(self.shape, entries))

    # ------------------------------------------------------------------ positions

    @abstractmethod
    def support_from(self, buffer: Tensor) -> Support:
        """The support of a position buffer's content."""

    @abstractmethod
    def file_positions(self, support: Support) -> dict[str, Tensor]:
        """``{buffer name: tensor}`` of a support in a file."""

    def position_buffer(self) -> Tensor | None:
        """The buffer that the support is read from; None while it cannot be read."""
        return next((self._buffers[name] for name in self.position_names if name in self._buffers), None)

    def keep_support(self, support: Support) -> None:
        """Put a support into buffers, by default those of a file.

        They are new ones: who has written entries needs the old ones to restore them.
        """
        self.keep_positions({name: tensor.clone() for name, tensor in self.file_positions(support).items()})

    def file_tensors(self) -> dict[str, Tensor]:
        return self.file_positions(self.support)

    def _refresh(self) -> None:
        # the buffer is replaced or filled by loading, by .to() and by reselection; the cached view follows it
        buffer = self.position_buffer()
        if buffer is None:
            return
        writes = 0 if buffer.is_inference() else buffer._version
        if self._support_of is not None and self._support_of[0] is buffer and self._support_of[1] == writes:
            return
        self._support = None
        if buffer.device.type != "meta" and not is_unset(buffer):
            self._support = self.support_from(buffer)
        self._support_of = buffer, writes

    def known_support(self) -> Support | None:
        """The positions; None if they are not known yet."""
        self._refresh()
        return self._support

    def kept_tensors(self) -> Iterator[Tensor]:
        self._refresh()  # positions that lie as in a file are packed
        yield from super().kept_tensors()
        support = self.known_support()
        if support is not None:  # what a GPU computed from the positions
            yield from (tensor for tensor in support.derived.values() if isinstance(tensor, Tensor))

    @property
    def is_set(self) -> bool:
        """Whether the positions are known."""
        return self.known_support() is not None

    @property
    def support(self) -> Support:
        """The positions as a [`Support`][sparse_peft.support.Support], with what was found out about it.

        Raises:
            RuntimeError: the positions were never set.
        """
        self._refresh()
        if self._support is None:
            raise RuntimeError(f"layer {self.name}: the adapter's positions were never set")
        return self._support

    @support.setter
    def support(self, support: Support) -> None:
        if support.shape != self.shape or support.nnz != self.entries:
            raise ValueError(
                f"layer {self.name}: a support of {support.nnz} entries over {support.shape} does not fit "
                f"{self.entries} values over {self.shape}"
            )
        self.keep_support(support)
        self._refresh()

    def keep_positions(self, positions: dict[str, Tensor]) -> None:
        """Replace the buffers of positions.

        Args:
            positions: ``{buffer name: tensor}``, with names out of ``position_names``.
        """
        self.changes += 1
        for name in self.position_names:
            self._buffers.pop(name, None)
        for name, tensor in positions.items():
            self.register_buffer(name, tensor.to(self.values.device))
        self._support = self._support_of = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy finds its support in its own buffer; this one may be changing in another thread, as its parts are
        # found
        return {**self.__dict__, "_support": None, "_support_of": None, "_zeros": None}

    def extra_repr(self) -> str:
        rows, cols = self.shape
        entries = self.entries
        scale = "" if self.value_scale == 1 else f", scale={self.value_scale:g}"
        return f"entries={entries}, shape=({rows}, {cols}), density={entries / (rows * cols):.3g}{scale}"


class SparseDelta(Delta):
    """The trained state of single entries: ``values[e]`` belongs to the flat position ``indices[e]``.

    Args:
        shape, entries, name, scale: as in ``Delta``.
        recipe: how the positions are chosen if no file brings them.
        support: the positions, or None where they come later (from a file).
    """

    position_names = NAMES

    def entry_support(self) -> Support:
        return self.support

    def __init__(
        self,
        shape: tuple[int, int],
        entries: int,
        name: str,
        recipe: SupportRecipe,
        support: Support | None = None,
        scale: float = 1.0,
    ):
        super().__init__(shape, entries, name, recipe.draw, scale)
        if support is None:
            self._await_file()
        else:
            self.keep_support(support)

    def _await_file(self) -> None:
        """Buffers as a file has them, for loaders that put a file's tensors in place by their names."""
        self.keep_positions(
            {name: torch.zeros(size, dtype=kind) for name, (size, kind) in self.position_layout().items()}
        )
        if FLAT in self._buffers:
            self.own_buffers[FLAT].fill_(UNSET)

    def position_layout(self) -> dict[str, tuple[int, torch.dtype]]:
        return file_layout(self.shape, self.entries)

    def keep_support(self, support: Support) -> None:
        self.keep_positions(memory_form(support.to(self.values.device)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # states have positions as they are in memory, now or in earlier versions, files of transformers' adapters as
        # they are on disk
        found = {name for name in NAMES if f"{prefix}{name}" in state_dict}
        if found and found != {name for name in NAMES if name in self._buffers}:
            self.keep_positions(unset_form(found, self.shape, self.entries))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        flat = self._buffers.get(FLAT)
        if flat is not None and flat.device.type != "meta" and not is_unset(flat):
            self.keep_support(Support(self.shape, flat, name=self.name))

    def train(self, mode: bool = True) -> Self:
        self._refresh()  # before any wrapper for distributed training, which has no operations on a file's uint16
        return super().train(mode)

    def resize(self, entries: int) -> None:
        """Reallocate for another number of entries; set values and positions afterwards.

        The parameter is a new one where the number changes: autograd and optimizers know the old one by its size.
        """
        if entries == self.entries:
            return
        self.values = nn.Parameter(self.values.new_zeros(entries), requires_grad=self.values.requires_grad)
        self.keep_positions(unset_form({PACKED}, self.shape, entries))

    def position_buffer(self) -> Tensor | None:
        buffers = self._buffers
        if PACKED not in buffers and FLAT not in buffers and not self._unpack():
            return None
        return buffers[PACKED if PACKED in buffers else FLAT]

    def support_from(self, buffer: Tensor) -> Support:
        return support_of(buffer, self.shape, self.entries, self.name)

    def _unpack(self) -> bool:
        """Positions that lie as in a file become those in memory; False if none were loaded."""
        tensors = {name: buffer for name, buffer in self.own_buffers.items() if name in NAMES}
        if self.values.device.type == "meta" or any(t.device.type == "meta" for t in tensors.values()):
            return False
        if not is_read(tensors):
            return False
        indices = unpack(tensors, self.shape, self.name)
        if indices is None:
            return False
        self.keep_support(Support(self.shape, indices, name=self.name))
        return True

    def file_positions(self, support: Support) -> dict[str, Tensor]:
        return pack(support)

    def take_file(self, positions: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        indices = unpack(positions, self.shape, self.name)
        found = self._required(values=parameters.get("values"), positions=indices)
        check_loaded_entries(self.name, found["values"], found["positions"], self.shape, self.entries)
        return memory_form(Support(self.shape, found["positions"], validate=False, name=self.name))
