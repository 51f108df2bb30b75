"""Weights that FSDP2 (``fully_shard``) divides by rows, in the terms of this package.

Each process writes the entries of its own rows into its own shard before weights are gathered for a pass, so that the
gathered weight is the adapted one. It receives the values of these entries from the processes that hold them, in one
exchange for all layers. Gathered copies that are older than a write are given up, and gathered again if a pass is
using them.

All that is asked of torch beyond its documented interface is asked here.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.tensor.placement_types import Replicate
from torch.distributed.tensor.placement_types import Shard as Placement

from ..ops import write_support_
from ..support import Shard, Support
from .active_delta import ActiveDelta
from .backups import EntriesBackup

# {module: {parameter name: it}} of FSDP2's; weak, since FSDP2's objects refer to the modules.
_found: weakref.WeakKeyDictionary[nn.Module, dict[str, _Reference]] = weakref.WeakKeyDictionary()
IN_A_PASS = ("FORWARD", "PRE_BACKWARD")


class Managed(NamedTuple):
    """A parameter that FSDP2 manages.

    Attributes:
        parameter: FSDP2's record of it.
        group: the parameters that are gathered together.
        state: of the module that ``fully_shard`` was called on.
    """

    parameter: Any
    group: Any
    state: Any


class _Reference(NamedTuple):
    parameter: weakref.ref[Any]
    group: weakref.ref[Any]
    state: weakref.ref[Any]


def managed(module: nn.Module, name: str) -> Managed | None:
    """A module's parameter as FSDP2 manages it; None where it does not."""
    if module not in _found:
        _look_around()
        _found.setdefault(module, {})
    reference = _found.get(module, {}).get(name)
    if reference is None:
        return None
    parameter, group, state = (part() for part in reference)
    return None if parameter is None else Managed(parameter, group, state)


def _look_around() -> None:
    for module, reference in list(_module_state_mapping.items()):
        state: Any = reference()
        for group in _groups_of(state):
            for parameter in group.fsdp_params:
                info = parameter._module_info
                owners = zip(
                    (info.module, *info.shared_modules), (info.param_name, *info.shared_param_names), strict=True
                )
                for owner, name in owners:
                    _found.setdefault(owner, {})[name] = _Reference(
                        weakref.ref(parameter), weakref.ref(group), weakref.ref(state)
                    )
        _found.setdefault(module, {})


def _groups_of(state: Any) -> Sequence[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is not None:
        return list(groups)
    group = getattr(state, "_fsdp_param_group", None)  # one a state in torch before 2.11
    return [] if group is None else [group]


class LastingParameters(Mapping[str, Any]):
    """A module's parameters as optimizers have them, also while FSDP2 has put gathered ones in their place."""

    def __init__(self, module: nn.Module):
        self._parameters = module._parameters
        found = {name: managed(module, name) for name in module._parameters}
        self._managed = {name: each.parameter for name, each in found.items() if each is not None}

    def __getitem__(self, name: str) -> Tensor | None:
        own = self._managed.get(name)
        return self._parameters[name] if own is None else own.sharded_param

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


@dataclass(eq=False)
class FullySharded:
    """What FSDP2 and this process hold of one weight.

    Attributes:
        found: the weight.
        shard: this process's rows.
        group: the processes that have the other rows.
        siblings: gives the model's layers, which are written together.
        aliases: the weights of state dicts that refer to the shard's memory.
    """

    found: Managed
    shard: Shard
    group: dist.ProcessGroup
    siblings: Callable[[], Iterable[Any]] | None = None
    aliases: list[weakref.ref[Any]] = field(default_factory=list)

    @classmethod
    def of(cls, base: nn.Module, shape: tuple[int, int]) -> FullySharded | None:
        """Of a base layer; None where FSDP2 does not divide its weight, or not by rows alone.

        Args:
            base: the layer.
            shape: ``(rows, cols)`` of its weight as a matrix.
        """
        found = managed(base, "weight")
        if found is None:
            return None
        weight = found.parameter.sharded_param
        dims = [dim for dim, place in enumerate(weight.placements) if not isinstance(place, Replicate)]
        if len(dims) != 1 or type(place := weight.placements[dims[0]]) is not Placement or place.dim != 0:
            return None
        group = weight.device_mesh.get_group(dims[0])
        shard = Shard.of(shape, 0, dist.get_rank(group), dist.get_world_size(group))
        return cls(found, shard, group)

    @property
    def device(self) -> torch.device:
        """On which processes exchange."""
        return torch.device(self.found.group.device)

    # ------------------------------------------------------------------ this process's rows

    def get(self, name: str) -> Tensor:
        """This process's rows, which are called ``"weight"``."""
        own: Tensor = self.found.parameter.sharded_param._local_tensor
        return own

    def own_rows(self) -> Tensor:
        """This process's rows, to be written to: in memory to which no state dict refers."""
        if any(alias() is not None for alias in self.aliases):
            record = self.found.parameter
            own = record.sharded_param._local_tensor
            record._sharded_param_data = record._sharded_param_data.clone()
            record.sharded_param._local_tensor = record._sharded_param_data[: own.numel()].view(own.shape)
        self.aliases.clear()
        return self.get("weight")

    def own_weight(self, weight: Tensor, backup: EntriesBackup | None) -> Tensor:
        """A state dict's weight, which will keep the base's own entries.

        Args:
            weight: refers to this process's rows.
            backup: of the entries that these hold now.
        """
        if backup is None:
            self.aliases = [alias for alias in self.aliases if alias() is not None] + [weakref.ref(weight)]
            return weight
        copy: Any = weight.clone()
        write_support_(copy._local_tensor, backup.support, backup.originals)
        found: Tensor = copy
        return found

    def bounds(self, support: Support) -> list[int]:
        """``(processes + 1,)``: the entries of process ``i`` are those from ``bounds[i]`` to ``bounds[i + 1]``."""
        parts = dist.get_world_size(self.group)
        key = f"bounds of {parts}"
        if key not in support.derived:
            shards = [Shard.of(self.shard.shape, 0, number, parts) for number in range(parts)]
            support.derived[key] = [0, *(support.of_rows(0, shard.stop)[2] for shard in shards)]
        found: list[int] = support.derived[key]
        return found

    def worst_of(self, entries: Tensor) -> Tensor:
        """A number of all processes' entries that is not finite, if there is one, so that all refuse to merge."""
        wrong = torch.isfinite(entries).logical_not_().any().float().to(self.device)
        dist.all_reduce(wrong, group=self.group)
        return torch.where(wrong > 0, torch.nan, 0.0)

    # ------------------------------------------------------------------ gathered copies

    def drop(self) -> list[Any]:
        """Give up gathered copies of the weight, which another one will replace.

        Returns:
            The group, if a pass is using them.
        """
        group = self.found.group
        in_use = group.is_unsharded and group._training_state.name in IN_A_PASS
        group.wait_for_unshard()
        group._to_sharded()
        return [group] if in_use else []

    def root_in_a_pass(self) -> Any:
        """FSDP2's state of the outermost module, if that is in a pass and thus has gathered its weights."""
        roots = [state for state in self.found.state._state_ctx.all_states if state._is_root]
        return next((state for state in roots if state._training_state.name in IN_A_PASS), None)


def drop_all(weights: Iterable[FullySharded | None]) -> list[Any]:
    """``drop`` of several weights."""
    return list(dict.fromkeys(group for weight in weights if weight is not None for group in weight.drop()))


def gather_again(groups: Sequence[Any]) -> None:
    """Gather what passes are using, as the processes have it now; called on all processes, in the same order."""
    for group in groups:
        streams = group.comm_ctx
        for name in ("all_gather_copy_in_stream", "all_gather_stream"):
            if hasattr(streams, name):
                getattr(streams, name).wait_stream(group.device_handle.current_stream())
        group.unshard()
        group.wait_for_unshard()


# ---------------------------------------------------------------------- values of the entries in own rows


@dataclass(eq=False)
class _Part:
    """The values of one adapter in one layer, of which this process has some and wants some.

    Attributes:
        values: those that it has.
        has: for each process, the range of entries whose values it has.
        wants: for each process, the range of the entries in its rows.
        divided: the layer's weight.
        moves: whether any process needs values that another has.
    """

    values: Tensor
    has: list[tuple[int, int]]
    wants: list[tuple[int, int]]
    divided: FullySharded
    moves: bool

    def common(self, giver: int, taker: int) -> tuple[int, int]:
        (start, stop), (first, last) = self.has[giver], self.wants[taker]
        return max(start, first), max(max(start, first), min(stop, last))

    def length(self, giver: int, taker: int) -> int:
        start, stop = self.common(giver, taker)
        return stop - start

    def piece(self, giver: int, taker: int) -> Tensor:
        start, stop = self.common(giver, taker)
        return self.values[start - self.has[giver][0] : stop - self.has[giver][0]]

    def givers(self, taker: int) -> list[int]:
        """The processes from which one gets values: itself alone, where it has all."""
        return [taker] if self.length(taker, taker) == self._wanted(taker) else list(range(len(self.has)))

    def _wanted(self, taker: int) -> int:
        first, last = self.wants[taker]
        return last - first

    def assembled(self, me: int, received: Mapping[tuple[_Part, int], Tensor]) -> Tensor:
        """The values that this process wants."""
        pieces = [self.piece(me, me) if n == me else received[self, n] for n in self.givers(me)]
        return pieces[0] if len(pieces) == 1 else torch.cat([piece.to(self.values.device) for piece in pieces])


def values_of_own_rows(wanted: Sequence[tuple[Any, ActiveDelta]]) -> list[Tensor]:
    """The deltas of several layers at the entries in this process's rows: one exchange between the processes.

    Args:
        wanted: ``(layer, its joined adapters)``; the same on all processes.
    """
    own = [_own_values(layer, delta) for layer, delta in wanted]
    received = _exchange([part for parts in own for part in parts])
    found = []
    for (layer, delta), parts in zip(wanted, own, strict=True):
        rank = dist.get_rank(layer.divided.group)
        values = [
            layer.deltas[name].of_entries(part.assembled(rank, received), *part.wants[rank])
            for name, part in zip(delta.names, parts, strict=True)
        ]
        found.append(delta.within(layer.divided.shard).sum_values(values))
    return found


def _own_values(layer: Any, delta: ActiveDelta) -> list[_Part]:
    divided, parts = layer.divided, []
    size = dist.get_world_size(divided.group)
    for name, support in zip(delta.names, delta.parts, strict=True):
        state, bounds = layer.deltas[name], divided.bounds(support)
        found, entries = managed(state, "values"), support.nnz
        wants = list(itertools.pairwise(bounds))
        if found is None:  # every process has all
            parts.append(_Part(state.values.detach(), [(0, entries)] * size, wants, divided, False))
            continue
        each = -(-entries // size)
        has = [(min(n * each, entries), min((n + 1) * each, entries)) for n in range(size)]
        values = found.parameter.sharded_param._local_tensor
        part = _Part(values, has, wants, divided, True)
        key = f"values of {size} move"
        if key not in support.derived:
            support.derived[key] = any(part.givers(n) != [n] for n in range(size))
        part.moves = support.derived[key]
        parts.append(part)
    return parts


def _exchange(parts: Sequence[_Part]) -> dict[tuple[_Part, int], Tensor]:
    """What this process gets of the others, ``{(part, giver): values}``."""
    received: dict[tuple[_Part, int], Tensor] = {}
    kinds: dict[tuple[dist.ProcessGroup, torch.dtype], list[_Part]] = {}
    for part in parts:
        if part.moves:
            kinds.setdefault((part.divided.group, part.values.dtype), []).append(part)
    for (group, dtype), alike in kinds.items():
        everyone, me, device = range(dist.get_world_size(group)), dist.get_rank(group), alike[0].divided.device
        sent = [(p, n) for n in everyone for p in alike if n != me and me in p.givers(n)]
        taken = [(p, n) for n in everyone for p in alike if n != me and n in p.givers(me)]
        inputs = torch.cat([torch.empty(0, dtype=dtype, device=device), *(p.piece(me, n).to(device) for p, n in sent)])
        lengths = [p.length(giver, me) for p, giver in taken]
        outputs = torch.empty(sum(lengths), dtype=dtype, device=device)
        dist.all_to_all_single(
            outputs,
            inputs,
            _totals(taken, lengths, len(everyone)),
            _totals(sent, [p.length(me, n) for p, n in sent], len(everyone)),
            group=group,
        )
        received.update(zip(taken, outputs.split(lengths), strict=True))
    return received


def _totals(moves: Sequence[tuple[_Part, int]], lengths: Sequence[int], size: int) -> list[int]:
    """The sums of lengths for each process."""
    totals = [0] * size
    for (_, number), length in zip(moves, lengths, strict=True):
        totals[number] += length
    return totals
