"""Making publications: the difference between two states of an adapter, in as few bytes as possible."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..numerics import among, bits
from ..tuners.residency import base_weights
from .patches import Kind, Publication, WeightPatch
from .snapshot import AdapterSource, Held, Snapshot


def named_patches(
    model: nn.Module, adapter_name: str | None = None, since: Snapshot | None = None, *, explicit: bool = False
) -> Iterator[WeightPatch]:
    """The patches that lead an engine from an earlier state of an adapter, or from the base, to the present one.

    Sparse methods yield the entries of their supports. Methods of low-rank factors or codebooks have no such entries:
    they yield the whole weight of each layer that they train.

    Args:
        model: that has the adapter.
        adapter_name: which; the active one if None.
        since: an earlier ``AdapterSource.snapshot()``; None for the base model.
        explicit: list the positions in every patch, for engines that hold none.

    Yields:
        One patch for each parameter that differs, in the order of the model's layers.

    Raises:
        ValueError: see ``AdapterSource`` and its ``snapshot``.

    Example:
        >>> for patch in named_patches(model):
        ...     flat = engine_weights[patch.name].view(-1)
        ...     flat[patch.indices.long()] = patch.values
    """
    return iter(_changes(AdapterSource(model, adapter_name), since or {}, explicit)[1])


def _changes(source: AdapterSource, old: Snapshot, explicit: bool) -> tuple[Snapshot, tuple[WeightPatch, ...]]:
    """The present snapshot, and the patches that lead to it."""
    with base_weights(source.model):  # once, not for each parameter that is read
        snapshot = source.snapshot(old)
        return snapshot, tuple(_differences(source, old, snapshot, explicit))


def _differences(source: AdapterSource, old: Snapshot, new: Snapshot, explicit: bool) -> Iterator[WeightPatch]:
    """One patch for each parameter whose entries differ between two snapshots of a source."""
    for name, held in new.items():
        patch = _difference(source, name, old.get(name), held, explicit)
        if patch is not None:
            yield patch


def _difference(source: AdapterSource, name: str, old: Held | None, new: Held, explicit: bool) -> WeightPatch | None:
    if new.indices is None:
        same = old is not None and _same_bits(old.values, new.values)
        return None if same else WeightPatch(name, Kind.WHOLE, new.shape, new.values)
    if old is None or old.indices is None:
        return WeightPatch(name, Kind.POSITIONS, new.shape, new.values, new.indices)
    if torch.equal(old.indices, new.indices):
        return _values_patch(name, old, new, explicit)
    return _moved_patch(source, name, old, new)


def _values_patch(name: str, old: Held, new: Held, explicit: bool) -> WeightPatch | None:
    """Positions stand still: all values without positions, or the changed ones with theirs, whichever is smaller."""
    assert new.indices is not None
    changed = bits(old.values) != bits(new.values)
    count, entry = int(changed.count_nonzero()), new.values.element_size()
    if count == 0:
        return None
    if explicit or count * (entry + new.indices.element_size()) < new.values.numel() * entry:
        return WeightPatch(name, Kind.SOME, new.shape, new.values[changed], new.indices[changed])
    return WeightPatch(name, Kind.HELD, new.shape, new.values)


def _moved_patch(source: AdapterSource, name: str, old: Held, new: Held) -> WeightPatch:
    """New positions, together with those that go back to the base."""
    assert old.indices is not None
    assert new.indices is not None
    given_up = old.indices[~among(old.indices, new.indices)]
    indices, order = torch.cat([new.indices, given_up]).sort()
    values = torch.cat([new.values, source.base_entries(name, given_up).to(new.values)])[order]
    return WeightPatch(name, Kind.POSITIONS, new.shape, values, indices, given_up)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@dataclass(frozen=True, eq=False)
class _Sent:
    sequence: int
    snapshot: Snapshot


class Publisher:
    """Publishes an adapter's states to one engine, each as the difference to the last one that the engine has.

    Args:
        model: that has the adapter, not merged yet; it may be in training.
        adapter_name: which; the active one if None.
        waiting: publications that may wait for their acknowledgement at once. Their values are kept meanwhile; the
            oldest are forgotten.

    Attributes:
        base: fingerprint of the adapted layers' own weights; the engine's must have the same.
        run: random name of this publisher.
        sequence: of the last publication; 0 before the first.

    Raises:
        ValueError: see ``AdapterSource``.

    Example:
        >>> publisher, receiver = Publisher(model), Receiver(engine)
        >>> for batch in batches:
        ...     train(model, batch)
        ...     publication = publisher.publish()
        ...     receiver.apply_(publication)
        ...     publisher.acknowledge(publication.sequence)
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None, *, waiting: int = 4):
        if waiting < 1:
            raise ValueError(f"waiting={waiting}: at least one publication must be able to wait")
        self.source, self.waiting = AdapterSource(model, adapter_name), waiting
        self.base = self.source.base_fingerprint()
        self.run = secrets.token_hex(8)
        self.sequence = 0
        self._sent: dict[int, _Sent] = {}
        self._acknowledged: _Sent | None = None

    def publish(self, *, full: bool = False, explicit: bool = False) -> Publication:
        """The patches since the last acknowledged publication.

        Args:
            full: since the base model instead, for an engine that lost or refused one.
            explicit: list the positions in every patch, for engines that hold none.

        Raises:
            ValueError: values that are not finite, or other adapters that are merged; nothing is published.
        """
        old = None if full else self._acknowledged
        snapshot, patches = _changes(self.source, old.snapshot if old else {}, explicit)
        self.sequence += 1
        self._sent[self.sequence] = _Sent(self.sequence, snapshot)
        self._sent.pop(self.sequence - self.waiting, None)
        if old is not None:
            return Publication(self.base, self.run, self.sequence, old.sequence, patches)
        adapted = frozenset(self.source.base_parameters())
        return Publication(self.base, self.run, self.sequence, None, patches, adapted)

    def acknowledge(self, sequence: int) -> None:
        """The engine has this publication: later ones are differences to it.

        Raises:
            ValueError: it was never published, it was forgotten, or a later one was acknowledged already.
        """
        if sequence not in self._sent:
            raise ValueError(
                f"sequence={sequence}: this publisher waits for {', '.join(map(str, self._sent)) or 'none'}; "
                f"acknowledge what publish() returned, once, before {self.waiting} others follow (waiting=)"
            )
        self._acknowledged = self._sent[sequence]
        self._sent = {number: sent for number, sent in self._sent.items() if number > sequence}
