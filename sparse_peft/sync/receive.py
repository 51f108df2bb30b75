"""Applying publications to an engine's weights, which can always go back to the base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ..numerics import among
from ..ops import read_entries, write_entries_
from ..support.support import check_sorted, index_dtype
from .fingerprint import fingerprint
from .layouts import Layout, Place, PlainLayout, Target
from .patches import Kind, PatchError, Publication, WeightPatch

FULL = "ask for a full publication: publisher.publish(full=True)"


@dataclass(frozen=True, eq=False)
class _Backup:
    """Base values. ``indices``: their positions, ``(entries,)`` increasing; None for the whole matrix."""

    indices: Tensor | None
    originals: Tensor


@dataclass(eq=False)
class _Parameter:
    """One parameter of the engine that patches write to.

    Attributes:
        place: where it lies.
        shape: of the whole parameter.
        held: flat positions at which the adapter is, of the whole parameter; None where none are known.
        backup: the base's values that patches have overwritten; None before the first.
    """

    place: Place
    shape: tuple[int, ...]
    held: Tensor | None = None
    backup: _Backup | None = None


@dataclass(frozen=True, eq=False)
class _Write:
    """A checked patch. ``indices``: positions that it writes, None for all."""

    parameter: _Parameter
    patch: WeightPatch
    indices: Tensor | None


@dataclass(eq=False)
class _State:
    run: str | None = None
    sequence: int | None = None  # None: the base, or unknown after an interruption
    parameters: dict[str, _Parameter] = field(default_factory=dict)


class Receiver:
    """Keeps an engine's weights at the last publication.

    Everything of a publication is checked before the first entry is written. Base values are kept before they are
    overwritten, so that a publication that was interrupted is mended by ``restore_`` or by the next full one. The
    engine must not compute meanwhile: pause it, and empty its prefix cache.

    Args:
        target: the engine's model, or ``{name: tensor}``; its tensors are written to in place.
        layout: where the engine keeps parameters; under their own names if None.
        base: fingerprint of the engine's base weights, where this process cannot compute it because it has shards
            only; computed at the first publication if None.

    Attributes:
        sequence: of the publication that the weights hold; None for the base.

    Example:
        >>> receiver = Receiver(engine)
        >>> receiver.apply_(publication)
        >>> receiver.restore_()  # the base again, bit for bit
    """

    def __init__(self, target: Target, layout: Layout | None = None, base: str | None = None):
        self._layout = PlainLayout(target) if layout is None else layout
        self._base = base
        self._state = _State()

    @property
    def sequence(self) -> int | None:
        return self._state.sequence

    @torch.no_grad()
    def apply_(self, publication: Publication) -> None:
        """Write a publication's entries.

        Args:
            publication: the next one, or a full one.

        Raises:
            PatchError: it is of another base, run or sequence than expected, or does not fit the engine's parameters;
                nothing was written.
        """
        self._check_order(publication)
        _check_names(publication)
        fresh = _State() if publication.is_full else self._state
        writes = [self._checked(patch, fresh) for patch in publication.patches]
        self._check_base(publication)
        if publication.is_full:
            self.restore_()
        self._state.sequence = None  # unknown until all is written
        for write in writes:
            self._state.parameters[write.patch.name] = write.parameter
            _keep_originals(write)
            _write(write)
        self._state.run, self._state.sequence = publication.run, publication.sequence

    @torch.no_grad()
    def restore_(self) -> None:
        """Give the engine its base weights back, bit for bit; may be repeated."""
        self._state.sequence = None
        for parameter in self._state.parameters.values():
            _restore(parameter)
        self._state = _State(run=self._state.run)

    # ------------------------------------------------------------------ checks

    def _check_order(self, publication: Publication) -> None:
        state = self._state
        if publication.is_full:
            if publication.run == state.run and (state.sequence or 0) >= publication.sequence:
                raise PatchError(
                    f"publication {publication.sequence} is not newer than {state.sequence}, which the engine has; "
                    "publications were doubled or reordered"
                )
            return
        if state.sequence is None or publication.run != state.run or publication.since != state.sequence:
            has = "the base" if state.sequence is None else f"publication {state.sequence} of run {state.run}"
            raise PatchError(
                f"publication {publication.sequence} applies to {publication.since} of run {publication.run}, and the "
                f"engine has {has}; {FULL}"
            )

    def _check_base(self, publication: Publication) -> None:
        base = self._own_fingerprint(publication) if self._base is None else self._base
        if base != publication.base:
            raise PatchError(
                f"publication {publication.sequence} is for the base {publication.base[:12]}, and the engine has "
                f"{base[:12]}; load the weights that the adapter was trained on, in the trainer's dtype"
            )
        self._base = base

    def _own_fingerprint(self, publication: Publication) -> str:
        """Of the engine's base weights; at a full publication, while nothing of it is written."""
        weights: dict[str, Tensor] = {}
        for patch in publication.patches:
            if patch.name in publication.adapted:
                place = self._layout.place(patch.name, patch.shape)
                if not place.is_whole:
                    raise PatchError(
                        f"{patch.name}: the engine has a shard of it, whose base cannot be checked here; pass "
                        "base=publisher.base, once the whole model was compared"
                    )
                weights[patch.name] = place.matrix.reshape(patch.shape)
        return fingerprint(weights)

    def _checked(self, patch: WeightPatch, state: _State) -> _Write:
        parameter = state.parameters.get(patch.name)
        if parameter is None:
            parameter = _Parameter(self._layout.place(patch.name, patch.shape), tuple(patch.shape))
        indices = _indices_of(patch, parameter)
        _check_values(patch, parameter, prod(patch.shape) if indices is None else indices.numel())
        return _Write(parameter, patch, indices)


def apply_patches_(target: Target, publication: Publication, layout: Layout | None = None) -> Receiver:
    """Apply a full publication to weights that hold the base.

    Args:
        target: the engine's model, or ``{name: tensor}``.
        publication: a full one.
        layout: where the engine keeps parameters; under their own names if None.

    Returns:
        The receiver, which takes the publications that follow.

    Raises:
        PatchError: see ``Receiver.apply_``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.sync import Publisher, apply_patches_
        >>> _ = torch.manual_seed(0)
        >>> engine = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> copied = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> _ = copied.load_state_dict(engine.state_dict())
        >>> config = SparseConfig(density=0.5, init_weights=False, target_modules=["0"])
        >>> model = get_peft_model(copied, config)
        >>> _ = apply_patches_(engine, Publisher(model).publish())
        >>> x = torch.randn(2, 8)
        >>> torch.equal(engine(x), model(x))
        True
    """
    receiver = Receiver(target, layout)
    receiver.apply_(publication)
    return receiver


def _check_names(publication: Publication) -> None:
    """Refuse two patches of one parameter: the second would take the first one's entries for the base's."""
    twice = [name for name, count in Counter(patch.name for patch in publication).items() if count > 1]
    if twice:
        raise PatchError(f"{twice[0]}: two patches in publication {publication.sequence}; {FULL}")


# ------------------------------------------------------------------ one patch


def _indices_of(patch: WeightPatch, parameter: _Parameter) -> Tensor | None:
    """The positions that a patch writes, checked; None for all."""
    if patch.kind is Kind.WHOLE:
        return None
    if patch.kind is Kind.HELD:
        if parameter.held is None:
            raise PatchError(f"{patch.name}: values without positions, and the engine holds none; {FULL}")
        return parameter.held
    if patch.indices is None:
        raise PatchError(f"{patch.name}: a patch of kind {patch.kind.value!r} without positions; it was cut")
    _check_positions(patch.name, "indices", patch.indices, patch.shape)
    if patch.given_up is not None:
        _check_positions(patch.name, "given_up", patch.given_up, patch.shape)
        _check_subset(patch.name, "given up positions", patch.given_up, patch.indices, "indices")
    if patch.kind is Kind.SOME:
        held = patch.indices.new_empty(0) if parameter.held is None else parameter.held
        _check_subset(patch.name, "changed positions", patch.indices, held, "positions that the engine holds")
    return patch.indices


def _check_positions(name: str, field_name: str, indices: Tensor, shape: Sequence[int]) -> None:
    entries, expected = prod(shape), index_dtype(shape)
    if indices.dtype != expected:
        raise PatchError(f"{name}: {field_name} of {entries} entries are {expected} vectors, not {indices.dtype}")
    try:
        check_sorted(indices, entries, field_name, f"a weight of {entries} entries", name)
    except ValueError as error:
        raise PatchError(f"{error}; {FULL}") from error


def _check_subset(name: str, what: str, part: Tensor, whole: Tensor, of: str) -> None:
    if not bool(among(part, whole.to(part.device)).all()):
        raise PatchError(f"{name}: {what} that are not among the {of}; {FULL}")


def _check_values(patch: WeightPatch, parameter: _Parameter, entries: int) -> None:
    dtype = parameter.place.matrix.dtype
    if patch.values.dtype != dtype:
        raise PatchError(
            f"{patch.name}: values are {patch.values.dtype}, the engine's {dtype}; load both models in the same dtype"
        )
    if patch.values.shape != (entries,):
        raise PatchError(f"{patch.name}: {tuple(patch.values.shape)} values for {entries} positions; it was cut")
    if not bool(torch.isfinite(patch.values).all()):
        raise PatchError(f"{patch.name}: values that are not finite")


def _keep_originals(write: _Write) -> None:
    """Keep the base's values at positions that were not written to before; those that are held were."""
    parameter, indices, backup = write.parameter, write.indices, write.parameter.backup
    if write.patch.kind in (Kind.HELD, Kind.SOME) or (backup is not None and backup.indices is None):
        return
    if indices is None:
        parameter.backup = _Backup(None, parameter.place.matrix.clone())
    elif backup is None:
        parameter.backup = _Backup(indices, _read(parameter, indices))
    else:
        parameter.backup = _extended(parameter, backup, indices)


def _extended(parameter: _Parameter, backup: _Backup, indices: Tensor) -> _Backup:
    assert backup.indices is not None
    new = indices[~among(indices, backup.indices.to(indices.device))]
    if new.numel() == 0:
        return backup
    indices, order = torch.cat([backup.indices, new]).sort()
    return _Backup(indices, torch.cat([backup.originals, _read(parameter, new)])[order])


def _read(parameter: _Parameter, indices: Tensor) -> Tensor:
    """The engine's entries at positions; zeros where they lie on another rank."""
    if parameter.place.is_whole:
        return read_entries(parameter.place.matrix, indices.to(parameter.place.matrix.device))
    chosen = parameter.place.choose(indices)
    found = parameter.place.matrix[chosen.rows, chosen.cols]
    return found.new_zeros(indices.numel()).index_copy_(0, chosen.kept, found)


def _write(write: _Write) -> None:
    parameter, patch = write.parameter, write.patch
    if write.indices is None:
        whole = patch.values.view(parameter.shape[0], -1)
        parameter.place.matrix.copy_(parameter.place.part_of(whole))
        return
    _put(parameter, write.indices, patch.values)
    if patch.kind is Kind.POSITIONS:
        given_up = patch.given_up
        kept = None if given_up is None else ~among(write.indices, given_up)
        parameter.held = write.indices if kept is None else write.indices[kept]


def _put(parameter: _Parameter, indices: Tensor, values: Tensor) -> None:
    matrix = parameter.place.matrix
    values = values.to(matrix.device)
    if parameter.place.is_whole:
        write_entries_(matrix, indices.to(matrix.device), values)
        return
    chosen = parameter.place.choose(indices)
    matrix[chosen.rows, chosen.cols] = values[chosen.kept]


def _restore(parameter: _Parameter) -> None:
    backup = parameter.backup
    if backup is None:
        return
    if backup.indices is None:
        parameter.place.matrix.copy_(backup.originals)
    else:
        _put(parameter, backup.indices, backup.originals)
