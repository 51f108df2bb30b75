"""Soups: the average of adapters of one task, which differ in seed, data order or hyper-parameters.

On one support the average of the values is exactly the average of the models, with the same number of entries
(Zimmer et al. 2024, section 3). Averages of low-rank factors are not: mean(B) mean(A) is not mean(B A).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..ops import Combination, check_weights
from ..support import Support
from ..tuners.base_config import BaseSparseConfig
from ..tuners.base_state import TrainedState
from ..tuners.combination import combine_states
from .compose import read_all, write_combined
from .entry_format import sparse_state
from .files import PREFIX
from .offline_adapter import StoredAdapter, entrywise

ON_MISMATCH = ("error", "union", "intersection")


@dataclass(frozen=True)
class Soup:
    """An average of adapters, and how far they were apart.

    Attributes:
        config: the average's.
        folders: of the adapters.
        entries: number of trained entries of the average.
        distances: ``(adapters, adapters)`` L2 distances of their deltas, over all layers.
        cosines: ``(adapters, adapters)`` cosines of the angles between them; nan where a delta is zero.
        from_average: ``(adapters,)`` L2 distances from the average.
    """

    config: BaseSparseConfig
    folders: tuple[str, ...]
    entries: int
    distances: list[list[float]]
    cosines: list[list[float]]
    from_average: list[float]


def soup(
    folders: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    on_mismatch: str = "error",
    ignore_base_names: bool = False,
) -> Soup:
    """Average adapters with sparse deltas, and the modules that they trained whole.

    Args:
        folders: of the adapters, all with the same layers.
        output: the average's folder; made if need be.
        weights: one number for each, with the sum 1; by default equal.
        on_mismatch: treatment of different supports: ``"error"``; ``"union"``: an entry that an adapter lacks
            counts as zero, which is the exact average with more entries; ``"intersection"``: only the entries that all
            have, which is none.
        ignore_base_names: as in [`compose`][sparse_peft.adapters.compose].

    Raises:
        ValueError: low-rank factors, different layers, supports or modules, or weights that do not add up to 1;
            nothing is written then.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> def save(folder, seed):
        ...     config = SparseConfig(density=0.05, seed=seed, init_weights=False, target_modules=["0"])
        ...     get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config).save_pretrained(folder)
        >>> from sparse_peft.adapters import soup
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("a", "b"):
        ...         save(f"{folder}/{name}", seed=0)  # the same positions, other values
        ...     average = soup([f"{folder}/a", f"{folder}/b"], f"{folder}/average")
        >>> average.entries, len(average.distances)
        (102, 2)
    """
    if on_mismatch not in ON_MISMATCH:
        raise ValueError(f"on_mismatch={on_mismatch!r}: one of {', '.join(ON_MISMATCH)} is expected")
    adapters = read_all(folders, ignore_base_names)
    _check_averageable(adapters)
    weights = [1 / len(adapters)] * len(adapters) if weights is None else [float(weight) for weight in weights]
    check_weights(weights, len(adapters))
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"weights={weights}: their sum is {sum(weights):g}, an average's is 1; for other sums use "
            "sparse_peft.adapters.compose"
        )
    odd = _mismatch(adapters)
    if odd is not None and on_mismatch == "error":
        raise ValueError(
            f"layer {odd}: the adapters train different entries. Average adapters that were trained on one support, "
            "or pass on_mismatch='union' (exact, with more entries) or 'intersection'"
        )
    if odd is not None and on_mismatch == "intersection":
        adapters = _intersected([entrywise(adapter) for adapter in adapters])
    tensors = combine_states([a.states for a in adapters], weights, Combination("linear"), adapters[0].tuner.__name__)
    story = (
        f"The average of {len(adapters)} adapters, made with `sparse_peft.adapters.soup`: "
        + ", ".join(f"{weight:.4g} x `{Path(a.folder).name}`" for weight, a in zip(weights, adapters, strict=True))
        + "."
    )
    gram = _inner_products(adapters)
    config = write_combined(output, adapters, tensors, _averages(adapters, weights), story)
    return Soup(
        config,
        tuple(adapter.folder for adapter in adapters),
        sum(found["values"].numel() for found in tensors.values()),
        *_geometry(gram, torch.tensor(weights, dtype=torch.float64)),
    )


def greedy_soup(
    folders: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    score: Callable[[Path], float],
    *,
    on_mismatch: str = "error",
    ignore_base_names: bool = False,
) -> Soup:
    """Average those adapters with which the average does not get worse (Wortsman et al. 2022, recipe 1).

    The best adapter comes first; each of the others, best first, stays if the average with it scores no lower.

    Args:
        folders: of the adapters, all with the same layers.
        output: the average's folder; made if need be.
        score: ``score(folder)`` of an adapter, on held-out data: the higher the better. It is called once for each
            adapter and once for each average that is tried.
        on_mismatch: as in [`soup`][sparse_peft.adapters.soup].
        ignore_base_names: as in [`compose`][sparse_peft.adapters.compose].

    Returns:
        The soup; its ``folders`` are those that stayed, in the order in which they came in.

    Raises:
        ValueError: see [`soup`][sparse_peft.adapters.soup].

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import greedy_soup
        >>> def save(folder, seed):
        ...     config = SparseConfig(seed=seed, init_weights=False, target_modules=["0"])
        ...     get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config).save_pretrained(folder)
        ...     return folder
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     members = [save(f"{parent}/{seed}", seed) for seed in (1, 2, 3)]
        ...     found = greedy_soup(members, f"{parent}/soup", score=lambda folder: 0.0, on_mismatch="union")
        >>> len(found.folders)
        3
    """
    if not folders:
        raise ValueError("folders: none given; at least one adapter is expected")
    average = partial(soup, on_mismatch=on_mismatch, ignore_base_names=ignore_base_names)
    scored = sorted(((score(Path(folder)), -number) for number, folder in enumerate(folders)), reverse=True)
    (best, first), *others = scored
    chosen = [folders[-first]]
    with tempfile.TemporaryDirectory(prefix="soup-") as trials:
        for _, number in others:
            candidate = [*chosen, folders[-number]]
            trial = Path(trials) / str(-number)
            average(candidate, trial)
            reached = score(trial)
            if reached >= best:
                chosen, best = candidate, reached
    return average(chosen, output)


def _check_averageable(adapters: Sequence[StoredAdapter]) -> None:
    for adapter in adapters:
        if not adapter.is_sparse:
            raise ValueError(
                f"{adapter.folder}: averages of low-rank factors are not the average of the models, mean(B) mean(A) "
                "is not mean(B A). sparse_peft.adapters.compose(..., combination_type='cat', weights=[1/k] * k) is "
                "the exact average, of as many ranks as all have together, and 'svd' its best approximation"
            )
        missing = sorted(set(adapters[0].states) ^ set(adapter.states))
        if missing:
            raise ValueError(
                f"layer {missing[0]}: {adapters[0].folder} and {adapter.folder} do not both have it; an average is of "
                "adapters with the same layers. sparse_peft.adapters.compose combines others"
            )


def _mismatch(adapters: Sequence[StoredAdapter]) -> str | None:
    """The first layer whose supports differ."""
    for layer, state in adapters[0].states.items():
        support = state.as_sparse().support
        if any(support != adapter.states[layer].as_sparse().support for adapter in adapters[1:]):
            return layer
    return None


def _intersected(adapters: Sequence[StoredAdapter]) -> list[StoredAdapter]:
    """The adapters at their common entries; layers without any are left out."""
    cut: list[dict[str, TrainedState]] = [{} for _ in adapters]
    for layer in adapters[0].states:
        parts = [adapter.states[layer].as_sparse() for adapter in adapters]
        common = parts[0].support.indices
        for part in parts[1:]:
            common = common[part.support.contains(common)]
        if common.numel() == 0:
            continue
        support = Support(parts[0].support.shape, common, validate=False, name=layer)
        for states, part in zip(cut, parts, strict=True):
            states[layer] = sparse_state(support, part.values[part.support.slots(common)])
    if not cut[0]:
        raise ValueError("on_mismatch='intersection': the adapters have no entry in common in any layer; use 'union'")
    return [replace(adapter, states=states) for adapter, states in zip(adapters, cut, strict=True)]


def _averages(adapters: Sequence[StoredAdapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The averages of the tensors beside the layers."""
    for adapter in adapters:
        missing = sorted(set(adapters[0].rest) ^ set(adapter.rest))
        if missing:
            raise ValueError(
                f"{missing[0].removeprefix(PREFIX)}: {adapters[0].folder} and {adapter.folder} do not both have it; "
                "an average is of adapters that trained the same modules"
            )
    averages = {}
    for name, first in adapters[0].rest.items():
        parts = [adapter.rest[name] for adapter in adapters]
        if any(part.shape != first.shape for part in parts) or not first.is_floating_point():
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(f"{name.removeprefix(PREFIX)}: {shapes} of {first.dtype} do not average")
        total = torch.zeros_like(first, dtype=torch.float64)
        for part, weight in zip(parts, weights, strict=True):
            total += part.double() * weight
        averages[name] = total.to(first.dtype)
    return averages


def _inner_products(adapters: Sequence[StoredAdapter]) -> Tensor:
    """``(adapters, adapters)`` float64: inner products of the deltas, over all layers."""
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for layer in adapters[0].states:
        parts = [adapter.states[layer].as_sparse() for adapter in adapters]
        union, slots = parts[0].support.union(*(part.support for part in parts[1:]))
        aligned = torch.zeros(len(parts), union.nnz, dtype=torch.float64)
        for row, slot, part in zip(aligned, slots, parts, strict=True):
            row[slot] = part.values.double()
        gram += aligned @ aligned.t()
    return gram


def _geometry(gram: Tensor, weights: Tensor) -> tuple[list[list[float]], list[list[float]], list[float]]:
    squares = gram.diagonal()
    distances = (squares[:, None] + squares - 2 * gram).clamp_(min=0).sqrt()
    norms = squares.sqrt()
    cosines = gram / (norms[:, None] * norms)
    to_average = gram @ weights
    from_average = (squares - 2 * to_average + weights @ to_average).clamp_(min=0).sqrt()
    return distances.tolist(), cosines.tolist(), from_average.tolist()
