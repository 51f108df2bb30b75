"""Structures of fused experts: each expert chooses channels of its own.

A hidden channel of an expert is a row of its gate and up projection and a column of its down projection. The
parameters of all experts are stored one above the other, so that the channels of expert ``e`` follow those of
``e - 1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate import Side
from .members import Member, Structure


class Gate(Enum):
    """Where an expert's parameter has the outputs of its gate, beside those of the up projection."""

    NONE = "none"
    FIRST = "first half"
    INTERLEAVED = "every second"

    @classmethod
    def of(cls, holder: nn.Module, parameter: str) -> Gate:
        """Of a parameter in a module of experts."""
        if "gate_up" not in parameter:
            return cls.NONE
        # versions of transformers that do not say so interleave where there are biases, in gpt-oss
        concatenated = getattr(holder, "is_concatenated", not hasattr(holder, f"{parameter}_bias"))
        return cls.FIRST if concatenated else cls.INTERLEAVED

    def parts(self, outputs: int) -> list[Tensor]:
        """``(hidden channels,)`` each: the outputs of the gate and of the up projection."""
        channels = torch.arange(outputs)
        if self is Gate.NONE:
            return [channels]
        return list(channels.chunk(2)) if self is Gate.FIRST else [channels[::2], channels[1::2]]


def expert_side(name: str, wanted: str) -> str:
    """``"in"`` or ``"out"`` of an expert's parameter: the side of the hidden channels."""
    if wanted != "auto":
        return wanted
    return "in" if "down" in name.rpartition(".")[2] else "out"


def build_experts(sides: Mapping[str, Side], gates: Mapping[str, Gate], coupled: bool) -> list[Structure]:
    """The structures of fused experts, one or more for each expert.

    Args:
        sides: ``{layer name: its channels}``.
        gates: ``{name of a parameter: its gate}``.
        coupled: whether the parameters of an expert train the same hidden channels.
    """
    blocks: dict[str, list[str]] = {}
    for name in gates:
        blocks.setdefault(name.rpartition(".")[0] if coupled else name, []).append(name)
    found = []
    for block, names in blocks.items():
        hidden = {name: _hidden_channels(sides[name], gates[name], coupled) for name in names}
        if len({len(parts[0]) for parts in hidden.values()}) > 1 or not _meet(names, sides):
            found += [one for name in names for one in _of_experts(name, {name: hidden[name]}, sides)]
        else:
            found += _of_experts(block, hidden, sides)
    return found


def _meet(names: list[str], sides: Mapping[str, Side]) -> bool:
    """Whether parameters train the hidden channels, which are outputs of one and inputs of the other."""
    return all(("down" in name.rpartition(".")[2]) == sides[name].is_input for name in names)


def _hidden_channels(side: Side, gate: Gate, coupled: bool) -> list[Tensor]:
    whole = torch.arange(side.part.size)
    return [whole] if side.is_input or not coupled else gate.parts(side.part.size)


def _of_experts(block: str, hidden: Mapping[str, list[Tensor]], sides: Mapping[str, Side]) -> list[Structure]:
    """One structure for each expert.

    Args:
        block: of the experts.
        hidden: ``{layer name: channels of one expert}``, each of which belongs to one unit.
        sides: of the layers.
    """
    kind: tuple[Any, ...] = ("experts", *((sides[name], len(parts)) for name, parts in hidden.items()))
    found = []
    for expert in range(sides[next(iter(hidden))].matrices):
        members = [
            Member(name, sides[name], part[:, None] + expert * sides[name].part.size)
            for name, parts in hidden.items()
            for part in parts
        ]
        found.append(Structure(f"{block}[{expert}]", tuple(members), kind))
    return found
