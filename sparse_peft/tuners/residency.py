"""Where a layer's effective weight comes from, and what the base weight currently holds.

*Resident*: the base weight itself holds the active adapter's entries, ``round(original + value)``; the originals are
kept beside it. The forward pass is the base layer's own product, and giving the originals back restores every bit.
*Overlay*: a base that must not be written is copied panel by panel, with the entries set in the copy.
*Dequantised*: the entries are set in the buffer that a quantisation backend makes anyway.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..numerics import panels
from ..ops import (
    LayerProduct,
    add_to_support_,
    read_support,
    read_supports,
    remember,
    restore_supports_,
    resync_supports_,
)
from ..support import ChannelSupport, Support
from .delta import SparseDelta


@dataclass(frozen=True)
class ActiveDelta:
    """The adapters that act together on one weight.

    Attributes:
        names: the adapters, in order.
        support: the union of their supports.
        slots: for each adapter the places of its entries in the union; None where it is alone.
        csr: the union's row pointers and columns, made beforehand because a compiled graph cannot; None for whole
            channels.
    """

    names: tuple[str, ...]
    support: Support
    slots: tuple[Tensor | None, ...]
    csr: tuple[Tensor, Tensor] | None

    @classmethod
    def join(cls, supports: dict[str, Support]) -> ActiveDelta:
        names, parts = tuple(supports), list(supports.values())
        if len(parts) == 1:
            union, slots = parts[0], (None,)
        else:
            union, slots = parts[0].union(*parts[1:])
        if isinstance(union, ChannelSupport):
            return cls(names, union, tuple(slots), None)
        remember(union)
        return cls(names, union, tuple(slots), (union.row_ptr, union.cols))

    def sum_values(self, values: list[Tensor]) -> Tensor:
        """Values at the union, overlaps added: ``(support.nnz,)``, differentiable."""
        if len(values) == 1:
            return values[0]
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in values))
        total = torch.zeros(self.support.nnz, dtype=dtype, device=values[0].device)
        for slots, part in zip(self.slots, values, strict=True):
            total = total.index_add(0, slots, part.to(dtype))
        return total


def version(tensor: Tensor) -> int:
    """The tensor's count of in-place writes; inference tensors keep none."""
    return 0 if tensor.is_inference() else tensor._version


class Stamp:
    """What the values of some adapters were: equal to another exactly if nothing was written to them in between.

    Compares the tensors themselves, their addresses and torch's counts of in-place writes, never their contents.

    Args:
        deltas: the adapters' trained state.
        sharded: whether FSDP2 gathers the values anew, to another address, for each forward and backward pass.
    """

    def __init__(self, deltas: tuple[SparseDelta, ...], sharded: bool = False):
        self.deltas = deltas
        self.sharded = sharded
        self.supports = tuple(delta.support for delta in deltas)
        self.state = tuple(
            (values, version(values), 0 if sharded else values.data_ptr()) for values in (d.values for d in deltas)
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Stamp)
            and len(self.state) == len(other.state)
            and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(self.state, other.state, strict=True))
            and all(a is b for a, b in zip(self.supports, other.supports, strict=True))
        )

    def is_current(self) -> bool:
        """Whether the adapters' values are still what they were; asked in every pass of every layer."""
        for delta, (values, count, address) in zip(self.deltas, self.state, strict=True):
            if delta._parameters["values"] is not values or version(values) != count:
                return False
            if not self.sharded and values.data_ptr() != address:
                return False
        return True


@dataclass
class Held:
    """What was written into a base weight: enough to take it back, and to know whether it is still current."""

    support: Support
    originals: Tensor
    stamp: object
    version: int


class Residency:
    """The ledger of one base weight: its own entries wherever an adapter's were written over them.

    Its own entries are read anew whenever nothing is held, so a base that was changed in between is never undone.
    """

    def __init__(self, layer_name: str) -> None:
        self.layer_name = layer_name
        self.held: Held | None = None

    def holds(self, stamp: object) -> bool:
        return self.held is not None and self.held.stamp == stamp

    def write(self, weight: Tensor, support: Support, values: Tensor, stamp: object) -> None:
        """Make ``weight`` hold ``round(original + value)`` at ``support``, and its own entries elsewhere."""
        write_all([Write(self, weight, support, values, stamp)])

    def release(self, weight: Tensor) -> None:
        """Give the base its own entries back, bit for bit."""
        release_each([(self, weight)])

    def originals_at(self, weight: Tensor, support: Support) -> Tensor:
        """The base's own entries at ``support``, which covers whatever is held; nothing is written."""
        entries = read_support(weight, support)
        if self.held is not None:
            entries[torch.searchsorted(support.indices, self.held.support.indices)] = self.held.originals
        return entries

    def moved(self, weight: Tensor) -> None:
        """The weight was moved or cast with the entries in it: the kept ones follow."""
        if self.held is not None:
            self.held.support = self.held.support.to(weight.device)
            self.held.originals = self.held.originals.to(weight)
            self.held.version = version(weight)

    def check_untouched(self, weight: Tensor) -> None:
        """Refuse to go on with a weight that something else wrote to while it held entries."""
        if self.held is not None and version(weight) != self.held.version:
            self.held = None
            raise RuntimeError(
                f"the base weight of layer {self.layer_name} was changed while it held an adapter's entries, so the "
                "two cannot be told apart any more; change base weights inside `with sparse_peft.base_weights(model):`"
            )


@dataclass(frozen=True)
class Write:
    """One weight that is to hold entries: arguments of ``Residency.write``."""

    ledger: Residency
    weight: Tensor
    support: Support
    values: Tensor
    stamp: object


def write_all(writes: Sequence[Write]) -> None:
    """``Residency.write`` for many weights, on a GPU in two launches."""
    stale = [(w.ledger, w.weight) for w in writes if w.ledger.held and w.ledger.held.support is not w.support]
    release_each(stale)
    fresh = [w for w in writes if w.ledger.held is None]
    held = [w for w in writes if w.ledger.held is not None]
    for part, take in ((fresh, True), (held, False)):
        if not part:
            continue
        for w in part:
            w.ledger.check_untouched(w.weight)
        weights, supports, values = [w.weight for w in part], [w.support for w in part], [w.values for w in part]
        originals = read_supports(weights, supports) if take else [w.ledger.held.originals for w in part]
        resync_supports_(weights, supports, originals, values)
        for w, own in zip(part, originals, strict=True):
            w.ledger.held = Held(w.support, own, w.stamp, version(w.weight))


def release_each(pairs: Sequence[tuple[Residency, Tensor]]) -> None:
    """``Residency.release`` for many weights, on a GPU in one launch."""
    pairs = [(ledger, weight) for ledger, weight in pairs if ledger.held is not None]
    if not pairs:
        return
    for ledger, weight in pairs:
        ledger.check_untouched(weight)
    held = [ledger.held for ledger, _ in pairs]
    restore_supports_([weight for _, weight in pairs], [h.support for h in held], [h.originals for h in held])
    for ledger, _ in pairs:
        ledger.held = None


# Layers whose base weight holds unmerged entries. Every torch optimizer's step gives them back, so that between steps
# the base's parameters are the base's own for whoever reads, saves or compares them; the next forward writes anew.
_holding: weakref.WeakSet = weakref.WeakSet()
_hook = None


def note_holding(layer) -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(lambda *_: release_all())
    _holding.add(layer)


def release_all() -> None:
    release_layers(list(_holding))
    _holding.clear()


@torch.no_grad()
def release_layers(layers: Iterable) -> None:
    """Give the layers' base weights their own entries back; merged adapters stay merged."""
    pairs = [layer.held_weight() for layer in layers]
    with torch.inference_mode(False):
        release_each([pair for pair in pairs if pair is not None])


@torch.no_grad()
def hold_layers(layers: Iterable) -> None:
    """Make the layers' base weights hold their active adapters' entries, where they may and these are known."""
    with torch.inference_mode(False):
        pending = [(layer, layer.pending_write()) for layer in layers]
        pending = [(layer, write) for layer, write in pending if write is not None]
        write_all([write for _, write in pending])
        for layer, _ in pending:
            layer.now_holds()


class ResidentSource:
    """The base weight itself; asked again in backward, it is made to hold what it held in forward.

    Raises:
        RuntimeError: the values changed in between, as autograd does for tensors it saved.
    """

    def __init__(self, layer, delta: ActiveDelta | None):
        self.layer = layer
        self.delta = delta
        self.stamp = layer.stamp(delta)
        self.shape, self.product, self.key = layer.stored_shape, layer.product, layer.observer_key

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        self.layer.hold(self.delta, self.stamp)
        weight = self.layer.base_parameter.detach()
        if weight.dtype == dtype:
            yield 0, self.shape[0], weight
            return
        for start, stop in panels(self.shape[0], self.shape[1] * dtype.itemsize):
            yield start, stop, weight[start:stop].to(dtype)

    def after_backward(self) -> None:
        self.layer.expect_step()


class OverlaySource:
    """Copies of the base's rows with the entries set in them, for bases that must not be written."""

    def __init__(self, layer, delta: ActiveDelta):
        self.layer, self.delta, self.stamp = layer, delta, layer.stamp(delta)
        self.shape, self.product, self.key = layer.stored_shape, layer.product, layer.observer_key

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        self.layer.check_stamp(self.delta, self.stamp)
        support, weight = self.delta.support, self.layer.base_parameter.detach()
        values = self.layer.sum_values(self.delta).detach()
        rows, cols = self.shape
        for start, stop in panels(rows, cols * max(dtype.itemsize, weight.dtype.itemsize)):
            panel = weight[start:stop].clone(memory_format=torch.contiguous_format)
            within, first, last = support.of_rows(start, stop)
            add_to_support_(panel, within, values[first:last])
            yield start, stop, panel.to(dtype)

    def after_backward(self) -> None:
        pass


class DequantisedSource:
    """The backend's dequantised buffer with the entries set in it; the packed weight is only read."""

    def __init__(self, layer, delta: ActiveDelta):
        self.layer, self.delta, self.stamp = layer, delta, layer.stamp(delta)
        self.shape, self.product, self.key = layer.stored_shape, layer.product, layer.observer_key

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        self.layer.check_stamp(self.delta, self.stamp)
        buffer = self.layer.dequantised()
        add_to_support_(buffer, self.delta.support, self.layer.sum_values(self.delta).detach())
        yield 0, self.shape[0], buffer.to(dtype)

    def after_backward(self) -> None:
        pass


class DeltaSource:
    """The delta alone, dense, a panel at a time: added to the result of a base layer that must run by itself."""

    def __init__(self, shape: tuple[int, int], support: Support, values: Tensor, product: LayerProduct, key: int):
        self.shape, self.support, self.values = shape, support, values.detach()
        self.product, self.key = product, key

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        rows, cols = self.shape
        for start, stop in panels(rows, cols * dtype.itemsize):
            panel = torch.zeros(stop - start, cols, dtype=dtype, device=self.values.device)
            within, first, last = self.support.of_rows(start, stop)
            add_to_support_(panel, within, self.values[first:last])
            yield start, stop, panel

    def after_backward(self) -> None:
        pass
