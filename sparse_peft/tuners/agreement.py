"""Whether processes that train one adapter have the same positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..dynamics.collectives import Collectives
from ..support import Support
from .delta import Delta


def fingerprint(support: Support) -> int:
    """A number that other positions most probably do not have."""
    weights = 2 * torch.arange(support.nnz, device=support.device) + 1
    return int((support.indices.long() * weights).sum())


def check_agreement(adapter: str, states: Mapping[str, Any], processes: Collectives) -> None:
    """Refuse to train where processes have different positions, of which gradients would be averaged all the same.

    Args:
        adapter: its name.
        states: ``{layer name: the adapter's state in it}``.
        processes: that all call this.

    Raises:
        RuntimeError: on every process; names a layer.
    """
    deltas = {name: state for name, state in states.items() if isinstance(state, Delta) and state.is_set}
    found = {name: fingerprint(state.support) for name, state in deltas.items()}
    device = next((state.values.device for state in deltas.values()), torch.device("cpu"))
    if processes.agree([len(found), *found.values()], device):
        return
    others = processes.everyones(found)
    wrong = sorted(name for name in set().union(*others) if len({other.get(name) for other in others}) > 1)
    raise RuntimeError(
        f"layer {wrong[0]} and {len(wrong) - 1} more: the processes have different positions of adapter {adapter!r}, "
        "whose values are averaged or summed over them; make the adapter from one seed or one file on all of them, "
        "and wrap the model (DDP, FSDP2) before the controller is made"
    )
