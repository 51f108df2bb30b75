"""Plots of trained entries, of their changes during training and of pruned models, as PNG files.

Needs matplotlib, which the extra ``plot`` installs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from _sparse_peft_startup.install import install_advice

from .dynamics.records import Record, kind_of_record, record_from_dict
from .ops import plan_support_grad
from .sparsify import SparsityCurve
from .support import Support
from .tuners.delta_layer import SparseTunerLayer
from .tuners.traversal import configs_of, tuner_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HISTORY_FILE = "sparsity_history.json"


def support_map(support: Support, bins: tuple[int, int] = (64, 64)) -> Tensor:
    """Local density of a support.

    Args:
        support: over a ``(rows, cols)`` weight.
        bins: most cells in each direction; a smaller weight has one for each row or column.

    Returns:
        ``(cells, cells)`` float32: share of each cell's weights that trains.
    """
    (rows, cols), (height, width) = support.shape, (min(n, most) for n, most in zip(support.shape, bins, strict=True))
    row, col = support.rows.long() * height // rows, support.cols.long() * width // cols
    counts = torch.bincount(row * width + col, minlength=height * width).view(height, width)
    sizes = [
        torch.bincount(torch.arange(n) * most // n, minlength=most) for n, most in ((rows, height), (cols, width))
    ]
    return counts.cpu() / (sizes[0][:, None] * sizes[1])


def plot_supports(
    supports: nn.Module | Mapping[str, Support],
    path: str | os.PathLike,
    adapter: str = "default",
    max_layers: int = 24,
) -> Path:
    """A heat map for each layer: where its trained entries are, relative to the layer's density.

    Args:
        supports: a model with an adapter, or ``{layer name: support}``.
        path: of the PNG file.
        adapter: which adapter of the model.
        max_layers: largest number of layers drawn, evenly spaced over the model.

    Raises:
        ValueError: no layer has such an adapter.
        ImportError: matplotlib is not installed.
    """
    if isinstance(supports, nn.Module):
        supports = _supports_of(supports, adapter)
    if not supports:
        raise ValueError("supports: no layers to draw")
    names = list(supports)
    if len(names) > max_layers:
        names = [names[round(i * (len(names) - 1) / max(1, max_layers - 1))] for i in range(max_layers)]
    columns = min(len(names), 6 if len(names) > 8 else 4)
    rows = -(-len(names) // columns)
    figure = _figure(2.6 * columns + 1.2, 2.7 * rows + 0.9)
    axes = figure.subplots(rows, columns, squeeze=False)
    maps = {name: support_map(supports[name]) / supports[name].density for name in names}
    top = max(2.0, float(torch.cat([grid.flatten() for grid in maps.values()]).quantile(0.99)))
    for index, axis in enumerate(axes.flat):
        if index >= len(names):
            axis.set_axis_off()
            continue
        name = names[index]
        image = axis.imshow(maps[name], aspect="auto", vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
        axis.set_title(f"{_short(name)}\n{supports[name].density:.2%} of {_shape(supports[name])}", fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])
        if index % columns == 0:
            axis.set_ylabel("row", fontsize=7)
        if index + columns >= len(names):
            axis.set_xlabel("column", fontsize=7)
    figure.colorbar(image, ax=axes, label="trained entries, relative to the layer's mean", fraction=0.03)
    shown = f"{len(names)} of {len(supports)} layers" if len(names) < len(supports) else f"{len(names)} layers"
    figure.suptitle(f"Where the trained entries are ({shown})", fontsize=10)
    return _save(figure, path)


@dataclass(frozen=True)
class LayerPath:
    """How one layer computes, as [`layer_paths`][sparse_peft.report.layer_paths] finds it.

    Attributes:
        layer: its name.
        density: share of its weight that the active adapters train.
        forward: ``"product"``, ``"resident"``, ``"overlay"``, ``"gathered"``, ``"dequantised"`` or ``"additive"``; see
            docs/how_it_works.md.
        gradient: ``"sampled"``, ``"panels"``, ``"tiles"``, ``"triton"`` or ``"cuda"``; see docs/kernels.md.
        why: the reason for the gradient's path.
    """

    layer: str
    density: float
    forward: str
    gradient: str
    why: str


def layer_paths(model: nn.Module, dtype: torch.dtype | None = None) -> list[LayerPath]:
    """How each layer with an active adapter computes its forward pass and its values' gradient, and why.

    Args:
        model: a model with sparse adapters.
        dtype: of the activations; the base weights' where that is a float, else float32.

    Example:
        >>> for path in layer_paths(model):
        ...     print(path.layer, f"{path.density:.2%}", path.forward, path.gradient, path.why)
    """
    found = []
    for layer in _layers_of(model):
        support = layer.active_support()
        if support is None:
            continue
        base = layer.base_parameter.dtype
        plan = plan_support_grad(support, dtype or (base if base.is_floating_point else torch.float32), support.device)
        found.append(LayerPath(layer.name, support.density, layer.path(), plan.path, plan.why))
    return found


def plot_turnover(history: Sequence[Record], path: str | os.PathLike) -> Path:
    """Plot what each reselection replaced, its thresholds, and how old the trained entries were after it.

    Args:
        history: of one adapter, as in ``SparsityController.history``.
        path: of the PNG file.

    Raises:
        ValueError: a history without reselections, or of several adapters.
        ImportError: matplotlib is not installed.
    """
    return _plot_records(kind_of_record("reselection"), history, path)


def plot_ranks(history: Sequence[Record], path: str | os.PathLike) -> Path:
    """Plot the remaining ranks in the course of a SoRA training, and those of each layer at its end.

    Args:
        history: of one adapter, as in ``SparsityController.history``.
        path: of the PNG file.

    Raises:
        ValueError: a history without reports of ranks, or of several adapters.
        ImportError: matplotlib is not installed.
    """
    return _plot_records(kind_of_record("ranks"), history, path)


def plot_allocation(history: Sequence[Record], path: str | os.PathLike) -> Path:
    """Plot the share of each layer's entries that SNELLA kept in the course of training, and all layers' together.

    Args:
        history: of one adapter, as in ``SparsityController.history``.
        path: of the PNG file.

    Raises:
        ValueError: a history without allocations, or of several adapters.
        ImportError: matplotlib is not installed.
    """
    return _plot_records(kind_of_record("allocation"), history, path)


def _plot_records(kind: type[Record], history: Sequence[Record], path: str | os.PathLike) -> Path:
    """Plot the records of one kind."""
    records = [record for record in history if isinstance(record, kind)]
    _check_one_adapter(records, kind.plural)
    figure = _figure(*kind.plot_size)
    kind.draw(records, figure)
    return _save(figure, path)


def plot_sparsity_curve(
    curve: SparsityCurve, path: str | os.PathLike, tolerance: float = 0.01, label: str = "metric"
) -> Path:
    """Plot a metric over the share of zeros, random pruning beside it, and the knee.

    Args:
        curve: of [`essential_sparsity`][sparse_peft.sparsify.essential_sparsity].
        path: of the PNG file.
        tolerance: of the knee: the loss, as a share of the dense model's metric, up to which weights count as free.
        label: of the metric.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(6.0, 4.0)
    axis = figure.subplots()
    sparsity = [0.0, *(point.sparsity for point in curve.points)]
    axis.plot(sparsity, [curve.dense, *(point.metric for point in curve.points)], "o-", label="pruned by scores")
    random = [(point.sparsity, point.random) for point in curve.points if point.random is not None]
    if random:
        axis.plot(*zip((0.0, curve.dense), *random, strict=True), "s--", color="gray", label="pruned at random")
    knee = curve.knee(tolerance)
    axis.axvline(knee, color="tab:red", linestyle=":", label=f"knee at {knee:.2g} (within {tolerance:.2g} of dense)")
    if min(curve.dense, *(point.metric for point in curve.points)) > 0 and not curve.higher_is_better:
        axis.set_yscale("log")
    axis.set_xlabel("share of zeros")
    axis.set_ylabel(label)
    axis.legend()
    return _save(figure, path)


def _check_one_adapter(history: Sequence[Record], what: str) -> None:
    if not history:
        raise ValueError(f"history: no {what} to draw; it is filled during training, by SparsityController.step()")
    adapters = sorted({record.adapter for record in history})
    if len(adapters) > 1:
        raise ValueError(
            f"history: {what} of {len(adapters)} adapters ({', '.join(adapters)}); draw one after the other, "
            f"[record for record in history if record.adapter == {adapters[0]!r}]"
        )


def write_history(history: Sequence[Record], folder: str | os.PathLike) -> Path:
    """Keep a history as ``sparsity_history.json`` in a folder; whole or not at all."""
    path = Path(folder) / HISTORY_FILE
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps([record.to_dict() for record in history], indent=1) + "\n", encoding="utf-8")
    staged.replace(path)
    return path


def read_history(path: str | os.PathLike) -> list[Record]:
    """Read a history that [`write_history`][sparse_peft.report.write_history] wrote, from the file or its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    path = Path(path)
    path = path / HISTORY_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no history; write_history(controller.history, folder) makes one")
    try:
        return [record_from_dict(record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no history of a training ({error}); write it anew with write_history") from error


def plot_report(
    model: nn.Module, history: Sequence[Record], folder: str | os.PathLike, adapter: str | None = None
) -> list[Path]:
    """Draw all plots of one adapter's training, and keep the history beside them.

    Args:
        model: with the adapter; where its layers have positions, they are drawn as ``supports.png``.
        history: of one adapter, as in ``SparsityController.history``; reselections are drawn as ``turnover.png``,
            reports of ranks as ``ranks.png``, allocations as ``allocation.png``. Empty for methods that change
            nothing during training.
        folder: made if need be.
        adapter: its name; the history's by default, or ``"default"``.

    Returns:
        The files; none for a method without positions that changed nothing.

    Raises:
        ValueError: no such adapter, or a history of several.
        ImportError: matplotlib is not installed.
    """
    adapter = adapter or next((record.adapter for record in history), "default")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind in dict.fromkeys(type(record) for record in history):
        if kind.plot_name is not None:
            files.append(_plot_records(kind, history, folder / kind.plot_name))
    if adapter not in configs_of(model) or any(adapter in layer.deltas for layer in _layers_of(model)):
        files.append(plot_supports(model, folder / "supports.png", adapter))
    return [*files, write_history(history, folder)] if history else files


def _layers_of(model: nn.Module) -> list[SparseTunerLayer]:
    return [layer for layer in tuner_layers(model) if isinstance(layer, SparseTunerLayer)]


def _supports_of(model: nn.Module, adapter: str) -> dict[str, Support]:
    layers = _layers_of(model)
    found = {layer.name: layer.support(adapter) for layer in layers if adapter in layer.deltas}
    if not found:
        known = sorted({name for layer in layers for name in layer.deltas})
        raise ValueError(
            f"adapter={adapter!r}: no layer of {type(model).__name__} has it; "
            + (f"there are {', '.join(map(repr, known))}" if known else "the model has no sparse adapter")
        )
    return found


def _short(name: str) -> str:
    """The end of a layer's name, with the number of its block."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), max(0, len(parts) - 2))
    return ".".join([*parts[number : number + 1], *parts[max(number + 1, len(parts) - 1) :]])


def _shape(support: Support) -> str:
    return f"{support.shape[0]} x {support.shape[1]}"


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an optional package)
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: {install_advice('plot')}") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: Any, path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path={str(path)!r}: a file name that ends in .png is expected")
    if not path.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: the folder {path.parent} does not exist")
    staged = path.with_name(f".{path.name}.tmp")
    figure.savefig(staged, format="png")
    staged.replace(path)
    return path
