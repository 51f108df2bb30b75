"""The ledger of a base weight: what the weight holds, what it takes to restore it, and who reads it.

Each transition of a weight - *write* entries into it, *release* it, *merge*, *unmerge* - keeps to three rules.

1. The original of each entry is in the ledger before its first byte changes.
2. What the weight holds is unknown (``content`` is None) until all of it is written. Restoring overwrites whatever is
   there and may be repeated, so an interruption at any line leaves nothing that the next transition does not mend.
3. No other thread computes with the weight meanwhile. Readers register in ``readers`` without a lock; a transition
   closes the ledger, waits until they have left, and opens it again.
"""

from __future__ import annotations

import functools
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from threading import get_ident
from types import CodeType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from ..ops import read_support, resync_supports_, take_supports_
from ..support import Support
from .active_delta import ActiveDelta
from .backups import Backup, EntriesBackup, restore_all
from .changes import Stamp
from .fully_sharded import FullySharded, drop_all, gather_again
from .transitions import exclusive, exclusively, is_within

P = ParamSpec("P")
T = TypeVar("T")

POLL_SECONDS = 5e-5


class Weight(Enum):
    """What a pass wants the weight to be, where it wants no adapters' entries in it."""

    OWN = "the base's own"
    MERGED = "merged"


class Content(Protocol):
    """What a weight holds besides its own entries."""

    def gives_output(self) -> bool:
        """Whether the base layer's own product is the output of the active adapters' layer."""
        ...


class Parameters(Protocol):
    """Parameters by name, as they are now."""

    def get(self, name: str, /) -> Tensor | None: ...


@dataclass(slots=True, eq=False)
class Held:
    """The active adapters' entries.

    Attributes:
        delta: the adapters.
        stamp: what their values were.
        parameters: the base layer's, where the weight must still be the one that was written to.
        weight: that weight.
        is_all: whether the adapters add nothing but these entries.
    """

    delta: ActiveDelta
    stamp: Stamp
    parameters: Parameters
    weight: Tensor
    is_all: bool

    def is_current(self) -> bool:
        """Whether the entries are still those of the adapters' values, in the weight that the layer has."""
        return self.parameters.get("weight") is self.weight and self.stamp.is_current()

    def gives_output(self) -> bool:
        # asked in every pass, so that nothing is called that can be written here
        return self.is_all and self.parameters.get("weight") is self.weight and self.stamp.is_current()


@dataclass(frozen=True, eq=False)
class Merged:
    """Adapters that were merged, and a checksum of what merging wrote; None where a move was interrupted."""

    names: tuple[str, ...]
    checksum: int | None

    def gives_output(self) -> bool:
        return True


class Ledger:
    """The ledger of one base weight.

    Args:
        layer_name: for messages.

    Attributes:
        backup: what it takes to restore the weight; None while it is the base's own.
        content: what it holds; None while it is the base's own, and after an interrupted transition.
        readers: ``{thread: whether it computes with the weight}``, of all threads that ever did.
        is_closed: whether readers have to wait for the lock.
        turn: the number of times that other threads were kept out, or entries were.
        divided: what FSDP2 makes of the weight, of which the ledger's is this process's part; None without it.
    """

    def __init__(self, layer_name: str) -> None:
        self.layer_name = layer_name
        self.backup: Backup | None = None
        self.content: Content | None = None
        self.readers: dict[int, bool] = {}
        self.is_closed = False
        self.turn = 0
        self.divided: FullySharded | None = None
        self.knows_division = False
        self._version: int | None = None
        self._keepers: list[weakref.ref[Any]] = []

    @property
    def is_own(self) -> bool:
        """Whether the weight is the base's own."""
        return self.backup is None

    @property
    def is_merged(self) -> bool:
        return isinstance(self.content, Merged)

    def holds(self, wanted: ActiveDelta | Weight) -> bool:
        """Whether the weight is as a pass wants it."""
        if wanted is Weight.OWN:
            return self.backup is None
        content = self.content
        if wanted is Weight.MERGED:
            return isinstance(content, Merged)
        return isinstance(content, Held) and content.delta is wanted and content.is_current()

    def gives_output(self) -> bool:
        """Whether the base layer's own product is the output of the active adapters' layer, and stays so in a pass.

        All that a settled layer is asked in a pass without gradients, by a thread that is among the readers.
        """
        content = self.content
        return content is not None and not self.is_closed and content.gives_output()

    # ------------------------------------------------------------------ readers

    def read(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``act`` while no other thread changes the weight or the adapters' flags."""
        readers, me = self.readers, get_ident()
        if readers.get(me):
            return act(*args, **kwargs)
        try:
            readers[me] = True
            result = act(*args, **kwargs)
            readers[me] = False
            return result
        except BaseException:
            readers[me] = False
            raise

    def is_read_elsewhere(self) -> bool:
        """Whether another thread computes with the weight.

        Interrupts may leave a thread noted as a reader, so its calls are asked as well. That is enough because a pass
        which begins from now on, in a closed ledger, waits for the lock before it looks at the weight.
        """
        me = get_ident()
        noted = [thread for thread, reads in self.readers.copy().items() if reads and thread != me]
        return any(is_within(thread, READERS) for thread in noted)

    def is_shared(self) -> bool:
        """Whether another thread, which is still there, ever computed with the weight."""
        others = self.readers.copy().keys() - {get_ident()}
        return bool(others) and not others.isdisjoint(sys._current_frames())

    def _wait_for_readers(self) -> None:
        if self.readers.keys() <= {get_ident()}:
            return
        while self.is_read_elsewhere():
            time.sleep(POLL_SECONDS)
        for thread in self.readers.copy().keys() - sys._current_frames().keys():
            self.readers.pop(thread, None)

    # ------------------------------------------------------------------ who needs the base's own weight

    def keep_own_while(self, keeper: object) -> None:
        """Write no entries into the weight as long as this object is alive: it refers to the weight's memory."""
        self._keepers = [known for known in self._keepers if known() is not None] + [weakref.ref(keeper)]
        self.turn += 1

    @property
    def is_kept_own(self) -> bool:
        """Whether the weight must not hold entries now."""
        if self._keepers:
            self._keepers = [known for known in self._keepers if known() is not None]
        return bool(self._keepers)

    # ------------------------------------------------------------------ transitions

    @exclusive
    def release(self) -> None:
        """Give the base its own weight back, bit for bit."""
        release_all([self])

    @exclusive
    def merge(self, backup: Backup, write: Callable[[], object], names: tuple[str, ...]) -> None:
        """Replace the weight by a merged one.

        Args:
            backup: what it takes to restore the weight.
            write: does it.
            names: the adapters that are merged then.
        """

        def change() -> None:
            self.begin(backup)
            write()
            self.commit(Merged(names, backup.checksum()))

        closed([self], change)

    def begin(self, backup: Backup) -> None:
        """Note what restores the weight, before it is written to."""
        self.content = self._version = None
        self.backup = backup

    def commit(self, content: Content) -> None:
        """Note what the weight holds, once all of it is written."""
        if isinstance(self.backup, EntriesBackup) and isinstance(content, Held):
            self._version = self.backup.weight._version
        self.content = content

    def merge_is_unchanged(self) -> bool:
        """Whether a merged weight has the bits that merging wrote."""
        return (
            self.backup is not None
            and isinstance(self.content, Merged)
            and self.content.checksum in (None, self.backup.checksum())
        )

    def check_merge(self) -> None:
        """Refuse to go on with a merged weight that something else wrote to.

        Raises:
            RuntimeError: restoring would undo that change.
        """
        if isinstance(self.content, Merged) and not self.merge_is_unchanged():
            raise RuntimeError(
                f"the base weight of layer {self.layer_name} was changed while adapters "
                f"{', '.join(map(repr, self.content.names))} were merged into it, and unmerging them would undo the "
                "change; keep it with merge_and_unload(), or load the base model anew. Change base weights while "
                "nothing is merged, inside `with sparse_peft.base_weights(model):`"
            )

    def begin_move(self) -> bool:
        """The weight is about to be moved or cast, whereby merged numbers become other bits.

        Returns:
            ``merge_is_unchanged``.
        """
        unchanged = self.merge_is_unchanged()
        if unchanged and isinstance(self.content, Merged):
            self.content = Merged(self.content.names, None)
        return unchanged

    def moved(self, was_unchanged: bool) -> None:
        """The weight was moved or cast: what restores it follows.

        Args:
            was_unchanged: what ``begin_move`` returned.
        """
        if self.backup is not None:
            self.backup.follow()
            if was_unchanged and isinstance(self.content, Merged):
                self.content = Merged(self.content.names, self.backup.checksum())

    def written_elsewhere(self) -> bool:
        """Whether torch counted a write to the weight while it held entries."""
        weight = self.backup.weight if isinstance(self.backup, EntriesBackup) else None
        return weight is not None and self._version is not None and weight._version != self._version

    def originals_at(self, weight: Tensor, support: Support) -> Tensor:
        """The base's own entries at ``support``, which covers whatever is held; nothing is written."""
        entries = read_support(weight.detach(), support)
        if isinstance(self.backup, EntriesBackup):
            where = torch.searchsorted(support.indices, self.backup.support.indices)
            entries[where] = self.backup.originals
        return entries

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        """Of a merged weight all it takes to unmerge the copy; else nothing, because layers are released before."""
        copied = Ledger(self.layer_name).__dict__
        if self.is_merged:
            copied.update(backup=self.backup, content=self.content)
        return copied


def all_give_output(ledgers: Iterable[Ledger]) -> bool:
    """``Ledger.gives_output`` of several weights."""
    for ledger in ledgers:  # noqa: SIM110 - asked in every pass, and a generator is a call for each
        if not ledger.gives_output():
            return False
    return True


def read_all(ledgers: Iterable[Ledger], act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``Ledger.read`` of several weights."""
    me, entered = get_ident(), []
    for ledger in ledgers:
        if not ledger.readers.get(me):
            entered.append(ledger.readers)
    try:
        for readers in entered:
            readers[me] = True
        result = act(*args, **kwargs)
        for readers in entered:
            readers[me] = False
        return result
    except BaseException:
        for readers in entered:
            readers[me] = False
        raise


# The functions in which threads are among the readers: these and those of layers.
READERS: set[CodeType] = {Ledger.read.__code__, read_all.__code__}


def closed(ledgers: Sequence[Ledger], act: Callable[[], T]) -> T:
    """Run ``act`` while no other thread computes with these weights; called with the transitions' lock.

    A ledger that stays closed after a second exception costs its readers the lock, and nothing else.
    """
    opened = [ledger for ledger in ledgers if not ledger.is_closed]
    try:
        for ledger in opened:
            ledger.is_closed = True
            ledger.turn += 1
        for ledger in opened:
            ledger._wait_for_readers()
        result = act()
        for ledger in opened:
            ledger.is_closed = False
        return result
    except BaseException:
        for ledger in opened:
            ledger.is_closed = False
        raise


class HasLedger(Protocol):
    ledger: Ledger


Owner = TypeVar("Owner", bound=HasLedger)


def transition(method: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
    """A method of a layer that runs while no other thread computes with the layer or is in a transition."""

    @functools.wraps(method)
    def exclusive_method(layer: Owner, *args: P.args, **kwargs: P.kwargs) -> T:
        return exclusively(closed, [layer.ledger], lambda: method(layer, *args, **kwargs))

    return exclusive_method


def outside_modes(act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``act``, which writes to weights: no part of what a pass transforms or infers."""
    if torch.is_inference_mode_enabled() or torch._C._are_functorch_transforms_active():
        with torch.inference_mode(False), torch._C._DisableFuncTorch():
            return act(*args, **kwargs)
    return act(*args, **kwargs)


@dataclass(slots=True, eq=False)
class Write:
    """One weight that is to hold entries.

    Attributes:
        ledger: the weight's.
        weight: the parameter.
        support: the entries' positions.
        values: ``(entries,)``.
        scale: factor between the values and the delta.
        content: what the weight holds then; what tells it, given its backup, where that depends on what is written.
    """

    ledger: Ledger
    weight: Tensor
    support: Support
    values: Tensor
    scale: float
    content: Content | Callable[[EntriesBackup], Content]

    def keeps(self, backup: Backup | None) -> bool:
        """Whether the ledger has the originals of these very entries."""
        return isinstance(backup, EntriesBackup) and backup.support is self.support and backup.weight is self.weight


def write_all(writes: Sequence[Write]) -> None:
    """Make weights hold ``round(original + value)`` at the supports, and their own entries elsewhere.

    On a GPU in two launches. Called with the transitions' lock.
    """

    def change() -> None:
        used = drop_all(write.ledger.divided for write in writes)
        others = [w.ledger for w in writes if w.ledger.backup is not None and not w.keeps(w.ledger.backup)]
        if others:
            release_all(others)
        fresh = [write for write in writes if write.ledger.backup is None]
        backups = [EntriesBackup(write.weight, write.support) for write in fresh]
        take_supports_(backups)
        for write, backup in zip(fresh, backups, strict=True):
            write.ledger.begin(backup)
        _resync(writes)
        gather_again(used)

    outside_modes(closed, [write.ledger for write in writes], change)


def _resync(writes: Sequence[Write]) -> None:
    """Write the entries of weights with backups."""
    _refuse_changed([write.ledger for write in writes])
    backups = []
    for write in writes:
        assert isinstance(write.ledger.backup, EntriesBackup)
        backups.append(write.ledger.backup)
        backups[-1].follow()
        write.ledger.begin(backups[-1])
    resync_supports_(backups, [write.values for write in writes], [write.scale for write in writes])
    for write, backup in zip(writes, backups, strict=True):
        content = write.content
        write.ledger.commit(content(backup) if callable(content) else content)


def release_all(ledgers: Iterable[Ledger]) -> None:
    """``Ledger.release`` for many weights, on a GPU in one launch. Called with the transitions' lock."""
    ledgers = [ledger for ledger in ledgers if ledger.backup is not None]
    if not ledgers:
        return

    def change() -> None:
        _refuse_changed(ledgers)
        used = drop_all(ledger.divided for ledger in ledgers)
        _restore(ledgers)
        gather_again(used)

    outside_modes(closed, ledgers, change)


def _restore(ledgers: Sequence[Ledger]) -> None:
    for ledger in ledgers:
        ledger.content = ledger._version = None
    restore_all([ledger.backup for ledger in ledgers if ledger.backup is not None])
    for ledger in ledgers:
        ledger.backup = None


def _refuse_changed(ledgers: Sequence[Ledger]) -> None:
    """Restore all weights and say so, where something else wrote to one that held entries.

    This is a help to users, not what restoring relies on: writes through ``.data`` are not seen.

    Raises:
        RuntimeError: names the layer.
    """
    changed = [ledger for ledger in ledgers if ledger.written_elsewhere()]
    if not changed:
        return
    _restore([ledger for ledger in ledgers if ledger.backup is not None])
    raise RuntimeError(
        f"the base weight of layer {changed[0].layer_name} was changed while it held an adapter's entries, which are "
        "taken out again and leave the base's former ones; change base weights inside `with "
        "sparse_peft.base_weights(model):`"
    )
