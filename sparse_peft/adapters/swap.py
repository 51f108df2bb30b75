"""Hot swap: another adapter's values and positions in an adapter's place, in the same modules and graphs."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, load_peft_weights
from torch import Tensor, nn

from ..tuners.base_config import BaseSparseConfig
from ..tuners.base_model import BaseSparseModel, StatePlan
from ..tuners.contents import Contents, pad_
from ..tuners.delta import Delta
from ..tuners.delta_config import DeltaConfig
from ..tuners.delta_layer import SparseTunerLayer
from ..tuners.files.accepted_tensors import PREFIX, Entries, named_states
from ..tuners.files.adapter_file import AdapterFile, check_claimed_sizes, reading
from ..tuners.ledger import Ledger, closed, outside_modes, release_all
from ..tuners.residency import hold_layers
from ..tuners.transitions import exclusively

# Fields of what an adapter trains besides its layers: a swap leaves that alone.
BESIDE_LAYERS = ("modules_to_save", "trainable_token_indices", "bias")


@dataclass(frozen=True)
class _Target:
    """An adapter that is to be replaced."""

    model: PeftModel
    name: str
    layers: dict[str, SparseTunerLayer[Any]]

    @property
    def tuner(self) -> BaseSparseModel[Any, Any]:
        assert isinstance(self.model.base_model, BaseSparseModel)
        return self.model.base_model

    @property
    def config(self) -> DeltaConfig:
        return cast("DeltaConfig", self.tuner.configs[self.name])

    @property
    def ledgers(self) -> list[Ledger]:
        """Of the layers whose weights hold no merged adapter."""
        return [layer.ledger for layer in self.layers.values() if not layer.ledger.is_merged]

    def contents(self) -> dict[str, Contents]:
        return {layer: Contents.of(module.settled(self.name)) for layer, module in self.layers.items()}

    def put(self, contents: Mapping[str, Contents], config: DeltaConfig) -> None:
        """Replace what the adapter has; may be repeated."""
        for layer, module in self.layers.items():
            module.put_contents(self.name, contents[layer])
        self.tuner.peft_config[self.name] = config


def swap_adapter(
    model: nn.Module, path_or_id: str | os.PathLike, adapter_name: str | None = None, **options: Any
) -> None:
    """Replace an adapter of a model by a saved one, in place: its values, positions, scale and config.

    The modules stay, so a compiled model is not compiled again: at once where both adapters train equally many
    entries of each layer, otherwise after
    [`prepare_for_swaps`][sparse_peft.adapters.prepare_for_swaps]. The outputs are those of the freshly loaded
    adapter, bit for bit; the base weights that held the old entries hold the new ones. Other adapters are left alone.
    All checks of loading apply. After an error, or an interrupt, the old adapter is there, whole.

    Swaps are for inference. Gradients are dropped, and an optimizer keeps the moments of the old values: make a new
    one to train on. Threads that infer meanwhile see each layer's old or new weight; a pass may see some layers
    before and some after the swap, as with ``set_adapter``.

    Args:
        model: a ``PeftModel`` with a sparse delta, SaRA or S²FT adapter, compiled or not.
        path_or_id: the folder of an adapter of the same method, layers and base model, or a repository on the hub.
        adapter_name: the adapter that is replaced, and its name afterwards; by default the active one.
        **options: of the download: ``subfolder``, ``revision``, ``cache_dir``, ``token``.

    Raises:
        TypeError: the model is no ``PeftModel`` with an adapter of this package.
        ValueError: the adapters do not go together, the file is damaged or made for another base, or the adapter is
            merged; nothing is changed.

    Example:
        >>> import copy, tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import swap_adapter
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> config = SparseConfig(density=0.1, target_modules=["0"], init_weights=False)
        >>> first, second = (get_peft_model(copy.deepcopy(base), copy.copy(config)) for _ in range(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     second.save_pretrained(folder)
        ...     swap_adapter(first, folder)
        >>> x = torch.randn(3, 64)
        >>> torch.equal(first(x), second(x))
        True
    """
    outside_modes(_swap, _target_of(model, adapter_name), os.fspath(path_or_id), options)


def add_beside(model: PeftModel, folder: str, name: str, like: str) -> bool:
    """Add a saved adapter for inference, of the method and the layers of one that the model has.

    It takes as long as its own layers and file do, where PEFT's loading passes over all adapters of the model.

    Args:
        model: that has the other adapter.
        folder: of the saved adapter.
        name: the new adapter's.
        like: the other adapter's.

    Returns:
        Whether it was added; if not, nothing is changed, and PEFT's loading adds it or says why it cannot.
    """
    if not isinstance(model.peft_config.get(like), DeltaConfig):
        return False
    try:
        target = _target_of(model, like)
        config, states = _read(AdapterFile(folder), target)
    except (TypeError, ValueError):
        return False
    _record_sizes(target, config, {layer: state.values.numel() for layer, state in states.items()})
    outside_modes(exclusively, _add, target, name, config, states)
    return True


def _add(target: _Target, name: str, config: DeltaConfig, states: Mapping[str, Delta]) -> None:
    for layer, state in states.items():
        target.layers[layer].add_delta(name, state, init_weights=True, inference_mode=True)
    target.tuner.peft_config[name] = config


def _swap(target: _Target, source: str, options: Mapping[str, Any]) -> None:
    _refuse_merged(target)
    config, states = _read(AdapterFile(source, options), target)
    for layer, state in states.items():
        _fit(state, target.layers[layer].deltas[target.name].capacity, source)
    _record_sizes(target, config, {layer: state.values.numel() for layer, state in states.items()})
    new = {layer: Contents.of(state) for layer, state in states.items()}
    exclusively(_exchange, target, new, config)


def prepare_for_swaps(model: nn.Module, folders: Sequence[str | os.PathLike], adapter_name: str | None = None) -> None:
    """Make room for adapters of other sizes, so that swapping them in compiles nothing again.

    Each layer's adapter is padded, with entries of value 0, to the largest that it has in any of these adapters, and
    so are those that are swapped in from then on. Outputs stay the same. PEFT's counterpart for LoRA is
    ``prepare_model_for_compiled_hotswap``. Padding is saved with the adapter.

    Args:
        model: as for [`swap_adapter`][sparse_peft.adapters.swap_adapter], not yet compiled.
        folders: of the adapters that are to be swapped in, or of the largest of them.
        adapter_name: the adapter that will be replaced; by default the active one.

    Raises:
        TypeError, ValueError: as ``swap_adapter``; or the model is compiled already.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import prepare_for_swaps
        >>> def model_of(density):
        ...     base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        ...     return get_peft_model(base, SparseConfig(density=density, target_modules=["0"]))
        >>> model = model_of(0.01)
        >>> with tempfile.TemporaryDirectory() as larger:
        ...     model_of(0.1).save_pretrained(larger)
        ...     prepare_for_swaps(model, [larger])
        >>> model.base_model.model[0].support("default").nnz
        205
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("model: it is compiled already, for the adapter's present sizes; call this before compiling")
    outside_modes(_prepare, _target_of(model, adapter_name), [os.fspath(folder) for folder in folders])


def _prepare(target: _Target, folders: Sequence[str]) -> None:
    _refuse_merged(target)
    wanted = {layer: module.settled(target.name).values.numel() for layer, module in target.layers.items()}
    for folder in folders:
        _, states = _read(AdapterFile(folder), target)
        wanted = {layer: max(size, states[layer].values.numel()) for layer, size in wanted.items()}
    exclusively(_pad, target, wanted)


# ---------------------------------------------------------------------- what is replaced


def _target_of(model: nn.Module, adapter_name: str | None) -> _Target:
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(model, PeftModel) or not isinstance(tuner, BaseSparseModel):
        raise TypeError(
            f"model: a PeftModel with an adapter of this package is expected, not {type(model).__name__}; wrap the "
            "base with get_peft_model or PeftModel.from_pretrained"
        )
    name = _active_name(tuner) if adapter_name is None else adapter_name
    if name not in tuner.configs:
        names = ", ".join(map(repr, tuner.configs))
        raise ValueError(f"adapter_name={name!r}: the model's adapters are {names}")
    layers = [layer for layer in tuner.sparse_layers(tuner.model) if name in layer.deltas]
    swappable = [layer for layer in layers if isinstance(layer, SparseTunerLayer) and layer.adds_entries_only]
    if len(swappable) < len(layers):
        raise ValueError(
            f"adapter {name!r} is of PEFT type {tuner.configs[name].method}: swaps are for methods that train "
            "nothing but entries of the base weights; load the other adapter with load_adapter, activate it with "
            "set_adapter and delete this one"
        )
    _refuse_more_than_layers(tuner.configs[name], f"adapter {name!r}")
    return _Target(model, name, {layer.name: layer for layer in swappable})


def _active_name(tuner: BaseSparseModel[Any, Any]) -> str:
    names = tuner.active_adapters
    if len(names) != 1:
        raise ValueError(
            f"adapter_name: {len(names)} adapters are active ({', '.join(names)}); name the one to replace"
        )
    return names[0]


def _refuse_merged(target: _Target) -> None:
    for layer, module in target.layers.items():
        if target.name in module.merged_adapters:
            raise ValueError(
                f"adapter {target.name!r} is merged into the base weight of layer {layer}: call unmerge_adapter() "
                "before it is swapped"
            )


def _refuse_more_than_layers(config: BaseSparseConfig, which: str) -> None:
    for field in BESIDE_LAYERS:
        value = getattr(config, field)
        if value and value != "none":
            raise ValueError(
                f"{which} has {field}={value!r}: a swap replaces entries of the adapted layers alone; load it with "
                "load_adapter"
            )


# ---------------------------------------------------------------------- what takes its place


def _read(file: AdapterFile, target: _Target) -> tuple[DeltaConfig, dict[str, Delta]]:
    """The config and the trained states of a saved adapter that may take the target's place."""
    with reading(file):
        config = _config_in(file, target)
        check_claimed_sizes(config, target.layers)
        entries = load_peft_weights(file.source, device="cpu", **file.options)
        return config, _states_in(entries, config, target, file.source)


def _config_in(file: AdapterFile, target: _Target) -> DeltaConfig:
    if not file.shapes or file.config_fields is None:
        raise ValueError(f"{file.source}: no {CONFIG_NAME}, or no tensors, in it; a saved adapter is expected")
    old, new = target.config.method, file.config_fields.get("peft_type")
    if new != old:
        raise ValueError(
            f"Incompatible PEFT types found: adapter {target.name!r} is {old}, and {file.source} is {new}; an adapter "
            "is swapped for one of the same method"
        )
    config = type(target.config).from_pretrained(file.source, **file.options)
    assert isinstance(config, DeltaConfig)
    _refuse_more_than_layers(config, file.source)
    config.inference_mode = target.config.inference_mode
    return config


def _fit(state: Delta, capacity: int | None, source: str) -> None:
    """Pad a new state to what the model was prepared for."""
    if capacity is None:
        return
    entries = state.values.numel()
    if entries > capacity:
        raise ValueError(
            f"layer {state.name}: {source} has {entries} entries, and the model is prepared for at most {capacity}; "
            "give this adapter to prepare_for_swaps too, before the model is compiled"
        )
    pad_(state, capacity)


def _record_sizes(target: _Target, config: DeltaConfig, sizes: dict[str, int]) -> Mapping[str, StatePlan]:
    """Have a config record how much each layer trains; returns plans of such states."""
    plans: Mapping[str, StatePlan] = target.tuner.plan_layers(config, dict(target.layers), target.name, sizes)
    return plans


def _states_in(entries: Entries, config: DeltaConfig, target: _Target, source: str) -> dict[str, Delta]:
    """A file's trained states, beside the model; they and the config are checked as on loading.

    Raises:
        ValueError: names the layer, the tensor or the field.
    """
    kind, name = type(target.tuner), target.name
    kind.accept_tensors(entries, target.model, config, name)
    sizes = {layer.removeprefix(PREFIX): size for layer, size in (kind.file_sizes(entries) or {}).items()}
    _check_layers(set(sizes), set(target.layers), name, source)
    plans = _record_sizes(target, config, sizes)
    found: dict[str, Delta] = {}
    for key, layer, old in named_states(target.model, name):
        new = plans[layer.name].make_delta(layer.name)
        assert isinstance(old, Delta) and isinstance(new, Delta)
        of_layer = {tensor: kind._remove_adapter_name_from_key(f"{key}{tensor}", name) for tensor in _names_in(new)}
        found[layer.name] = _filled(new, old, {t: entries[key] for t, key in of_layer.items() if key in entries})
    return found


def _names_in(state: Delta) -> tuple[str, ...]:
    return (state.value_name, *state.position_names)


def _check_layers(found: set[str], wanted: set[str], name: str, source: str) -> None:
    lacking, beside = sorted(wanted - found), sorted(found - wanted)
    if lacking or beside:
        which = f"not for {lacking[0]}" if lacking else f"also for {beside[0]}"
        raise ValueError(
            f"{source}: its entries are for other layers than those of adapter {name!r}: {which} ({len(lacking)} are "
            f"missing, {len(beside)} are too many); an adapter is swapped for one of the same target_modules"
        )


def _filled(new: Delta, old: Delta, tensors: Mapping[str, Tensor]) -> Delta:
    """A new state with a file's tensors, on the device and in the dtype of the old one."""
    parameters = {name: tensor for name, tensor in tensors.items() if name == new.value_name}
    positions = {name: tensor for name, tensor in tensors.items() if name != new.value_name}
    positions = new.take_file(positions, parameters)
    new.to(old.values.device, old.values.dtype)
    with torch.no_grad():
        new.values.copy_(parameters[new.value_name])
    new.keep_positions(positions)
    return new


# ---------------------------------------------------------------------- the exchange, with the transitions' lock


def _exchange(target: _Target, new: Mapping[str, Contents], config: DeltaConfig) -> None:
    """Put new contents in place of the old ones, or leave these whole."""
    _refuse_merged(target)
    old, old_config = target.contents(), target.config
    held = [layer for layer in target.layers.values() if layer.ledger.content is not None and not layer.merged]

    def change() -> None:
        try:
            release_all(target.ledgers)
            target.put(new, config)
            hold_layers(held)
        except BaseException:
            release_all(target.ledgers)
            target.put(old, old_config)
            raise

    closed(target.ledgers, change)


def _pad(target: _Target, sizes: Mapping[str, int]) -> None:
    def change() -> None:
        release_all(target.ledgers)
        for layer, module in target.layers.items():
            state = module.settled(target.name)
            pad_(state, sizes[layer])
            state.capacity = sizes[layer]
            module.put_contents(target.name, Contents.of(state))
        target.tuner.peft_config[target.name] = config

    config = copy.copy(target.config)
    _record_sizes(target, config, dict(sizes))
    closed(target.ledgers, change)
