"""Patches: the entries that an inference engine's weights must take, and what they apply to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class Kind(str, Enum):  # noqa: UP042
    """Which entries of a parameter a patch writes.

    Attributes:
        POSITIONS: these, and the receiver holds these from now on; all others go back to the base.
        HELD: all that the receiver holds.
        SOME: some of those that the receiver holds.
        WHOLE: all entries of the parameter.
    """

    POSITIONS = "positions"
    HELD = "held"
    SOME = "some"
    WHOLE = "whole"


@dataclass(frozen=True, eq=False)
class WeightPatch:
    """New entries of one parameter.

    Attributes:
        name: the parameter's, as in the model's own state dict without adapters.
        kind: which entries.
        shape: of the parameter.
        values: ``(entries,)`` absolute values in the base's dtype, not differences.
        indices: ``(entries,)`` flat row-major positions, strictly increasing, int32 or from 2**31 entries on int64;
            None where the kind says all.
        given_up: those of the indices that go back to the base's value and are no longer held; None for none.

    Example:
        >>> import torch
        >>> from sparse_peft.sync import Kind, WeightPatch
        >>> patch = WeightPatch("0.weight", Kind.WHOLE, (2, 3), torch.zeros(6))
        >>> patch.nbytes
        24
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    values: Tensor
    indices: Tensor | None = None
    given_up: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in (self.values, self.indices, self.given_up) if tensor is not None)


@dataclass(frozen=True, eq=False)
class Publication:
    """All patches that lead an engine from one state of an adapter to the next.

    Attributes:
        base: fingerprint of the base model's weights.
        run: the publisher's random name; sequence numbers of another run mean nothing.
        sequence: the state's number, from 1.
        since: the state's number that the patches apply to; None for the base model itself.
        patches: one for each parameter that changed.
        adapted: names of the weights that ``base`` was computed from; empty unless the publication is full.
    """

    base: str
    run: str
    sequence: int
    since: int | None
    patches: tuple[WeightPatch, ...]
    adapted: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of the patches' tensors."""
        return sum(patch.nbytes for patch in self.patches)

    @property
    def is_full(self) -> bool:
        """Whether the patches apply to the base model itself."""
        return self.since is None

    def __iter__(self) -> Iterator[WeightPatch]:
        return iter(self.patches)


class PatchError(ValueError):
    """A publication that does not fit the weights it was given to; nothing was written.

    A full publication (``publisher.publish(full=True)``) is the cure where patches were lost, doubled or reordered.
    """
