"""Many adapters of one base model in memory, loaded within a budget of bytes."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..registry import methods
from ..tuners.base_config import BaseSparseConfig
from ..tuners.base_layer import BASE_ADAPTER, TunerLayer
from ..tuners.base_model import BaseSparseModel
from ..tuners.traversal import modules_beside_adapters
from .swap import add_beside, swap_adapter

_UNSETTLED = ""  # no adapter's name


@dataclass
class PoolStatistics:
    """Counters of a pool since it was made.

    Attributes:
        hits: uses of adapters that were loaded already, one for each distinct adapter of a batch.
        misses: uses that had to load one.
        evictions: adapters that were unloaded for others.
        loaded_bytes: memory of the loaded adapters.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    loaded_bytes: int = 0


@dataclass(frozen=True)
class _Entry:
    folder: Path
    config: BaseSparseConfig


def adapter_tensors(model: nn.Module, adapter_name: str) -> Iterator[Tensor]:
    """All tensors of a loaded adapter: values, positions with their row pointers, modules saved whole."""
    for module in modules_beside_adapters(model):
        if isinstance(module, TunerLayer):
            if adapter_name in module.deltas:
                yield from module.settled(adapter_name).kept_tensors()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield from _wrapper_tensors(module, adapter_name)


def _wrapper_tensors(wrapper: AuxiliaryTrainingWrapper, adapter_name: str) -> Iterator[Tensor]:
    """An adapter's tensors in a wrapper of PEFT's: those of a module saved whole, or of trained tokens."""
    for child in wrapper.modules():
        part, tensor = child._modules.get(adapter_name), child._parameters.get(adapter_name)
        if part is not None:
            yield from part.parameters()
            yield from part.buffers()
        if tensor is not None:
            yield tensor


def adapter_bytes(model: nn.Module, adapter_name: str) -> int:
    """Bytes of memory that a loaded adapter takes besides the base model."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in adapter_tensors(model, adapter_name)
    }
    return sum(storages.values())


class AdapterPool:
    """Serves many adapters of one method from one base model in memory.

    Adapters are registered by name and folder, and loaded when they are first used. Beyond the budget, the least
    recently used ones are unloaded; pinned ones stay. During a load the budget may be exceeded by the new adapter.

    One thread uses the model at a time, because a base weight holds one adapter's entries at a time: ``use`` and
    ``use_batch`` wait for each other, and for ``add``, ``remove`` and ``pin``.

    Args:
        model: the base model, without adapters; it is put in evaluation mode and its layers are wrapped in place.
        max_bytes: of all loaded adapters; None for no limit.
        check_base_name: refuse adapters whose config names another base model than ``model.name_or_path``. Only the
            last part of the names is compared, so that a local copy of a hub's model passes. The shapes of all
            weights are compared in any case.

    Raises:
        TypeError: the model has adapters already.
        ValueError: a budget that is not positive.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import AdapterPool
        >>> def base():
        ...     torch.manual_seed(0)
        ...     return torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     get_peft_model(base(), SparseConfig(target_modules=["0"])).save_pretrained(folder)
        ...     pool = AdapterPool(base(), max_bytes=2**20)
        ...     pool.add("first", folder)
        ...     with pool.use("first") as model:
        ...         outputs = model(torch.ones(1, 64))
        >>> pool.statistics.misses
        1
    """

    def __init__(self, model: nn.Module, max_bytes: int | None = None, *, check_base_name: bool = True):
        if isinstance(model, PeftModel) or any(isinstance(module, TunerLayer) for module in model.modules()):
            raise TypeError(
                f"model: an AdapterPool is made of the base model and loads adapters by itself, this "
                f"{type(model).__name__} has some already; save them, and register their folders with add()"
            )
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes}: a positive number of bytes is expected, or None for no limit")
        self._base = model.eval()
        self._peft: PeftModel | None = None
        self.max_bytes = max_bytes
        self.check_base_name = check_base_name
        self.statistics = PoolStatistics()
        self._entries: dict[str, _Entry] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()  # of the loaded ones, least recently used first
        self._known_sizes: dict[str, int] = {}
        self._pinned: set[str] = set()
        self._active: str | None = None  # or _UNSETTLED: not the same in all layers
        self._in_use: tuple[str, ...] | None = None
        self._lock = threading.RLock()

    # ------------------------------------------------------------------ the register

    def add(self, name: str, folder: str | os.PathLike, *, pinned: bool = False) -> None:
        """Register an adapter's folder, as ``save_pretrained`` writes it; only its config is read.

        Args:
            name: in this pool.
            folder: a folder, or a repository on the hub.
            pinned: keep it loaded once it is.

        Raises:
            ValueError: the name is taken, or the adapter is of another method than the others, of another base model,
                or trains the base's own biases, which several adapters cannot share.
        """
        with self._lock:
            if not name or "." in name or name == BASE_ADAPTER:
                raise ValueError(f"name={name!r}: a name without dots is expected, other than {BASE_ADAPTER!r}")
            if name in self._entries:
                raise ValueError(f"name={name!r} is registered already, for {self._entries[name].folder}")
            self._entries[name] = _Entry(Path(folder), self._checked_config(name, folder))
            if pinned:
                self._pinned.add(name)

    def _checked_config(self, name: str, folder: str | os.PathLike) -> BaseSparseConfig:
        """The config of an adapter's folder, if the pool can serve it."""
        config, where = PeftConfig.from_pretrained(os.fspath(folder)), f"adapter {name!r} ({folder})"
        if not isinstance(config, BaseSparseConfig):
            kind, known = getattr(config.peft_type, "value", config.peft_type), [m.peft_type for m in methods()]
            raise ValueError(f"{where} is of PEFT type {kind}; a pool serves {', '.join(known)}")
        for other, entry in self._entries.items():
            if entry.config.method != config.method:
                raise ValueError(
                    f"{where} is of PEFT type {config.method}, where {other!r} is {entry.config.method}: a pool's "
                    "adapters are of one method; make another pool for it"
                )
        if config.bias != "none":
            raise ValueError(
                f"{where} has bias={config.bias!r}: it trains the base's own biases, which no other adapter could "
                "share; merge it into a model of its own, or train with bias='none'"
            )
        made_for, own = config.base_model_name_or_path, getattr(self._base, "name_or_path", None)
        if self.check_base_name and made_for and own and Path(made_for).name != Path(own).name:
            raise ValueError(
                f"{where} was made for the base model {made_for!r}, this pool's is {own!r}; load it on its own base, "
                "or pass check_base_name=False if the two are the same"
            )
        return config

    def replace(self, name: str, folder: str | os.PathLike) -> None:
        """Register another folder under an adapter's name, such as a newer version of it.

        A loaded adapter gets the new values in place ([`swap_adapter`][sparse_peft.adapters.swap_adapter]), or is
        loaded anew where its layers are other ones.

        Raises:
            ValueError: no such adapter; or the new one does not fit, or is damaged: the old one stays registered.
        """
        with self._lock:
            self._require_known([name])
            self._require_idle(f"replace({name!r})")
            before, self._entries[name] = self._entries[name], _Entry(Path(folder), self._checked_config(name, folder))
            try:
                if name in self._sizes:
                    self._renew(name)
            except BaseException:
                self._entries[name] = before
                self._known_sizes.pop(name, None)
                raise

    def _renew(self, name: str) -> None:
        """Make a loaded adapter what its folder has now."""
        assert self._peft is not None
        try:
            swap_adapter(self._peft, self._entries[name].folder, name)
        except ValueError:  # other layers; or a damaged file, which loading refuses as well
            self._unload(name)
            self._load(name)
            return
        self._resize(name)

    def _resize(self, name: str) -> None:
        """Note the size of a loaded adapter, which may have grown at the cost of others."""
        size = self._known_sizes[name] = adapter_bytes(self._base, name)
        self.statistics.loaded_bytes += size - self._sizes[name]
        self._sizes[name] = size
        self._in_use = (name,)
        try:
            self._free(0, name)
        except ValueError:
            self._unload(name)
            raise
        finally:
            self._in_use = None

    def remove(self, name: str) -> None:
        """Forget an adapter, and unload it."""
        with self._lock:
            self._require_known([name])
            self._require_idle(f"remove({name!r})")
            self._unload(name)
            del self._entries[name]
            self._pinned.discard(name)
            self._known_sizes.pop(name, None)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter loaded once it is; or not any longer."""
        with self._lock:
            self._require_known([name])
            (self._pinned.add if pinned else self._pinned.discard)(name)

    @property
    def names(self) -> list[str]:
        """The registered adapters."""
        return list(self._entries)

    @property
    def loaded(self) -> list[str]:
        """The loaded adapters, least recently used first."""
        return list(self._sizes)

    # ------------------------------------------------------------------ use

    @contextmanager
    def use(self, name: str | None) -> Iterator[nn.Module]:
        """The base model with this adapter in it (None: with none), to call or to generate with, inside the block.

        The adapter stays in the base weights afterwards, so that using it again costs nothing. To read base weights
        outside of a block, see [`base_weights`][sparse_peft.base_weights].

        Raises:
            ValueError: no such adapter, one that does not fit the base model or the budget, or a damaged file.
            RuntimeError: inside another block of the same thread.
        """
        names = () if name is None else (name,)
        with self._lock, self._using(names, f"use({name!r})"):
            self._activate(name)
            yield self._base

    @contextmanager
    def use_batch(self, names: Sequence[str | None], num_beams: int = 1) -> Iterator[nn.Module]:
        """The base model for batches whose rows use different adapters, inside the block.

        Args:
            names: one for each row; None for the base model itself.
            num_beams: of ``generate``'s beam search, which repeats rows.

        Raises:
            ValueError, RuntimeError: as ``use``.
        """
        distinct = tuple(name for name in dict.fromkeys(names) if name is not None)
        with self._lock, self._using(distinct, "use_batch"):
            if not distinct:
                self._activate(None)
                yield self._base
                return
            row_names = [BASE_ADAPTER if name is None else name for name in names]
            with self._tuner._enable_peft_forward_hooks(adapter_names=row_names, num_beams=num_beams):
                yield self._base

    @contextmanager
    def _using(self, names: tuple[str, ...], what: str) -> Iterator[None]:
        self._require_idle(what)
        self._require_known(names)
        self._in_use = names
        try:
            for name in names:
                self._load(name)
            yield
        finally:
            self._in_use = None

    @property
    def _tuner(self) -> BaseSparseModel:
        assert self._peft is not None  # some adapter was loaded
        assert isinstance(self._peft.base_model, BaseSparseModel)
        return self._peft.base_model

    def _activate(self, name: str | None) -> None:
        if self._peft is None:
            return
        if name != self._active:
            self._active = _UNSETTLED  # should the switch fail half way, the next one is made whole
            self._tuner.set_adapter([] if name is None else name, inference_mode=True)
            self._active = name
        self._tuner.make_resident()

    # ------------------------------------------------------------------ loading

    def _load(self, name: str) -> None:
        if name in self._sizes:
            self.statistics.hits += 1
            self._sizes.move_to_end(name)
            return
        self.statistics.misses += 1
        self._free(self._known_sizes.get(name, 0), name)
        folder = os.fspath(self._entries[name].folder)
        try:
            self._active = _UNSETTLED  # layers that had no adapter so far begin with this one as the active one
            if self._peft is None:
                config = PeftConfig.from_pretrained(folder)
                wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
                self._peft = wrapper(self._base, config, name)
            like = next(iter(self._sizes), None)
            if like is None or not add_beside(self._peft, folder, name, like):
                self._peft.load_adapter(folder, name)
            size = adapter_bytes(self._base, name)
        except Exception as error:
            self._drop(name)
            raise ValueError(f"adapter {name!r} ({folder}) cannot be loaded: {error}") from error
        self._known_sizes[name] = size
        try:
            self._free(size, name)
        except ValueError:
            self._drop(name)
            raise
        self._sizes[name] = size
        self.statistics.loaded_bytes += size

    def _free(self, size: int, newcomer: str) -> None:
        """Unload the least recently used adapters until ``size`` bytes are free."""
        if self.max_bytes is None:
            return
        spare = [name for name in self._sizes if name not in self._pinned and name not in (self._in_use or ())]
        least = self.statistics.loaded_bytes - sum(self._sizes[name] for name in spare) + size
        if least > self.max_bytes:
            kept = [name for name in self._sizes if name not in spare]
            raise ValueError(
                f"max_bytes={self.max_bytes}: adapter {newcomer!r} takes {size} bytes, and {len(kept)} pinned or used "
                f"in the same batch ({', '.join(kept) or 'none'}) take {least - size}; raise max_bytes, unpin some, "
                "or use fewer adapters in a batch"
            )
        for name in spare:
            if self.statistics.loaded_bytes + size <= self.max_bytes:
                return
            self._unload(name)
            self.statistics.evictions += 1

    def _unload(self, name: str) -> None:
        if name in self._sizes:
            self.statistics.loaded_bytes -= self._sizes.pop(name)
            self._drop(name)

    def _drop(self, name: str) -> None:
        """Take the adapter out of the model, which may have only a part of it."""
        if self._peft is None or name not in self._peft.peft_config:
            return
        if self._active in (name, _UNSETTLED):
            self._activate(None)  # PEFT would activate another in its place
        self._tuner.delete_adapter(name)

    # ------------------------------------------------------------------ checks

    def _require_known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._entries]
        if unknown:
            raise ValueError(
                f"no adapter {', '.join(map(repr, unknown))} in this pool; it has "
                f"{', '.join(map(repr, self._entries)) or 'none'}: register it with add(name, folder)"
            )

    def _require_idle(self, what: str) -> None:
        if self._in_use is not None:
            raise RuntimeError(
                f"{what} inside a block that uses {', '.join(map(repr, self._in_use)) or 'the base model'}: a base "
                "weight holds one adapter's entries at a time; leave that block first"
            )
