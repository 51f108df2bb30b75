"""What it takes to restore a base weight: kept before the first byte of it is overwritten.

Restoring overwrites whatever is there and may be repeated, so it is right after an interruption at any point.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..numerics import checksum
from ..ops import HeldEntries, read_support, restore_supports_

SET_ASIDE = "set_aside"  # the submodule that a layer without a weight is kept as, while a merged one has its place


class Backup(Protocol):
    """What it takes to restore a base weight."""

    def restore(self) -> None:
        """Give the base back, bit for bit; may be repeated."""
        ...

    def checksum(self) -> int:
        """Of what restoring overwrites, as it is now."""
        ...

    def follow(self) -> None:
        """The weight may have been moved or cast since: so is what restores it."""
        ...


@dataclass(slots=True, eq=False)
class EntriesBackup(HeldEntries):
    """Single entries of a weight."""

    def restore(self) -> None:
        restore_all([self])

    def checksum(self) -> int:
        return checksum(read_support(self.weight.detach(), self.support))

    def follow(self) -> None:
        weight = self.weight
        if not weight.is_contiguous():
            self.place = None
        if self.is_like(weight):
            return
        if self.support.device != weight.device:
            self.support, self.place = self.support.to(weight.device), None
        self.keep(self.originals.to(weight))


@dataclass
class WeightBackup:
    """A whole weight.

    Attributes:
        weight: the parameter.
        original: a copy of it as it was.
    """

    weight: Tensor
    original: Tensor

    def restore(self) -> None:
        self.weight.copy_(self.original)

    def checksum(self) -> int:
        return checksum(self.weight)

    def follow(self) -> None:
        self.original = self.original.to(self.weight)


class PackedBackup:
    """A quantised base layer.

    Re-quantising rounds the whole weight, so subtracting the delta again would not bring the packed weight back. The
    backends replace the weight object (bitsandbytes, torchao) or the whole layer (HQQ) and edit the attributes of the
    old one on the way; all three are kept.

    Args:
        owner: the tuner layer.
        base: its base layer.
    """

    def __init__(self, owner: nn.Module, base: nn.Module):
        self.owner, self.base = owner, base
        self.weight: Any = getattr(base, "weight", None)
        self.attributes = dict(self.weight.__dict__) if self.weight is not None else {}
        self.state = copy.copy(getattr(base, "state", None))

    def restore(self) -> None:
        self.owner._modules["base_layer"] = self.base
        if self.weight is not None:
            self.weight.__dict__.clear()
            self.weight.__dict__.update(self.attributes)
            # registered directly: setattr on a module refuses to replace a parameter with a bare tensor subclass
            self.base._parameters["weight"] = self.weight
        if self.state is not None:
            self.base.state = copy.copy(self.state)

    def checksum(self) -> int:
        return sum(checksum(tensor) for tensor in self._packed_tensors())

    def _packed_tensors(self) -> Iterable[Tensor]:
        base: Any = self.owner._modules["base_layer"]
        packed = getattr(base, "W_q", getattr(base, "weight", None))
        if isinstance(packed, Tensor) and type(packed.data) is Tensor:
            yield packed.data

    def follow(self) -> None:
        """Packed weights stay where they are."""


@dataclass
class LayerBackup:
    """A base layer without a weight, while one with the merged weight has its place."""

    owner: nn.Module
    base: nn.Module

    def restore(self) -> None:
        self.owner._modules["base_layer"] = self.base
        self.owner._modules.pop(SET_ASIDE, None)

    def checksum(self) -> int:
        base: Any = self.owner._modules["base_layer"]
        return checksum(base.weight)

    def follow(self) -> None:
        """The layer that is set aside is moved as a part of its owner."""


@torch.no_grad()
def restore_all(backups: Iterable[Backup]) -> None:
    """``Backup.restore`` for many weights, on a GPU in one launch."""
    entries = []
    for backup in backups:
        if isinstance(backup, EntriesBackup):
            backup.follow()
            entries.append(backup)
        else:
            backup.restore()
    restore_supports_(entries)
