"""How many units each structure trains, and which."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...numerics import sample_without_replacement, topk_indices
from ...support import matches_layer
from .structures import Structure

UNIT_ALLOCATIONS = ("per_layer", "global")


@dataclass(frozen=True)
class UnitBudget:
    """How much of each structure trains. Exactly one of the first four is given.

    Args:
        ratio: share of the channels.
        k: channels of each layer.
        num_params: parameters in all; as many as whole units allow, never more.
        r: LoRA-rank equivalent: as many units as have the parameters of LoRA of this rank, rounded up.
        ratio_pattern: ``{layer name, suffix or regular expression: share}``, for structures with such a layer.
        allocation: ``"per_layer"``: structures of one kind train equally many units; ``"global"``: together as many,
            wherever the best are.
    """

    ratio: float | None = None
    k: int | None = None
    num_params: int | None = None
    r: int | None = None
    ratio_pattern: dict[str, float] = field(default_factory=dict)
    allocation: str = "per_layer"

    def wanted(self, structure: Structure) -> float:
        """Units of one structure, before rounding; ``num_params`` is not a structure's own affair.

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
        parameters = self.r * sum(sum(member.side.shape) for member in structure.members)
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
    """Units of each structure: parameters shared in proportion to the weights, then what is left, kind by kind."""
    kinds = list(_kinds(structures).values())
    least = sum(s.cost for s in structures)
    if num_params < least:
        raise ValueError(
            f"num_params={num_params}: one unit of each of the {len(structures)} structures are {least} "
            "parameters; give at least so many, or fewer target_modules"
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


def choose_units(
    structures: list[Structure],
    budget: UnitBudget,
    *,
    seed: int,
    squares: Callable[[Structure], Tensor] | None = None,
    largest: bool = False,
    free: Callable[[Structure], Tensor] | None = None,
    avoided: str = "",
) -> dict[str, Tensor]:
    """The units that train, ``{structure name: (units,) int64, ascending}``.

    Args:
        structures: all of them.
        budget: how many.
        seed: of random units, together with the structure's name.
        squares: ``squares(structure)``: ``(units,)`` squared scores; random units if None.
        largest: whether large scores train.
        free: ``free(structure)``: ``(units,)`` bool, units that may train; all if None.
        avoided: names of the adapters that take the others, for errors.

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
        pools = {s.name: (free(s).nonzero().squeeze(1) if free else torch.arange(s.size)) for s in kind}
        if budget.allocation == "per_layer":
            groups = [([s], max(1, round(wanted[s.name]))) for s in kind]
        else:
            groups = [(kind, max(1, round(sum(wanted[s.name] for s in kind))))]
        for members, count in groups:
            available = sum(pools[s.name].numel() for s in members)
            if count > available:
                raise ValueError(
                    f"layer {members[0].members[0].name}: {count} units are to train, but only {available} of "
                    f"{sum(s.size for s in members)} are left by avoid=[{avoided}]; lower the budget"
                )
            name = members[0].name if len(members) == 1 else f"global {number}"
            if squares is None:
                picked = sample_without_replacement(available, count, seed=seed, name=name)
            else:
                scores = torch.cat([squares(s).cpu()[pools[s.name]] for s in members])
                picked = topk_indices(scores, count, largest, name=name)
            offset = 0
            for s in members:
                size = pools[s.name].numel()
                inside = picked[(picked >= offset) & (picked < offset + size)] - offset
                chosen[s.name] = pools[s.name][inside]
                offset += size
    return chosen
