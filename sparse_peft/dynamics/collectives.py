"""Exchange between the processes of a data-parallel run; nothing is sent in a run of one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Collectives:
    """The processes whose gradients are averaged.

    Args:
        group: a process group; None for all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        running = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if running else 1

    @classmethod
    def of_one(cls) -> Collectives:
        """This process alone, in a run whose processes all have one batch."""
        found = cls()
        found.size = 1
        return found

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.size == 1

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, of float32 tensors of one shape."""
        if self.alone:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total.div_(self.size)

    def gather_ragged(self, *columns: Tensor) -> list[tuple[Tensor, ...]]:
        """Every process's columns, 1-D tensors of one length, which may differ between processes."""
        if self.alone:
            return [columns]
        lengths = self._lengths(columns[0])
        gathered = []
        for column in columns:
            padded = column.new_zeros(max(lengths))
            padded[: column.numel()] = column
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(parts, padded, group=self.group)
            gathered.append([part[:n] for part, n in zip(parts, lengths, strict=True)])
        return list(zip(*gathered, strict=True))

    def _lengths(self, column: Tensor) -> list[int]:
        length = torch.tensor([column.numel()], device=column.device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self.group)
        return [int(n) for n in lengths]

    def agree(self, numbers: Sequence[int], device: torch.device) -> bool:
        """Whether all processes have the same numbers, up to a sum of 62 bits; one exchange of two numbers."""
        if self.alone:
            return True
        digest = sum((place + 1) * number for place, number in enumerate(numbers)) % (2**62)
        extremes = torch.tensor([digest, -digest], device=device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        return int(extremes[0]) == digest == -int(extremes[1])

    def everyones(self, thing: T) -> list[T]:
        """Every process's object."""
        if self.alone:
            return [thing]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing, group=self.group)
        return found

    def first_not_none(self, thing: T | None) -> T | None:
        """The first process's object that is not None, on every process; None if all are."""
        if self.alone:
            return thing
        flags: list[bool] = [False] * self.size
        dist.all_gather_object(flags, thing is not None, group=self.group)
        if not any(flags) or all(flags):
            return thing
        objects = [thing]
        dist.broadcast_object_list(objects, group=self.group, group_src=flags.index(True))
        return objects[0]

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor; those of the others have its shape."""
        if self.alone:
            return tensor
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor
