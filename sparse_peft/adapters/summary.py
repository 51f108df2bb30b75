"""What an adapter's folder has in it, layer by layer, and what it has in common with another's."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..support import Support
from ..tuners.base_config import changed_fields
from ..tuners.base_state import TrainedState
from .delta_matrix import DeltaMatrix
from .offline_adapter import StoredAdapter, read_stored

Progress = Callable[[Sequence], Iterable]

FULLEST = 0.1  # share of the rows or columns that concentration looks at


@dataclass(frozen=True)
class LayerSummary:
    """One layer of an adapter. What a layer has none of is None.

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
        base_model: what its config says.
        task_type: likewise.
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
    state, delta = adapter.states[layer], adapter.delta(layer)
    support, values = delta.support, delta.values
    rows, cols = support.shape if support is not None else delta.shape
    parameters = sum(parameter.numel() for parameter in state.parameters())
    has_entries = support is not None and support.nnz > 0
    return LayerSummary(
        layer=layer,
        shape=[rows, cols],
        parameters=parameters,
        entries=None if support is None else support.nnz,
        rank=None if delta.factors is None else delta.factors[0].shape[0],
        alive=_alive(delta),
        density=(parameters if support is None else support.nnz) / (rows * cols),
        norm=math.sqrt(max(0.0, delta.square())),
        largest=float(values.abs().max()) if has_entries else None,
        mean=float(values.abs().mean()) if has_entries else None,
        zeros=int((values == 0).sum()) if has_entries else None,
        rows=support.rows.unique().numel() if has_entries else None,
        cols=support.cols.unique().numel() if has_entries else None,
        row_share=_fullest_share(support.rows, rows) if has_entries else None,
        col_share=_fullest_share(support.cols, cols) if has_entries else None,
    )


def _alive(delta: DeltaMatrix) -> int | None:
    if delta.factors is None:
        return None
    down, up = delta.factors
    return int((down.any(1) & up.any(0)).sum())


def summarise(folder: str | os.PathLike, progress: Progress = iter) -> AdapterSummary:
    """Look at an adapter of this package in its folder; its base model is not needed.

    Args:
        folder: the adapter's.
        progress: wraps the list of layers that is gone through, such as a progress bar.

    Raises:
        ValueError: no adapter of this package, or a damaged one.
    """
    adapter = read_stored(folder)
    layers = [_summary_of(adapter, layer) for layer in progress(_in_order(adapter.states))]
    config = adapter.config
    return AdapterSummary(
        folder=adapter.folder,
        peft_type=config.peft_type.value,
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


def _cosine(inner: float, square_a: float, square_b: float) -> float | None:
    if square_a <= 0 or square_b <= 0:
        return None
    return max(-1.0, min(1.0, inner / math.sqrt(square_a * square_b)))


def _distance(inner: float, square_a: float, square_b: float) -> float:
    return math.sqrt(max(0.0, square_a + square_b - 2 * inner))


def _identical(a: TrainedState, b: TrainedState) -> bool:
    ours, theirs = ({**dict(s.named_parameters()), **s.file_tensors()} for s in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def compare(a: str | os.PathLike, b: str | os.PathLike, progress: Progress = iter) -> Comparison:
    """Compare two adapters of this package, of one method or of two, in their folders.

    Args:
        a: folder of the first.
        b: folder of the second.
        progress: wraps the list of common layers that is gone through.

    Raises:
        ValueError: no adapters of this package, damaged ones, or ones for weights of different shapes.
    """
    first, second = read_stored(a), read_stored(b)
    common = _in_order(first.states.keys() & second.states.keys())
    layers: list[LayerComparison] = []
    inners = union = shared = 0.0
    squares = {"a": 0.0, "b": 0.0}
    for layer in progress(common):
        ours, theirs = first.delta(layer), second.delta(layer)
        _check_shapes(layer, ours, theirs, first.folder, second.folder)
        square_a, square_b, inner = ours.square(), theirs.square(), ours.inner(theirs)
        sparse = ours.support is not None and theirs.support is not None
        both = ours.support.intersection_size(theirs.support) if sparse else None
        either = ours.support.nnz + theirs.support.nnz - both if sparse else 0
        inners, squares["a"], squares["b"] = inners + inner, squares["a"] + square_a, squares["b"] + square_b
        union, shared = union + either, shared + (both or 0)
        layers.append(
            LayerComparison(
                layer=layer,
                entries_a=None if ours.support is None else ours.support.nnz,
                entries_b=None if theirs.support is None else theirs.support.nnz,
                common=both,
                jaccard=both / either if either else None,
                cosine=_cosine(inner, square_a, square_b),
                norm_a=math.sqrt(square_a),
                norm_b=math.sqrt(square_b),
                difference=_distance(inner, square_a, square_b),
                identical=_identical(first.states[layer], second.states[layer]),
            )
        )
    only = {
        "a": _in_order(first.states.keys() - second.states.keys()),
        "b": _in_order(second.states.keys() - first.states.keys()),
    }
    for side, adapter in (("a", first), ("b", second)):
        squares[side] += sum(adapter.delta(layer).square() for layer in only[side])
    rest = first.rest.keys() == second.rest.keys() and all(
        torch.equal(tensor, second.rest[name]) for name, tensor in first.rest.items()
    )
    return Comparison(
        a=first.folder,
        b=second.folder,
        types=[first.config.peft_type.value, second.config.peft_type.value],
        only_a=only["a"],
        only_b=only["b"],
        settings=_different_settings(first, second),
        jaccard=shared / union if union else None,
        cosine=_cosine(inners, squares["a"], squares["b"]),
        norm_a=math.sqrt(squares["a"]),
        norm_b=math.sqrt(squares["b"]),
        difference=_distance(inners, squares["a"], squares["b"]),
        identical=rest and not only["a"] and not only["b"] and all(layer.identical for layer in layers),
        layers=layers,
    )


def _different_settings(a: StoredAdapter, b: StoredAdapter) -> dict[str, list[Any]]:
    ours, theirs = changed_fields(a.config, everything=True), changed_fields(b.config, everything=True)
    return {name: [ours[name], theirs[name]] for name in ours if name in theirs and ours[name] != theirs[name]}


def _check_shapes(layer: str, ours: DeltaMatrix, theirs: DeltaMatrix, a: str, b: str) -> None:
    shapes = [d.support.shape if d.support is not None else d.shape for d in (ours, theirs)]
    if ours.support is not None and theirs.support is not None:
        fits = shapes[0] == shapes[1]
    else:  # factors do not say how the weight lies in memory
        fits = sorted(shapes[0]) == sorted(shapes[1])
    if not fits:
        raise ValueError(
            f"layer {layer}: {a} is for a weight of {shapes[0][0]} x {shapes[0][1]}, {b} for one of {shapes[1][0]} x "
            f"{shapes[1][1]}; they are for different base models"
        )
