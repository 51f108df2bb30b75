"""When base weights hold adapters' entries, and when they are the base's own again.

A forward pass writes the entries of its layer; what needs the base's own weight takes them out. Between the steps of
training the base's parameters are the base's own for everybody who reads, saves or compares them: an optimizer's step
releases the weights whose adapters it trains.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .active_delta import ActiveDelta
from .changes import stepped_by
from .fully_sharded import FullySharded, values_of_own_rows
from .ledger import Held, Ledger, Write, release_all, write_all
from .transitions import exclusively
from .traversal import tuner_layers

# Ledgers of weights with unmerged entries. No WeakSet, which makes a reference of its own at each addition.
_holding: set[weakref.ref[Ledger]] = set()


class HoldingLayer(Protocol):
    """What is asked of a layer whose weight can hold entries."""

    ledger: Ledger

    @property
    def divided(self) -> FullySharded | None: ...

    def pending_delta(self) -> ActiveDelta | None: ...

    def write_of(self, delta: ActiveDelta, values: Tensor | None = None) -> Write: ...


def note_holding(ledger: Ledger) -> None:
    """A weight holds entries from now on; called with the transitions' lock."""
    _holding.add(weakref.ref(ledger))


@torch.compiler.disable
def hold_layers(layers: Iterable[HoldingLayer]) -> None:
    """Make the layers' base weights hold their active adapters' entries, where they may."""
    layers = [layer for layer in layers if not _is_settled(layer.ledger)]
    if layers:
        exclusively(_hold, layers)


def _is_settled(ledger: Ledger) -> bool:
    content = ledger.content
    return content is not None and content.gives_output()


@torch.no_grad()
def _hold(layers: list[HoldingLayer]) -> None:
    with torch.inference_mode(False):
        pending = [(layer, delta) for layer in layers if (delta := layer.pending_delta()) is not None]
        divided = [(layer, delta) for layer, delta in pending if layer.divided is not None]
        values = iter(values_of_own_rows(divided) if divided else ())
        writes = [layer.write_of(delta, None if layer.divided is None else next(values)) for layer, delta in pending]
    write_all(writes)
    for write in writes:
        note_holding(write.ledger)


@torch.compiler.disable
def release_layers(ledgers: Iterable[Ledger]) -> None:
    """Give base weights their own entries back; merged adapters stay merged."""
    held = [ledger for ledger in ledgers if not ledger.is_own and not ledger.is_merged]
    if held:
        exclusively(release_all, held)


def release_stepped(optimizer: Optimizer) -> None:
    """Release the weights whose adapters, or which themselves, an optimizer has stepped."""
    stepped = stepped_by(optimizer)
    holding = {reference: ledger for reference in _holding if (ledger := reference()) is not None}
    release_all(ledger for ledger in holding.values() if _concerns(ledger, stepped))
    _holding.intersection_update([reference for reference, ledger in holding.items() if not ledger.is_own])


def _concerns(ledger: Ledger, stepped: set[int]) -> bool:
    content = ledger.content
    if not isinstance(content, Held):
        return not ledger.is_merged  # a transition was interrupted
    if id(content.weight) in stepped or any(id(mark.tensor) in stepped for mark in content.stamp.marks):
        return True
    # an optimizer that steps copies of the parameters, as DeepSpeed's
    return any(state.backwards and not state.is_stepped for state, _, _ in content.stamp.counts)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if _holding:
        exclusively(release_stepped, optimizer)


register_optimizer_step_post_hook(_after_step)


class _Block:
    """Alive as long as a ``base_weights`` block."""


@contextmanager
def base_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the base weights hold their own entries only, and may be read, compared, saved and changed.

    Adapters that were merged by ``merge_adapter`` stay merged. Passes of active adapters, also those of other threads,
    compute with copies of the weights meanwhile.

    Example:
        >>> import torch
        >>> from peft import get_peft_model

        >>> from sparse_peft import SparseConfig, base_weights
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> before = base[0].weight.detach().clone()
        >>> model = get_peft_model(base, SparseConfig(density=0.05, init_weights=False, target_modules=["0"]))
        >>> _ = model.eval()(torch.ones(1, 64))
        >>> with base_weights(model):
        ...     print(torch.equal(model.base_model.model[0].base_layer.weight, before))
        True
    """
    block = _Block()
    exclusively(_keep_own, [layer.ledger for layer in tuner_layers(model)], block)
    yield model


def _keep_own(ledgers: list[Ledger], block: _Block) -> None:
    for ledger in ledgers:
        ledger.keep_own_while(block)
    release_all(ledger for ledger in ledgers if not ledger.is_merged)
