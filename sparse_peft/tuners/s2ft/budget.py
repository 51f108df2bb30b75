"""The number of units that each structure trains, and their choice."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...numerics import sample_without_replacement, topk_indices
from ...support import matches_layer
from .members import Structure

UNIT_ALLOCATIONS = ("per_layer", "global")


@dataclass(frozen=True)
class UnitBudget:
    """The trained part of each structure; exactly one of the first four fields is given.

    Args:
        ratio: share of the channels.
        k: channels of each layer.
        num_params: largest number of parameters in all.
        r: LoRA-rank equivalent: the units with the parameters of LoRA of this rank, rounded up.
        ratio_pattern: ``{layer name, suffix or regular expression: share}``, for structures with such a layer.
        allocation: ``"per_layer"``: structures of one kind train equally many units; ``"global"``: the best units of
            all structures of a kind train, as many in total.
    """

    ratio: float | None = None
    k: int | None = None
    num_params: int | None = None
    r: int | None = None
    ratio_pattern: dict[str, float] = field(default_factory=dict)
    allocation: str = "per_layer"

    def wanted(self, structure: Structure) -> float:
        """Units of one structure, before rounding; not with ``num_params``, which all structures share.

        Raises:
            ValueError: ``k`` is more than a layer has.
        """
        for pattern, ratio in self.ratio_pattern.items():
            if any(matches_layer(pattern, member.name) for member in structure.members):
                return ratio * structure.size
        if self.ratio is not None:
            return self.ratio * structure.size
        if self.k is not None:
            most = structure.size * structure.width
            if self.k > most:
                raise ValueError(f"k={self.k}: layer {structure.members[0].name} has {most} channels")
            return max(1, self.k // structure.width)
        assert self.r is not None  # one of the four is given, and num_params was handled by the caller
        parameters = self.r * sum(sum(shape) for shape in structure.matrices.values())
        units = math.ceil(parameters / structure.cost)
        if units > structure.size:
            raise ValueError(
                f"r={self.r}: as many parameters as LoRA of this rank are {units} of {structure.members[0].name}'s "
                f"{structure.size} units; choose a lower r"
            )
        return units


def _kinds(structures: list[Structure]) -> dict[tuple, list[Structure]]:
    kinds: dict[tuple, list[Structure]] = {}
    for structure in structures:
        kinds.setdefault((structure.kind, structure.size), []).append(structure)
    return kinds


def _by_parameters(structures: list[Structure], num_params: int, allocation: str) -> dict[str, int]:
    """Units of each structure: parameters in proportion to the weights, then the remainder, kind by kind."""
    kinds = list(_kinds(structures).values())
    least = sum(s.cost for s in structures)
    if num_params < least:
        raise ValueError(
            f"num_params={num_params}: one unit of each of the {len(structures)} structures are {least} "
            "parameters; give at least these, or fewer target_modules"
        )
    most = sum(s.cost * s.size for s in structures)
    if num_params > most:
        raise ValueError(f"num_params={num_params}: the target layers have {most} parameters")
    share = num_params / most
    counts = [max(1, math.floor(share * kind[0].size)) for kind in kinds]
    rest = num_params - sum(n * len(kind) * kind[0].cost for n, kind in zip(counts, kinds, strict=True))
    while rest < 0:  # a unit each was more than their share for some
        i = max(range(len(kinds)), key=lambda i: counts[i] / kinds[i][0].size if counts[i] > 1 else 0)
        counts[i] -= 1
        rest += len(kinds[i]) * kinds[i][0].cost
    for i, kind in enumerate(kinds):
        more = min(rest // (len(kind) * kind[0].cost), kind[0].size - counts[i])
        counts[i] += more
        rest -= more * len(kind) * kind[0].cost
    units = {s.name: n for n, kind in zip(counts, kinds, strict=True) for s in kind}
    if allocation == "global":  # single units fit where one for each structure of a kind does not
        for kind in kinds:
            more = min(rest // kind[0].cost, sum(s.size - units[s.name] for s in kind))
            units[kind[0].name] += more
            rest -= more * kind[0].cost
    return units


def _warn_unused(structures: list[Structure], patterns: dict[str, float]) -> None:
    names = [member.name for structure in structures for member in structure.members]
    unused = [pattern for pattern in patterns if not any(matches_layer(pattern, name) for name in names)]
    if unused:
        warnings.warn(
            f"ratio_pattern: no target layer matches {', '.join(map(repr, unused))}; the layers are "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
            RuntimeWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class UnitChoice:
    """How units are compared, and which may train.

    Args:
        seed: of random units, together with the structure's name.
        squares: ``squares(structure)``: ``(units,)`` squared scores; random units if None, and where all are zero.
        largest: whether large scores train.
        free: ``free(structure)``: ``(units,)`` bool, units that may train; all if None.
        avoided: names of the adapters that train the other units, for errors.
    """

    seed: int
    squares: Callable[[Structure], Tensor] | None = None
    largest: bool = False
    free: Callable[[Structure], Tensor] | None = None
    avoided: str = ""

    def pool(self, structure: Structure) -> Tensor:
        """``(units,)`` int64, ascending: the units that may train."""
        return torch.arange(structure.size) if self.free is None else self.free(structure).nonzero().squeeze(1)

    def is_idle(self, members: list[Structure]) -> bool:
        """Whether nothing is known of an expert, which no token reached: its channels are random."""
        assert self.squares is not None
        return all(s.kind[:1] == ("experts",) and not bool(self.squares(s).any()) for s in members)

    def best(self, members: list[Structure], count: int, name: str) -> dict[str, Tensor]:
        """The ``count`` best units of some structures together, ``{structure name: (units,) int64, ascending}``.

        Raises:
            ValueError: fewer may train.
        """
        pools = [self.pool(structure) for structure in members]
        sizes = [pool.numel() for pool in pools]
        if count > sum(sizes):
            raise ValueError(
                f"layer {members[0].members[0].name}: {count} units are to train, but only {sum(sizes)} of "
                f"{sum(s.size for s in members)} are left by avoid=[{self.avoided}]; lower the budget"
            )
        if self.squares is None or self.is_idle(members):
            picked = sample_without_replacement(sum(sizes), count, seed=self.seed, name=name)
        else:
            scores = [self.squares(s).cpu()[pool] for s, pool in zip(members, pools, strict=True)]
            picked = topk_indices(torch.cat(scores), count, self.largest, name=name)
        is_picked = torch.zeros(sum(sizes), dtype=torch.bool).index_fill_(0, picked, True).split(sizes)
        return {s.name: pool[mask] for s, pool, mask in zip(members, pools, is_picked, strict=True)}


def choose_units(structures: list[Structure], budget: UnitBudget, choice: UnitChoice) -> dict[str, Tensor]:
    """The units that train, ``{structure name: (units,) int64, ascending}``.

    Raises:
        ValueError: a budget that does not fit.
    """
    _warn_unused(structures, budget.ratio_pattern)
    if budget.num_params is None:
        wanted: Mapping[str, float] = {s.name: budget.wanted(s) for s in structures}
    else:
        wanted = _by_parameters(structures, budget.num_params, budget.allocation)
    chosen: dict[str, Tensor] = {}
    for number, kind in enumerate(_kinds(structures).values()):
        groups = [[structure] for structure in kind] if budget.allocation == "per_layer" else [kind]
        for members in groups:
            count = max(1, round(sum(wanted[s.name] for s in members)))
            name = members[0].name if len(members) == 1 else f"global {number}"
            chosen.update(choice.best(members, count, name))
    return chosen
