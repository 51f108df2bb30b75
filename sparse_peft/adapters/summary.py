"""Contents of an adapter's folder, layer by layer, and its comparison with another."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..registry import method_of
from ..support import Support
from ..tuners.base_config import changed_fields
from ..tuners.base_state import TrainedState
from ..tuners.forms import Entries
from .delta_matrix import DeltaMatrix
from .offline_adapter import StoredAdapter, read_stored

Progress = Callable[[Sequence], Iterable]

FULLEST = 0.1  # share of the rows or columns that concentration looks at


@dataclass(frozen=True)
class LayerSummary:
    """One layer of an adapter; None where a layer has no such part.

    Attributes:
        layer: its name.
        shape: ``[rows, cols]`` of the weight as stored; ``[outputs, inputs]`` where there are only factors.
        parameters: trained.
        entries: of the sparse part.
        rank: of the low-rank part.
        alive: ranks of it that have an effect.
        density: entries, or else parameters, over the weight's size.
        norm: Frobenius norm of the whole delta.
        largest: largest absolute value of the sparse part.
        mean: mean absolute value of it.
        zeros: values of it that are zero.
        rows, cols: rows and columns that have entries.
        row_share, col_share: share of the entries that lies in the fullest tenth of the rows or columns: 0.1 if they
            are spread evenly.
    """

    layer: str
    shape: list[int]
    parameters: int
    entries: int | None
    rank: int | None
    alive: int | None
    density: float
    norm: float
    largest: float | None
    mean: float | None
    zeros: int | None
    rows: int | None
    cols: int | None
    row_share: float | None
    col_share: float | None


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter's folder.

    Attributes:
        folder: its path.
        peft_type: the method's type.
        config: fields that are not the defaults.
        base_model: in its config.
        task_type: in its config.
        parameters: trained, in all layers.
        entries: of the sparse parts.
        weights: of the adapted layers' base weights.
        norm: Frobenius norm of all deltas together.
        file_bytes: of the weights' file.
        saved_whole: names of tensors beside the layers, such as a head or biases.
        layers: one by one.
    """

    folder: str
    peft_type: str
    config: dict[str, Any]
    base_model: str | None
    task_type: str | None
    parameters: int
    entries: int
    weights: int
    norm: float
    file_bytes: int
    saved_whole: list[str]
    layers: list[LayerSummary]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _in_order(layers: Iterable[str]) -> list[str]:
    """Names with their numbers in order: a file has block 10 before block 2."""

    def key(name: str) -> list[tuple[bool, int | str]]:
        return [(True, int(part)) if part.isdigit() else (False, part) for part in name.split(".")]

    return sorted(layers, key=key)


def _fullest_share(lines: Tensor, size: int) -> float:
    """Share of the entries, by their row or column, in the fullest tenth of ``size`` rows or columns."""
    counts = torch.bincount(lines.long(), minlength=size).sort(descending=True).values
    return float(counts[: max(1, math.ceil(FULLEST * size))].sum() / counts.sum())


def _summary_of(adapter: StoredAdapter, layer: str) -> LayerSummary:
    delta = adapter.delta(layer)
    rows, cols = delta.shape if delta.support is None else delta.support.shape
    parameters = sum(parameter.numel() for parameter in adapter.states[layer].parameters())
    entries = None if delta.support is None else delta.support.nnz
    return LayerSummary(
        layer=layer,
        shape=[rows, cols],
        parameters=parameters,
        entries=entries,
        rank=None if delta.factors is None else delta.factors[0].shape[0],
        alive=None if delta.factors is None else _alive(*delta.factors),
        density=(parameters if entries is None else entries) / (rows * cols),
        norm=math.sqrt(max(0.0, delta.square())),
        **_of_entries(delta.entries),
    )


def _alive(down: Tensor, up: Tensor) -> int:
    return int((down.any(1) & up.any(0)).sum())


def _of_entries(entries: Entries | None) -> dict[str, Any]:
    """The fields of ``LayerSummary`` about a sparse part's values and places; None each without any entry."""
    if entries is None or entries.support.nnz == 0:
        names = ("largest", "mean", "zeros", "rows", "cols", "row_share", "col_share")
        return dict.fromkeys(names)
    support, values = entries.support, entries.values
    rows, cols = support.shape
    return {
        "largest": float(values.abs().max()),
        "mean": float(values.abs().mean()),
        "zeros": int((values == 0).sum()),
        "rows": support.rows.unique().numel(),
        "cols": support.cols.unique().numel(),
        "row_share": _fullest_share(support.rows, rows),
        "col_share": _fullest_share(support.cols, cols),
    }


def summarise(folder: str | os.PathLike, progress: Progress = iter) -> AdapterSummary:
    """Summarise an adapter of this package in its folder, without its base model.

    Args:
        folder: the adapter's.
        progress: wraps the list of layers, such as a progress bar.

    Raises:
        ValueError: no adapter of this package, or a damaged one.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> def save(folder, seed):
        ...     config = SparseConfig(density=0.05, seed=seed, init_weights=False, target_modules=["0"])
        ...     get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config).save_pretrained(folder)
        >>> from sparse_peft.adapters import summarise
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, seed=0)
        ...     found = summarise(folder)
        >>> found.entries, found.weights
        (102, 2048)
    """
    adapter = read_stored(folder)
    layers = [_summary_of(adapter, layer) for layer in progress(_in_order(adapter.states))]
    config = adapter.config
    return AdapterSummary(
        folder=adapter.folder,
        peft_type=method_of(config).peft_type,
        config=changed_fields(config),
        base_model=config.base_model_name_or_path,
        task_type=config.task_type,
        parameters=sum(layer.parameters for layer in layers),
        entries=sum(layer.entries or 0 for layer in layers),
        weights=sum(layer.shape[0] * layer.shape[1] for layer in layers),
        norm=math.sqrt(sum(layer.norm**2 for layer in layers)),
        file_bytes=(Path(folder) / "adapter_model.safetensors").stat().st_size,
        saved_whole=sorted(adapter.rest),
        layers=layers,
    )


def supports_of(adapter: StoredAdapter) -> dict[str, Support]:
    """``{layer: trained positions}``, for [`plot_supports`][sparse_peft.report.plot_supports].

    Raises:
        ValueError: an adapter without positions.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import read_stored, supports_of
        >>> config = SparseConfig(num_params=9, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     supports = supports_of(read_stored(folder))
        >>> {layer: support.nnz for layer, support in supports.items()}
        {'0': 9}
    """
    found = {layer: adapter.delta(layer).support for layer in adapter.states}
    supports = {layer: support for layer, support in found.items() if support is not None and support.nnz}
    if not supports:
        raise ValueError(
            f"{adapter.folder}: {type(adapter.config).__name__} trains low-rank factors, which have no positions"
        )
    return supports


@dataclass(frozen=True)
class LayerComparison:
    """One layer that both adapters have.

    Attributes:
        layer: its name.
        entries_a, entries_b: trained entries of each; None without a sparse part.
        common: entries that both train.
        jaccard: common entries over all that either trains; None where one has no sparse part.
        cosine: of the angle between the deltas; None where one is zero.
        norm_a, norm_b: Frobenius norms of the deltas.
        difference: Frobenius norm of their difference.
        identical: whether supports and values are equal, bit for bit.
    """

    layer: str
    entries_a: int | None
    entries_b: int | None
    common: int | None
    jaccard: float | None
    cosine: float | None
    norm_a: float
    norm_b: float
    difference: float
    identical: bool


@dataclass(frozen=True)
class Comparison:
    """Two adapters side by side.

    Attributes:
        a, b: their folders.
        types: of their methods.
        only_a, only_b: layers that only one has.
        settings: ``{field: [value of a, value of b]}`` of fields that both configs have and that differ.
        jaccard, cosine: over all common layers together, as in the layers.
        norm_a, norm_b: of all layers of each.
        difference: Frobenius norm of the difference over all layers, one that an adapter lacks being zero.
        identical: whether they have the same layers, all identical, and the same tensors beside them.
        layers: the common ones.
    """

    a: str
    b: str
    types: list[str]
    only_a: list[str]
    only_b: list[str]
    settings: dict[str, list[Any]]
    jaccard: float | None
    cosine: float | None
    norm_a: float
    norm_b: float
    difference: float
    identical: bool
    layers: list[LayerComparison]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Products:
    """Inner products of two deltas and numbers of their entries, of one layer or of several together."""

    inner: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0
    common: int = 0
    either: int = 0

    @classmethod
    def of(cls, a: DeltaMatrix, b: DeltaMatrix) -> _Products:
        found = cls(a.inner(b), a.square(), b.square())
        if a.support is not None and b.support is not None:
            found.common = a.support.intersection_size(b.support)
            found.either = a.support.nnz + b.support.nnz - found.common
        return found

    def add(self, other: _Products) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def jaccard(self) -> float | None:
        return self.common / self.either if self.either else None

    @property
    def cosine(self) -> float | None:
        if self.square_a <= 0 or self.square_b <= 0:
            return None
        return max(-1.0, min(1.0, self.inner / math.sqrt(self.square_a * self.square_b)))

    @property
    def norm_a(self) -> float:
        return math.sqrt(self.square_a)

    @property
    def norm_b(self) -> float:
        return math.sqrt(self.square_b)

    @property
    def difference(self) -> float:
        return math.sqrt(max(0.0, self.square_a + self.square_b - 2 * self.inner))


def _identical(a: TrainedState, b: TrainedState) -> bool:
    return _equal(*({**dict(state.named_parameters()), **state.file_tensors()} for state in (a, b)))


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def compare(a: str | os.PathLike, b: str | os.PathLike, progress: Progress = iter) -> Comparison:
    """Compare two adapters of this package, of one method or of two, in their folders.

    Args:
        a: folder of the first.
        b: folder of the second.
        progress: wraps the list of common layers.

    Raises:
        ValueError: no adapters of this package, damaged ones, or ones for weights of different shapes.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> def save(folder, seed):
        ...     config = SparseConfig(density=0.05, seed=seed, init_weights=False, target_modules=["0"])
        ...     get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config).save_pretrained(folder)
        >>> from sparse_peft.adapters import compare
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for seed in (0, 1):
        ...         save(f"{folder}/{seed}", seed)
        ...     found = compare(f"{folder}/0", f"{folder}/1")
        >>> [layer.layer for layer in found.layers], found.identical
        (['0'], False)
    """
    first, second = read_stored(a), read_stored(b)
    total, layers = _Products(), []
    for name in progress(_in_order(first.states.keys() & second.states.keys())):
        products, layer = _compare_layer(name, first, second)
        total.add(products)
        layers.append(layer)
    only_a = _in_order(first.states.keys() - second.states.keys())
    only_b = _in_order(second.states.keys() - first.states.keys())
    total.square_a += sum(first.delta(layer).square() for layer in only_a)
    total.square_b += sum(second.delta(layer).square() for layer in only_b)
    same_layers = not only_a and not only_b and all(layer.identical for layer in layers)
    return Comparison(
        a=first.folder,
        b=second.folder,
        types=[method_of(first.config).peft_type, method_of(second.config).peft_type],
        only_a=only_a,
        only_b=only_b,
        settings=_different_settings(first, second),
        jaccard=total.jaccard,
        cosine=total.cosine,
        norm_a=total.norm_a,
        norm_b=total.norm_b,
        difference=total.difference,
        identical=same_layers and _equal(first.rest, second.rest),
        layers=layers,
    )


def _compare_layer(name: str, a: StoredAdapter, b: StoredAdapter) -> tuple[_Products, LayerComparison]:
    ours, theirs = a.delta(name), b.delta(name)
    _check_shapes(name, ours, theirs, a.folder, b.folder)
    products = _Products.of(ours, theirs)
    entries = [None if delta.support is None else delta.support.nnz for delta in (ours, theirs)]
    return products, LayerComparison(
        layer=name,
        entries_a=entries[0],
        entries_b=entries[1],
        common=None if None in entries else products.common,
        jaccard=products.jaccard,
        cosine=products.cosine,
        norm_a=products.norm_a,
        norm_b=products.norm_b,
        difference=products.difference,
        identical=_identical(a.states[name], b.states[name]),
    )


def _different_settings(a: StoredAdapter, b: StoredAdapter) -> dict[str, list[Any]]:
    ours, theirs = changed_fields(a.config, everything=True), changed_fields(b.config, everything=True)
    return {name: [ours[name], theirs[name]] for name in ours if name in theirs and ours[name] != theirs[name]}


def _check_shapes(layer: str, ours: DeltaMatrix, theirs: DeltaMatrix, a: str, b: str) -> None:
    shapes = [d.support.shape if d.support is not None else d.shape for d in (ours, theirs)]
    if ours.support is not None and theirs.support is not None:
        fits = shapes[0] == shapes[1]
    else:  # factors do not show the weight's layout
        fits = sorted(shapes[0]) == sorted(shapes[1])
    if not fits:
        raise ValueError(
            f"layer {layer}: {a} is for a weight of {shapes[0][0]} x {shapes[0][1]}, {b} for one of {shapes[1][0]} x "
            f"{shapes[1][1]}; they are for different base models"
        )
