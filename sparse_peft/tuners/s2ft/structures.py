"""Structures: layers whose channels S2FT selects together.

A feed-forward channel is a row of ``up`` and ``gate`` and a column of ``down``; a head is a block of rows of ``q``,
``k`` and ``v`` and a block of columns of ``o``. With grouped queries one key and value head serves several query
heads. Nothing is permuted: a unit of a structure is a list of channels in each of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...calibrate import Side
from .experts import Gate, build_experts
from .members import Member, Structure
from .roles import ATTENTION, IN, OUT, SIDES, Role, role_of


def side_of(name: str, shape: tuple[int, int], in_dim: int, wanted: str) -> str:
    """``"in"`` or ``"out"``: by the layer's role, or its wider side, which is the hidden one, for unknown roles."""
    if wanted != "auto":
        return wanted
    role = role_of(name)
    if role is not None:
        return SIDES[role.kind]
    return "out" if shape[1 - in_dim] > shape[in_dim] else "in"


@dataclass(frozen=True)
class Heads:
    """Numbers of a model's query heads, and of its key and value heads."""

    queries: int
    keys: int

    @classmethod
    def of(cls, model_config: Any) -> Heads | None:
        """From a transformers config; None if it has no numbers of heads."""
        if model_config is None:
            return None
        config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
        get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
        queries = get("num_attention_heads")
        if not isinstance(queries, int):
            return None
        keys = get("num_key_value_heads")
        return cls(queries, keys if isinstance(keys, int) else queries)

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.queries // self.keys

    def fit(self, kind: str, channels: int) -> bool:
        """Whether this number of channels of a ``q``, ``k``, ``v`` or ``o`` is a number of whole heads."""
        return channels % (self.queries if kind in "qo" else self.keys) == 0


def _heads_of(role: Role, side: Side, heads: Heads, by_group: bool) -> Tensor:
    """``(units, channels)`` of a layer's heads, or of its groups of query heads that share a key."""
    units = heads.queries if role.kind in "qo" and not by_group else heads.keys
    return torch.arange(side.size).view(units, -1)


def _channels_of(role: Role, side: Side, heads: Heads) -> Tensor:
    """``(channels of v, channels)``: a channel of ``v``, or its channels in ``o``, one per query head."""
    if role.kind == "v":
        return torch.arange(side.size)[:, None]
    grouped = torch.arange(side.size).view(heads.keys, heads.group, -1)
    return grouped.transpose(1, 2).reshape(-1, heads.group)


def _single(name: str, side: Side, units: Tensor) -> Structure:
    role = role_of(name)
    kind = (role.kind if role else "other", side, units.shape[1])
    return Structure(name, (Member(name, side, units),), kind)


def build(
    sides: dict[str, Side],
    *,
    granularity: str,
    coupled: bool,
    heads: Heads | None,
    gates: Mapping[str, Gate] | None = None,
) -> list[Structure]:
    """The structures of some layers, in the layers' order; each of fused experts has its own.

    Args:
        sides: ``{layer name: its channels}``.
        granularity: ``"channel"`` or ``"head"``; layers other than attention's always train channels.
        coupled: whether layers of one block select together.
        heads: the model's numbers of heads.
        gates: ``{name of fused experts' parameter: how it has the gate's rows}``.

    Raises:
        ValueError: heads are wanted, and the model's config or a layer's size does not fit them.
    """
    gates = gates or {}
    blocks: dict[tuple[str, str, bool], list[str]] = {}
    roles: dict[str, Role] = {}  # of the layers that train the side of their role
    linear = {name: side for name, side in sides.items() if name not in gates}
    for name, side in linear.items():
        role = role_of(name)
        if role is not None and side.is_input == (SIDES[role.kind] == IN):
            roles[name] = role
            key = (role.block, role.family, True) if coupled else (name, role.family, False)
        elif granularity == "head" and role is not None and role.family == ATTENTION:
            raise ValueError(
                f"granularity='head': layer {name} has its heads on its {SIDES[role.kind]}put side, and "
                f"side={IN if side.is_input else OUT!r} trains the other; use side='auto' or granularity='channel'"
            )
        else:
            key = (name, "", False)
        blocks.setdefault(key, []).append(name)
    structures = []
    for (block, family, together), names in blocks.items():
        if family == ATTENTION:
            inside = {name: roles[name] for name in names}
            structures += _attention(block, inside, sides, granularity, heads, together)
        elif together and len(names) > 1 and len({sides[name].size for name in names}) == 1:
            structures.append(_joined(block, "ffn", _identity(names, sides), roles))
        else:
            structures += _apart(_identity(names, sides))
    return structures + build_experts(sides, gates, coupled)


def _identity(names: Iterable[str], sides: dict[str, Side]) -> list[Member]:
    return [Member(name, sides[name], torch.arange(sides[name].size)[:, None]) for name in names]


def _joined(block: str, family: str, members: list[Member], roles: Mapping[str, Role]) -> Structure:
    parts = tuple((roles[m.name].kind, m.side, m.units.shape[1]) for m in members)
    return Structure(f"{block}.{family}", tuple(members), (family, *parts))


def _attention(
    block: str,
    roles: dict[str, Role],
    sides: dict[str, Side],
    granularity: str,
    heads: Heads | None,
    together: bool,
) -> list[Structure]:
    whole = heads is not None and all(heads.fit(role.kind, sides[name].size) for name, role in roles.items())
    fitting = heads if whole else None
    if granularity == "head":
        if fitting is None:
            name = next(iter(roles))
            known = f"{heads.queries} query and {heads.keys} key heads" if heads else "the model's config names none"
            raise ValueError(
                f"granularity='head': the {sides[name].size} channels of layer {name} are not whole heads ({known}); "
                "use granularity='channel', or leave the layer out with exclude_modules"
            )
        kinds = {role.kind for role in roles.values()}
        by_group = bool(kinds & {"k", "v"}) and bool(kinds & {"q", "o"})
        units = {name: _heads_of(role, sides[name], fitting, by_group) for name, role in roles.items()}
        members = [Member(name, sides[name], units[name]) for name in roles]
        return [_joined(block, "heads", members, roles)] if together and len(members) > 1 else _apart(members)
    pair = {role.kind: name for name, role in roles.items() if role.kind in "vo"}
    if together and fitting and len(pair) == 2 and sides[pair["v"]].size * fitting.group == sides[pair["o"]].size:
        of_pair = {pair[kind]: sides[pair[kind]] for kind in "vo"}
        members = [Member(name, side, _channels_of(roles[name], side, fitting)) for name, side in of_pair.items()]
        rest = _identity([name for name in roles if name not in pair.values()], sides)
        return [_joined(block, "values", members, roles), *_apart(rest)]
    # positional rotations mix the channels of q and k, which have no partner of their own
    return _apart(_identity(roles, sides))


def _apart(members: list[Member]) -> list[Structure]:
    return [_single(member.name, member.side, member.units) for member in members]
