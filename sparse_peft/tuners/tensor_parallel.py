"""Linear layers that transformers divides among processes (``tp_plan``), in the terms of this package.

Each process holds some rows (*colwise*) or columns (*rowwise*) of the weight, and all trained values. It writes, reads
and differentiates the entries of its own part. Values, positions, optimizer states and files are those of one process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard as Placement

from ..dynamics.collectives import Collectives
from ..ops import Factor, GradientObserver, gather_features, gathered_features, own_features, sum_gradients, sum_parts
from ..support import Shard, Support
from .active_delta import ActiveDelta

# Of each of transformers' styles: the weight's dimension that is divided, whether the input comes whole, and whether
# the output leaves whole.
STYLES = {
    "colwise": (0, True, False),
    "colwise_gather_output": (0, True, True),
    "colwise_rep": (0, True, True),
    "rowwise": (1, False, True),
    "rowwise_split_input": (1, True, True),
    "rowwise_rep": (1, True, True),
}


@dataclass(frozen=True, eq=False)
class TensorParallel:
    """The part of a linear layer that this process computes.

    Attributes:
        shard: of the weight.
        group: the processes that have the other parts.
        takes_whole: whether the input has the features of all parts.
        gives_whole: whether the output has.
        forward: the base layer's own, which transformers installed.
    """

    shard: Shard
    group: dist.ProcessGroup
    takes_whole: bool
    gives_whole: bool
    forward: Any

    @classmethod
    def of(cls, model: nn.Module, name: str, base: nn.Module) -> TensorParallel | None:
        """Of a target layer; None where its weight is whole.

        Raises:
            NotImplementedError: it is divided in a way that layers with adapters do not know.
        """
        weight = base._parameters.get("weight")
        if not isinstance(weight, DTensor) or "forward" not in base.__dict__:
            return None
        style = _style_of(model, name)
        dim, takes_whole, gives_whole = STYLES[style]
        mesh, placements = weight.device_mesh, weight.placements
        if mesh.ndim > 1 or placements != (Placement(dim),):
            raise NotImplementedError(
                f"Target module {name}: its weight is divided as {placements} over a mesh of {mesh.ndim} dimensions, "
                "by tensor parallelism together with FSDP2 or pipelines; use tensor parallelism alone (tp_size=, "
                "without fsdp_size), or FSDP2 alone (fully_shard, after the adapter is made)"
            )
        rows, cols = weight.shape
        group = mesh.get_group()
        shard = Shard.of((rows, cols), dim, dist.get_rank(group), dist.get_world_size(group))
        if shard.stop == shard.start:
            raise NotImplementedError(
                f"Target module {name}: a weight of {rows} x {cols} is too small for {dist.get_world_size(group)} "
                "processes; use fewer, or leave it out with exclude_modules"
            )
        return cls(shard, group, takes_whole, gives_whole, base.__dict__["forward"])

    @property
    def is_colwise(self) -> bool:
        """Whether this process has outputs of its own; else it has inputs of its own."""
        return self.shard.dim == 0

    def enter(self, x: Tensor) -> Tensor:
        """The part of the layer's input that this process multiplies."""
        if self.is_colwise:
            return sum_gradients(x, self.group)
        return own_features(x, self.group) if self.takes_whole else x

    def leave(self, out: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output.

        Args:
            out: the product of this process's part.
            bias: what is still to be added, of a layer whose parts are summed.
        """
        if not self.is_colwise:
            out = sum_parts(out, self.group)
            return out if bias is None else out + bias
        return gathered_features(out, self.shard.shape[0], self.group) if self.gives_whole else out


@dataclass(frozen=True, eq=False)
class WholeObserver:
    """Shows an observer the factors of the whole weight's gradient, gathered from the processes.

    Each process then does what one process without tensor parallelism does, and all find the same candidates.

    Attributes:
        observer: of the whole weight.
        parallel: the layer's part.
        joins: gives the joined adapters that the layer computes with.
    """

    observer: GradientObserver
    parallel: TensorParallel
    joins: Callable[[], Sequence[ActiveDelta]]

    def support_grad(self, left: Factor, right: Tensor, support: Support) -> Tensor:
        """The gradient at the support, which is of this process's part."""
        shard, group = self.parallel.shard, self.parallel.group
        assert isinstance(left, Tensor)  # of linear layers
        if shard.dim == 0:
            left = gather_features(left, shard.shape[0], group)
        else:
            right = gather_features(right, shard.shape[1], group)
        parts = next(delta.parts for delta in self.joins() if delta.support is support)
        whole = parts[0] if len(parts) == 1 else parts[0].union(*parts[1:])[0]
        return self.observer.support_grad(left, right, whole)[shard.cut(whole)[1]]


def _style_of(model: nn.Module, name: str) -> str:
    plan = getattr(model, "tp_plan", None) or {}
    style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), plan.get(name))
    if style not in STYLES:
        raise NotImplementedError(
            f"Target module {name} has the tensor-parallel style {style!r}; adapters have {', '.join(STYLES)}. Leave "
            "the layer out with exclude_modules, or use FSDP2 or DDP"
        )
    return style


class LocalParameters(Mapping[str, Any]):
    """This process's parts of a module's parameters."""

    def __init__(self, module: nn.Module):
        self._parameters = module._parameters

    def __getitem__(self, name: str) -> Tensor | None:
        return local_part(self._parameters[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def local_part(tensor: Tensor | None) -> Tensor | None:
    """What this process holds of a tensor: always the same object, to which it may write."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def averaging_processes(model: nn.Module, group: dist.ProcessGroup | None) -> Collectives:
    """The processes whose gradients are averaged: not those of a tensor-parallel group, which have one batch.

    Args:
        model: with adapters.
        group: the user's choice; None for all processes.

    Raises:
        NotImplementedError: there are several tensor-parallel groups, and ``group`` is not given.
    """
    found = [p for module in model.modules() if (p := getattr(module, "parallel", None)) is not None]
    if group is not None or not found:
        return Collectives(group)
    if dist.get_world_size(found[0].group) < dist.get_world_size():
        raise NotImplementedError(
            "several groups of tensor-parallel processes: give the processes whose gradients are averaged, one of "
            "each group, as SparsityController(process_group=...)"
        )
    return Collectives.of_one()
