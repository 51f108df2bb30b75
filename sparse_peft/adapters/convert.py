"""Conversion of other programs' sparse adapters, and to PEFT's own SHiRA and Super-Tuning."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import ShiraConfig
from peft import __version__ as peft_version
from torch import Tensor, nn

from ..compat import SupertuningConfig
from ..tuners.base_config import BaseSparseConfig
from ..tuners.delta import SparseDelta
from ..tuners.targets import stored_shape
from .entry_format import sparse_adapter, sparse_state
from .files import PREFIX, write_adapter
from .foreign import (
    ForeignAdapter,
    read_config,
    read_lt_sft,
    read_sara,
    read_shira,
    read_spiel,
    read_supertuning,
    source_format,
)
from .modules_to_save import OTHERS, WholeTensors, save_whole
from .offline_adapter import entries_of, read_stored
from .weight_reader import name_of, structure_of, weights_of

CONVERSION_TARGETS = ("sparse", "shira", "supertuning")
"""Targets of [`convert`][sparse_peft.adapters.convert]; the first is the default."""
FILES = ("lt_sft", "sara")  # formats without a config
READERS = {"SHIRA": read_shira, "SUPERTUNING": read_supertuning, "SFT": read_spiel}


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    to: str = CONVERSION_TARGETS[0],
    *,
    base: nn.Module | str | os.PathLike | None = None,
    others: str = "refuse",
    threshold: float | None = None,
) -> BaseSparseConfig | ShiraConfig | SupertuningConfig:
    """Write an adapter in another program's form, with the same outputs.

    Sources are this package's adapters with sparse deltas, PEFT's SHiRA and Super-Tuning, SpIEL's
    (``AlanAnsell/peft``), LT-SFT's (``pytorch_diff.bin``) and files of SaRA's authors (``sjtuplayer/SaRA``). SHiRA and
    Super-Tuning have one budget for all layers: smaller layers are padded with entries of zero, which a conversion
    back keeps.

    Args:
        source: folder of the adapter; for LT-SFT also the file, and for SaRA the file.
        output: folder; made if need be.
        to: ``"sparse"`` ([`SparseConfig`][sparse_peft.SparseConfig]), ``"shira"`` or ``"supertuning"``.
        base: for other programs' adapters, whose files have no weight shapes: the base model, loaded or its folder.
            By default the folder that the adapter's config names. An LT-SFT file that changes more than linear layers
            also needs its weights, as do SaRA's, whose positions are those of the small ones.
        others: of an LT-SFT or SaRA file's changes of embeddings, norms and biases, and its heads: ``"refuse"``,
            ``"leave_out"``, or ``"save"`` them whole through ``modules_to_save`` and ``bias``.
        threshold: SaRA's, for files without it.

    Returns:
        The new adapter's config.

    Raises:
        ValueError: an adapter that has no such form, is for another base, or is damaged; nothing is written then.

    Example:
        >>> import tempfile, torch
        >>> from peft import ShiraConfig, get_peft_model
        >>> from sparse_peft.adapters import convert
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, ShiraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as shira, tempfile.TemporaryDirectory() as sparse:
        ...     model.save_pretrained(shira)
        ...     config = convert(shira, sparse, base=torch.nn.Sequential(torch.nn.Linear(64, 32)))
        >>> config.num_entries
        {'0': 384}
    """
    if to not in CONVERSION_TARGETS:
        raise ValueError(f"to={to!r}: one of {', '.join(CONVERSION_TARGETS)} is expected")
    if to == "supertuning" and SupertuningConfig is None:
        raise ValueError(f"to={to!r}: needs peft>=0.21, which has Super-Tuning; {peft_version} is installed")
    if others not in OTHERS:
        raise ValueError(f"others={others!r}: one of {', '.join(OTHERS)} is expected")
    form = source_format(source)
    if form in READERS or form in FILES:
        like, states, rest = _read_foreign(Path(source), form, base, others, threshold)
    else:
        stored = read_stored(source)
        like, states, rest = stored.config, entries_of(stored), stored.rest
    config: BaseSparseConfig | ShiraConfig | SupertuningConfig
    if to == "sparse":
        config, tensors = sparse_adapter(like, states)
    else:
        _check_only_deltas(like, to)
        if base is not None:
            _check_linear(structure_of(base), states, to)
        config, tensors = (_to_shira if to == "shira" else _to_supertuning)(like, states)
    write_adapter(output, config, {**tensors, **rest}, f"Converted with `sparse_peft.adapters.convert` from {form}.")
    return config


# ---------------------------------------------------------------------------------------------------- in


def _read_foreign(
    source: Path, form: str, base: nn.Module | str | os.PathLike | None, others: str, threshold: float | None
) -> tuple[Any, dict[str, SparseDelta], dict[str, Tensor]]:
    base = _base(source, form, base)
    structure = structure_of(base)
    shapes = {name: stored_shape(m) for name, m in structure.named_modules() if isinstance(m, nn.Linear)}
    if form == "lt_sft":
        known = {name: tuple(tensor.shape) for name, tensor in structure.state_dict().items()}
        adapter = read_lt_sft(source, shapes, known, getattr(structure, "base_model_prefix", ""))
    elif form == "sara":
        adapter = read_sara(source, structure, weights_of(base, structure), threshold)
    else:
        adapter = READERS[form](source, shapes)
    states = {name: sparse_state(support, values) for name, (support, values) in adapter.deltas.items()}
    like, rest = adapter.like, dict(adapter.rest)
    like.base_model_name_or_path = like.base_model_name_or_path or name_of(base)
    if adapter.others or adapter.whole:
        if others == "refuse":
            names = ", ".join([*adapter.others, *adapter.whole][:3])
            raise ValueError(
                f"{source}: it changes more than linear layers, such as {names}; pass others='save' to store these "
                "whole with the adapter, or others='leave_out'"
            )
        if others == "save":
            whole = _whole(adapter, structure, base, states)
            like.modules_to_save, like.bias = whole.modules, whole.bias
            rest.update(whole.tensors)
    return like, states, rest


def _base(source: Path, form: str, base: nn.Module | str | os.PathLike | None) -> nn.Module | str | os.PathLike:
    if base is not None:
        return base
    named = None if form in FILES else read_config(source).get("base_model_name_or_path")
    if named is None or not Path(named).is_dir():
        raise ValueError(
            f"base: the file of a {form} adapter does not say how large the weights are; pass base=, the loaded base "
            f"model or a local folder of it{f' (its config names {named!r})' if named else ''}"
        )
    return named


def _whole(
    adapter: ForeignAdapter, structure: nn.Module, base: nn.Module | str | os.PathLike, states: dict[str, SparseDelta]
) -> WholeTensors:
    weights = weights_of(base, structure)

    def read(name: str) -> Tensor:
        if name in adapter.whole:
            return adapter.whole[name]
        tensor = weights.read(name)
        if name in adapter.others:
            flat, values = adapter.others[name]
            wide = tensor.reshape(-1).float().index_add(0, flat, values)
            tensor = wide.to(tensor.dtype).view(tensor.shape)
        return tensor

    own = structure.state_dict()
    names = {*adapter.others, *adapter.whole}
    return save_whole(structure, {name: tuple(own[name].shape) for name in names}, states, read)


# ---------------------------------------------------------------------------------------------------- out


def _check_only_deltas(like: Any, to: str) -> None:
    beside = ["tokens of the embedding"] if getattr(like, "trainable_token_indices", None) else []
    if getattr(like, "bias", "none") != "none":
        beside.append("biases")
    if beside:
        raise ValueError(f"to={to!r}: the adapter trains {' and '.join(beside)} too, which {to} adapters cannot hold")


def _check_linear(structure: nn.Module, states: dict[str, SparseDelta], to: str) -> None:
    """Refuse layers that PEFT's methods do not adapt."""
    for name in states:
        kind = type(structure.get_submodule(name))
        if not issubclass(kind, nn.Linear):
            raise ValueError(f"layer {name}: a {kind.__name__}; {to} adapters are for torch.nn.Linear alone")


def _padded(state: SparseDelta, entries: int) -> tuple[Tensor, Tensor]:
    """Flat positions and values, padded to ``entries`` with zeros at the first free positions."""
    support, values = state.support, state().detach().float()
    first = torch.arange(entries)
    free = first[~support.contains(first)][: entries - support.nnz]
    return torch.cat([support.indices.long(), free]), torch.cat([values, values.new_zeros(free.numel())])


def _shared(like: Any, states: dict[str, SparseDelta], to: str) -> dict[str, Any]:
    for name, state in states.items():
        if math.prod(state.shape) >= 2**31:
            raise ValueError(f"layer {name}: a weight of {state.shape} has positions beyond {to}'s int32")
    return {
        "target_modules": sorted(states),
        "modules_to_save": like.modules_to_save,
        "task_type": like.task_type,
        "base_model_name_or_path": like.base_model_name_or_path,
        "revision": like.revision,
    }


def _to_shira(like: Any, states: dict[str, SparseDelta]) -> tuple[ShiraConfig, dict[str, Tensor]]:
    rank = max(-(-state.support.nnz // sum(state.shape)) for state in states.values())
    tensors = {}
    for name, state in states.items():
        rows, cols = state.shape
        if rank * (rows + cols) > rows * cols:
            raise ValueError(
                f"layer {name}: SHiRA has r * (rows + cols) entries in every layer, and the layer with the most takes "
                f"r={rank}: {rank * (rows + cols)} of the {rows * cols} that this one has. Use to='supertuning'"
            )
        flat, values = _padded(state, rank * (rows + cols))
        tensors[f"{PREFIX}{name}.shira_weight"] = values
        tensors[f"{PREFIX}{name}.shira_indices"] = torch.stack([flat // cols, flat % cols]).int()
    return ShiraConfig(r=rank, **_shared(like, states, "SHiRA")), tensors


def _to_supertuning(like: Any, states: dict[str, SparseDelta]) -> tuple[SupertuningConfig, dict[str, Tensor]]:
    sizes = {name: math.prod(state.shape) for name, state in states.items()}
    sparsity = 1 - max(state.support.nnz / sizes[name] for name, state in states.items())
    # PEFT counts int(size * (1 - sparsity)), which rounding may take one entry from
    while any(int(sizes[name] * (1 - sparsity)) < state.support.nnz for name, state in states.items()):
        sparsity = max(0.0, math.nextafter(sparsity, 0) - 1e-15)
    tensors = {}
    for name, state in states.items():
        flat, values = _padded(state, int(sizes[name] * (1 - sparsity)))
        tensors[f"{PREFIX}{name}.supertuning_values"] = values
        tensors[f"{PREFIX}{name}.supertuning_indices"] = flat.int()
    return SupertuningConfig(sparsity=sparsity, **_shared(like, states, "Super-Tuning")), tensors
