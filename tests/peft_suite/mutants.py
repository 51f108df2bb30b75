"""Deliberately broken tuners, applied in the test process: the suite must notice each, or it proves nothing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

MUTANT_VARIABLE = "SPARSE_PEFT_MUTANT"


def noop_unmerge() -> None:
    """Unmerging forgets that the entries are in the base weight, and leaves them there."""
    from sparse_peft.tuners.delta_layer import SparseTunerLayer

    def unmerge(self: SparseTunerLayer) -> None:
        self.ledger.backup = self.ledger.content = None

    _replace(SparseTunerLayer, "unmerge", unmerge)


def support_not_saved() -> None:
    """Positions are not part of the adapter's file; where they are drawn anew, they are others.

    ``support_redrawn`` is the control: the same, with the positions in the file.
    """
    from sparse_peft.tuners.delta import SparseDelta

    def register_buffer(self: SparseDelta, name: str, tensor: Any, persistent: bool = True) -> None:
        super(SparseDelta, self).register_buffer(name, tensor, persistent=False)

    support_redrawn()
    _replace(SparseDelta, "register_buffer", register_buffer)


def support_of_file_ignored() -> None:
    """Positions are in the adapter's file and are not read."""
    from sparse_peft.tuners.delta import SparseDelta

    original = SparseDelta._load_from_state_dict

    def load(self: SparseDelta, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {f"{prefix}{name}": self._buffers[name] for name in self.position_names if name in self._buffers}
        given = {
            key: tensor for key, tensor in state_dict.items() if key.removeprefix(prefix) not in self.position_names
        }
        original(self, {**given, **own}, prefix, *args)

    support_redrawn()
    _replace(SparseDelta, "_load_from_state_dict", load)


def support_redrawn() -> None:
    """No fault: every draw of a support is another one, as it is after training has moved it."""
    from sparse_peft.tuners.support_recipe import SupportRecipe

    original, count = SupportRecipe.draw, itertools.count(1)

    def draw(self: SupportRecipe, *args: Any) -> Any:
        return original(dataclasses.replace(self, seed=self.seed + next(count)), *args)

    _replace(SupportRecipe, "draw", draw)


def disable_ignored() -> None:
    """The forward pass of a disabled adapter is that of an enabled one."""
    from sparse_peft.tuners.delta_layer import SparseTunerLayer

    original = SparseTunerLayer.forward_step

    def step(self: SparseTunerLayer, *args: Any) -> Any:
        disabled, self._disable_adapters = self._disable_adapters, False
        try:
            return original(self, *args)
        finally:
            self._disable_adapters = disabled

    _replace(SparseTunerLayer, "forward_step", step)


def first_adapter_only() -> None:
    """Of several active adapters only the first one acts."""
    from sparse_peft.tuners.delta_layer import SparseTunerLayer

    original = SparseTunerLayer._active_names
    _replace(SparseTunerLayer, "_active_names", lambda self: original(self)[:1])


def always_trainable() -> None:
    """Adapters that are loaded for inference train."""
    from sparse_peft.tuners.delta_layer import SparseTunerLayer

    original = SparseTunerLayer.set_adapter
    _replace(SparseTunerLayer, "set_adapter", lambda self, names, inference_mode=False: original(self, names, False))


def entries_kept_after_step() -> None:
    """The base weight goes on holding the adapter's entries after an optimizer step."""
    from sparse_peft.tuners import residency

    _replace(residency, "release_stepped", lambda optimizer: None)


FAULTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant
    for mutant in (
        noop_unmerge,
        support_not_saved,
        support_of_file_ignored,
        disable_ignored,
        first_adapter_only,
        always_trainable,
        entries_kept_after_step,
    )
}
CONTROLS: dict[str, Callable[[], None]] = {support_redrawn.__name__: support_redrawn}


def apply_mutant(name: str) -> None:
    """Breaks the tuner in this process.

    Raises:
        ValueError: for a name that is neither in ``FAULTS`` nor in ``CONTROLS``.
        AttributeError: what the mutant replaces is no longer there, so the mutant must be written anew.
    """
    mutants = {**FAULTS, **CONTROLS}
    if name not in mutants:
        raise ValueError(f"{MUTANT_VARIABLE}={name!r}; known: {sorted(mutants)}")
    mutants[name]()


def _replace(owner: Any, name: str, new: Callable) -> None:
    getattr(owner, name)
    setattr(owner, name, new)
