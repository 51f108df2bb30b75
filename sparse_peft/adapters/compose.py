"""Several saved adapters made into one: weighted sums, TIES, DARE and pruning on the union of their supports.

The mathematics of ``add_weighted_adapter``, without a model: the adapters' files suffice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..ops import Combination
from ..tuners.base_config import BaseSparseConfig
from ..tuners.base_state import TrainedState
from ..tuners.combination import combine_states, combined_config
from .entry_format import named_tensors
from .files import PREFIX, write_adapter
from .offline_adapter import StoredAdapter, entrywise, read_stored


def compose(
    folders: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    combination_type: str = "linear",
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
    svd_rank: int | None = None,
    ignore_base_names: bool = False,
) -> BaseSparseConfig:
    """Make one adapter of several, which ``PeftModel.from_pretrained`` loads as any other.

    Adapters of one method give an adapter of that method; different methods with sparse deltas (``SparseConfig``,
    ``SaRAConfig``, ``S2FTConfig``) give one of [`SparseConfig`][sparse_peft.SparseConfig]. Adapters need not have the
    same layers: one that lacks a layer counts as zero there.

    Modules that an adapter trained whole (a classification head, ``modules_to_save``) are no deltas and are not
    combined. They are those of the one adapter that has them (LT-SFT, section 3: the task's head is the task
    adapter's).

    Args:
        folders: of the adapters.
        output: the new adapter's folder; made if need be.
        weights: one number for each, also negative; by default 1, the sum.
        combination_type: ``"linear"``, ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` or ``"magnitude_prune"``; of
            low-rank factors ``"linear"``, ``"cat"`` or ``"svd"``. See [`Combination`][sparse_peft.ops.Combination].
        density: with pruning: share of each adapter's own entries that is kept, in (0, 1].
        majority_sign_method: with TIES: ``"total"`` or ``"frequency"``.
        seed: with DARE: which entries are dropped.
        svd_rank: with ``"svd"``; by default the largest rank of the adapters.
        ignore_base_names: accept adapters whose configs name different base models, such as a hub name and a local
            copy of it. Shapes are compared in any case.

    Returns:
        The new adapter's config.

    Raises:
        ValueError: adapters of other bases or shapes, a combination or weights that do not fit, modules that several
            adapters trained whole, or a damaged file; nothing is written then.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> def save(folder, seed):
        ...     config = SparseConfig(density=0.05, seed=seed, init_weights=False, target_modules=["0"])
        ...     get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config).save_pretrained(folder)
        >>> from sparse_peft.adapters import compose, summarise
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for seed in (0, 1):
        ...         save(f"{folder}/{seed}", seed)
        ...     config = compose([f"{folder}/0", f"{folder}/1"], f"{folder}/sum", weights=[0.5, 0.5])
        ...     found = summarise(f"{folder}/sum")
        >>> found.entries == config.num_entries["0"] > 102
        True
    """
    how = Combination(combination_type, density, majority_sign_method, seed, svd_rank)
    adapters = read_all(folders, ignore_base_names)
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    tensors = combine_states([adapter.states for adapter in adapters], weights, how, adapters[0].tuner.__name__)
    parts = ", ".join(f"{weight:g} x `{_label(a)}`" for weight, a in zip(weights, adapters, strict=True))
    story = f"Composed of other adapters with `sparse_peft.adapters.compose`, `{how.combination_type}`: {parts}."
    return write_combined(output, adapters, tensors, _only_owner(adapters), story)


def _label(adapter: StoredAdapter) -> str:
    return Path(adapter.folder).name


def read_all(folders: Sequence[str | os.PathLike], ignore_base_names: bool = False) -> list[StoredAdapter]:
    """Read adapters that are to be combined, as adapters of one method.

    Raises:
        ValueError: none, or adapters that do not go together.
    """
    if isinstance(folders, (str, os.PathLike)) or not folders:
        raise ValueError(f"folders={folders!r}: a list of adapters' folders is expected")
    adapters = [read_stored(folder) for folder in folders]
    _check_same_base(adapters, ignore_base_names)
    return _one_method(adapters)


def _check_same_base(adapters: Sequence[StoredAdapter], ignore_base_names: bool) -> None:
    named = [adapter for adapter in adapters if adapter.config.base_model_name_or_path]
    for adapter in named if not ignore_base_names else ():
        ours, theirs = named[0].config.base_model_name_or_path, adapter.config.base_model_name_or_path
        if ours != theirs:
            raise ValueError(
                f"base_model_name_or_path: {named[0].folder} was made for {ours!r} and {adapter.folder} for "
                f"{theirs!r}; deltas of different bases do not add up. If these are names of one model, pass "
                "ignore_base_names=True"
            )
    shapes: dict[str, tuple[str, list[int]]] = {}
    for adapter in adapters:
        for layer, shape in (adapter.config.weight_shapes or {}).items():
            folder, known = shapes.setdefault(layer, (adapter.folder, shape))
            if list(known) != list(shape):
                raise ValueError(
                    f"layer {layer}: {folder} was made for a weight of {known} and {adapter.folder} for one of "
                    f"{shape}; they belong to different base models"
                )


def _one_method(adapters: list[StoredAdapter]) -> list[StoredAdapter]:
    """All as one method's; states that do not combine with their like, and those of several methods, as entries."""
    kinds = {type(adapter.config) for adapter in adapters}
    first: dict[str, TrainedState] = {}
    for adapter in adapters:
        first = {**adapter.states, **first}
    alike = all(first[layer].combines_with(state) for adapter in adapters for layer, state in adapter.states.items())
    are_sparse = all(adapter.is_sparse for adapter in adapters)
    if len(kinds) == 1 and (alike or not are_sparse):
        return adapters
    if not are_sparse:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"adapters of {names}: only sparse deltas of different methods go together; those with low-rank factors "
            "combine with their own kind. Merge one into the base (sparse_peft.adapters.export), train the other on it"
        )
    return [entrywise(adapter) for adapter in adapters]


def _only_owner(adapters: Sequence[StoredAdapter]) -> dict[str, Tensor]:
    """The tensors beside the layers; several adapters may have one only if theirs are equal."""
    rest: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for adapter in adapters:
        for name, tensor in adapter.rest.items():
            if name in rest and not torch.equal(rest[name], tensor):
                raise ValueError(
                    f"{name.removeprefix(PREFIX)}: {owner[name]} and {adapter.folder} both have one that was trained "
                    "whole, and these do not combine; leave it out of all but one adapter, or average adapters of one "
                    "task with sparse_peft.adapters.soup"
                )
            rest.setdefault(name, tensor)
            owner.setdefault(name, adapter.folder)
    return rest


def write_combined(
    output: str | os.PathLike,
    adapters: Sequence[StoredAdapter],
    tensors: dict[str, dict[str, Tensor]],
    rest: dict[str, Tensor],
    story: str,
) -> BaseSparseConfig:
    """Write an adapter made of others.

    Raises:
        ValueError: their configs train different biases, or tokens of the embedding.
    """
    configs = [adapter.config for adapter in adapters]
    config = combined_config(adapters[0].tuner, configs, tensors)
    config.modules_to_save = sorted({name for c in configs for name in c.modules_to_save or ()}) or None
    biases = {c.bias for c in configs} - {"none"}
    if len(biases) > 1:
        raise ValueError(f"bias: the adapters train different ones, {' and '.join(sorted(biases))}")
    config.bias = next(iter(biases), "none")
    tokens = [c.trainable_token_indices for c in configs if c.trainable_token_indices]
    if any(t != tokens[0] for t in tokens):
        raise ValueError("trainable_token_indices: the adapters train different tokens, which do not add up")
    config.trainable_token_indices = tokens[0] if tokens else None
    write_adapter(output, config, {**named_tensors(adapters[0].tuner, tensors), **rest}, story)
    return config
