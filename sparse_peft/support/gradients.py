"""Sums of the layers' weight gradients over data, without a dense gradient that lives longer than a panel.

A layer's weight gradient is formed from its input and the gradient of its output, a block of rows at a time, in the
moment the backward pass reaches the layer. The first batch that reaches a layer proposes candidates, the best
``oversample`` times the budget; later batches are summed at the candidates alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .criteria import Criterion, Statistics
from .passes import each_batch, flatten_tokens, frozen, layer_input, model_loss, tiles
from .support import index_dtype
from .topk import RunningTopK

Pair = tuple[Tensor, Tensor]

NOT_REACHED = (
    "layer {}: no batch gave its weight a gradient. The loss must depend on the layer, the layer must not run under "
    "no_grad (reentrant gradient checkpointing does that where no input requires a gradient), and a router may never "
    "have chosen it: give other data, or leave the layer out with exclude_modules"
)
NOT_FINITE = "the weight gradient of layer {} is not finite"


@dataclass
class LayerSums:
    """One layer's running statistics.

    Attributes:
        shape: ``(rows, cols)`` of the stored weight.
        in_dim: which of the two is the input features'.
        weight: gives the stored weight in floats.
        positions: ``(candidates,)`` flat positions, ascending; None for all of them.
        total: ``(candidates,)`` float32 sum over batches; None before the first.
        batches: how many batches are in it.
    """

    shape: tuple[int, int]
    in_dim: int
    weight: Callable[[], Tensor]
    positions: Tensor | None = None
    total: Tensor | None = None
    batches: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def gradient_panels(
    pairs: list[Pair], shape: tuple[int, int], in_dim: int, limit: int
) -> Iterator[tuple[int, int, Tensor]]:
    """The weight's gradient, a block of rows at a time.

    Args:
        pairs: input ``(tokens, in)`` and output gradient ``(tokens, out)`` of each call of the layer.
        shape: ``(rows, cols)`` of the stored weight.
        in_dim: which of the two is the input features'.
        limit: bytes that a temporary may take, counted so that int64 positions of a whole panel fit as well.

    Yields:
        ``(first row, last row + 1, (rows, cols) float32 panel)``.
    """
    rows, cols = shape
    sides = [(grad, x) if in_dim == 1 else (x, grad) for x, grad in pairs]
    for start, stop in tiles(rows, cols * torch.int64.itemsize, limit):
        panel = None
        for left, right in sides:
            product = _product(left[:, start:stop], right, limit)
            panel = product if panel is None else panel.add_(product)
        yield start, stop, panel.to(torch.float32)


def _product(left: Tensor, right: Tensor, limit: int) -> Tensor:
    """``left.T @ right`` in at least float32; other types are cast a tile of tokens at a time."""
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    if left.dtype == right.dtype == dtype:
        return left.t() @ right
    product = torch.zeros(left.shape[1], right.shape[1], dtype=dtype, device=left.device)
    for start, stop in tiles(left.shape[0], max(left.shape[1], right.shape[1]) * dtype.itemsize, limit):
        product.addmm_(left[start:stop].to(dtype).t(), right[start:stop].to(dtype))
    return product


class Proposals:
    """The candidates of the layers that one batch reaches for the first time.

    Layers share a limit by being in one *group*: the best of all of them together stay.

    Args:
        groups: ``{layer: group}``.
        limits: ``{group: candidates}``.
        layers: the layers' sums.
        criterion: what scores them.
        panel_bytes: limit of a temporary's size.
    """

    def __init__(
        self,
        groups: dict[str, str | None],
        limits: dict[str | None, int],
        layers: dict[str, LayerSums],
        criterion: Criterion,
        panel_bytes: int,
    ):
        self.groups, self.limits, self.layers = groups, limits, layers
        self.criterion, self.panel_bytes = criterion, panel_bytes
        self.members: dict[str | None, list[str]] = {}
        for name, group in groups.items():
            self.members.setdefault(group, []).append(name)
        self.offsets: dict[str, int] = {}
        for names in self.members.values():
            offset = 0
            for name in names:
                self.offsets[name] = offset
                offset += layers[name].numel
        self.kept: dict[str | None, RunningTopK] = {}
        # a layer of a group may have none among the best; it keeps its own best then, since every layer trains one
        self.best_of: dict[str, RunningTopK] = {}
        self.complete: dict[str, Tensor] = {}

    def keeps_all(self, name: str) -> bool:
        group = self.groups[name]
        return self.limits[group] >= sum(self.layers[member].numel for member in self.members[group])

    def add(self, name: str, panels: Iterator[tuple[int, int, Tensor]]) -> str | None:
        """Take in one layer's gradient; says what is wrong with it if it is not finite."""
        layer, criterion = self.layers[name], self.criterion
        cols = layer.shape[1]
        if self.keeps_all(name):
            dense = None
            for start, stop, panel in panels:
                if not bool(panel.isfinite().all()):
                    return NOT_FINITE.format(name)
                if dense is None:
                    dense = torch.empty(layer.numel, dtype=torch.float32, device=panel.device)
                dense[start * cols : stop * cols] = _statistic(criterion, panel).reshape(-1)
            self.complete[name] = dense
            return None
        limit = self.limits[self.groups[name]]
        kept = self.kept.setdefault(self.groups[name], RunningTopK(limit, criterion.largest))
        best = self.best_of.setdefault(name, RunningTopK(1, criterion.largest))
        weight = layer.weight().detach() if criterion.uses_weight else None
        for start, stop, panel in panels:
            if not bool(panel.isfinite().all()):
                return NOT_FINITE.format(name)
            statistic = _statistic(criterion, panel)
            rows = None if weight is None else weight[start:stop]
            scores = criterion.score(rows, Statistics(gradient=statistic)).reshape(-1)
            values, key = statistic.reshape(-1), self.offsets[name] + start * cols
            kept.update_block(scores, key, values, name=name)
            best.update_block(scores, key, values, name=name)
        return None

    def results(self) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """``(layer, positions or None for all, values)`` of every layer that was added."""
        for name, dense in self.complete.items():
            yield name, None, dense
        for name, best in self.best_of.items():
            kept, layer, offset = self.kept[self.groups[name]], self.layers[name], self.offsets[name]
            keys, values = kept.result()[0], kept.payload()
            device = best.result()[0].device  # of the layer; the group may have its best of all elsewhere
            bounds = torch.tensor([offset, offset + layer.numel], device=keys.device)
            first, last = torch.searchsorted(keys, bounds).tolist()
            if first == last:
                keys, values = best.result()[0], best.payload()
                first, last = 0, 1
            positions = (keys[first:last] - offset).to(index_dtype(layer.shape))
            yield name, positions.to(device), values[first:last].clone().to(device)


def _statistic(criterion: Criterion, gradient: Tensor) -> Tensor:
    return gradient.square_() if criterion.squared_gradient else gradient


@dataclass
class _Batch:
    """What one batch has brought so far; added to the sums only if all of it is finite."""

    proposals: Proposals
    backward: bool = False
    fault: str | None = None
    calls: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


class _Saved(torch.autograd.Function):
    """Keeps a tensor by autograd's means: checkpointing may drop and recompute it, and a write to it is noticed."""

    @staticmethod
    def forward(ctx, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        raise RuntimeError("the holder of a layer's input takes no part in the loss")


class GradientSums:
    """Collects :class:`LayerSums` of the layers of an unwrapped model.

    Args:
        layers: ``{layer name: its sums}``, filled in by :meth:`run`.
        criterion: one that needs gradients.
        groups: ``{layer: group}`` of layers that share a limit of candidates.
        budgets: ``{group: trained entries}``.
        oversample: candidates for each trained entry.
        panel_bytes: limit of a temporary's size.
    """

    def __init__(
        self,
        layers: dict[str, LayerSums],
        criterion: Criterion,
        groups: dict[str, str | None],
        budgets: dict[str | None, int],
        oversample: float,
        panel_bytes: int,
    ):
        self.layers, self.criterion, self.groups, self.budgets = layers, criterion, groups, budgets
        self.oversample, self.panel_bytes = oversample, panel_bytes
        self._batch: _Batch | None = None

    def run(
        self,
        model: nn.Module,
        targets: dict[str, nn.Module],
        batches: Iterable,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    ) -> None:
        """One pass over the batches.

        Raises:
            ValueError: no usable batches, a loss that is no scalar, or a layer that no batch gave a gradient.
        """

        def use(batch: Any, is_last: bool) -> str | None:
            self._batch = _Batch(self._proposals(is_last))
            loss = (loss_fn or model_loss)(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError(f"the loss is {_describe(loss)}; a tensor with one number is expected")
            if not bool(loss.detach().isfinite().all()):
                return f"its loss is {loss.item()}"
            if loss.requires_grad:
                self._batch.backward = True
                loss.backward()
            with torch.no_grad():
                for name in list(self._batch.pairs):
                    self._fold(name)
                return self._batch.fault or self._commit()

        with ExitStack() as stack:
            stack.enter_context(frozen(model))
            for name, module in targets.items():
                stack.callback(module.register_forward_hook(self._hook(name), with_kwargs=True).remove)
            stack.callback(setattr, self, "_batch", None)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            each_batch(model, batches, use)
        for name, layer in self.layers.items():
            if layer.total is None:
                raise ValueError(NOT_REACHED.format(name))

    def _proposals(self, is_last: bool) -> Proposals:
        # nothing is summed after the last batch, so it has no use for more candidates than entries
        oversample = 1.0 if is_last else self.oversample
        fresh = {name: group for name, group in self.groups.items() if self.layers[name].total is None}
        sizes: dict[str | None, int] = {}
        for name, group in fresh.items():
            sizes[group] = sizes.get(group, 0) + self.layers[name].numel
        limits = {}
        for group, size in sizes.items():
            wanted = oversample * self.budgets[group]
            limits[group] = size if wanted >= size else math.ceil(wanted)
        return Proposals(fresh, limits, self.layers, self.criterion, self.panel_bytes)

    # ------------------------------------------------------------------ hooks

    def _hook(self, name: str):
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            batch = self._batch
            x = layer_input(args, kwargs)
            if x.numel() == 0:
                return None
            if not batch.backward:
                # checkpointing repeats calls during the backward pass, which are no further ones
                batch.calls[name] = batch.calls.get(name, 0) + 1
            if not torch.is_grad_enabled():
                return None
            replaced = None
            if not output.requires_grad:
                # nothing before this layer is trained; the copy is no leaf, so the model may write into it
                output = replaced = output.detach().requires_grad_().clone()
            anchor = torch.empty(0, device=x.device, requires_grad=True)
            holder = _Saved.apply(anchor, x.detach())
            output.register_hook(lambda grad: self._receive(name, batch, holder.grad_fn, grad))
            return replaced

        return see

    @torch.no_grad()
    def _receive(self, name: str, batch: _Batch, saved: Any, grad: Tensor) -> None:
        if batch.fault is not None:
            return
        (x,) = saved.saved_tensors
        pairs = batch.pairs.setdefault(name, [])
        pairs.append((flatten_tokens(x), flatten_tokens(grad)))
        if len(pairs) == batch.calls.get(name):
            self._fold(name)

    # ------------------------------------------------------------------ sums

    def _fold(self, name: str) -> None:
        """Reduce a layer's gradient of this batch to numbers at candidates, and let go of what it is made from."""
        batch, layer = self._batch, self.layers[name]
        pairs = batch.pairs.pop(name)
        if batch.fault is not None:
            return
        # a backward hook runs under the caller's autocast, which would round the products
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            panels = gradient_panels(pairs, layer.shape, layer.in_dim, self.panel_bytes)
            if layer.total is None:
                batch.fault = batch.proposals.add(name, panels)
            else:
                batch.fault = self._sum_at_candidates(name, panels)

    def _sum_at_candidates(self, name: str, panels: Iterator[tuple[int, int, Tensor]]) -> str | None:
        layer, cols = self.layers[name], self.layers[name].shape[1]
        values = torch.empty_like(layer.total)
        for start, stop, panel in panels:
            if not bool(panel.isfinite().all()):
                return NOT_FINITE.format(name)
            flat = _statistic(self.criterion, panel).reshape(-1)
            if layer.positions is None:
                values[start * cols : stop * cols] = flat
            else:
                bounds = layer.positions.new_tensor([start * cols, stop * cols])
                first, last = torch.searchsorted(layer.positions, bounds).tolist()
                values[first:last] = flat.index_select(0, layer.positions[first:last] - start * cols)
        self._batch.values[name] = values
        return None

    def _commit(self) -> None:
        for name, values in self._batch.values.items():
            self.layers[name].total += values
            self.layers[name].batches += 1
        for name, positions, values in self._batch.proposals.results():
            layer = self.layers[name]
            layer.positions, layer.total, layer.batches = positions, values, 1


def _describe(loss: object) -> str:
    return f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
