"""Weight gradients of layers over batches, observed while the backward pass reaches each layer.

A gradient is formed from the layer's input and its output gradient, one panel of rows at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..numerics.tokens import flatten_tokens
from ..ops.expert_products import Routing
from ..ops.gradient_paths import gradient_panels
from ..ops.one_hot import Factor
from .layer_view import LayerView
from .model_pass import ModelPass, frozen

# (first row, last row + 1, float32 rows of the gradient)
Panel = tuple[int, int, Tensor]

NOT_REACHED = (
    "layer {}: no batch gave its weight a gradient. The loss must depend on the layer, the layer must not run under "
    "no_grad (reentrant gradient checkpointing does that where no input requires a gradient), and a router may never "
    "have chosen it: give other data, or leave the layer out with exclude_modules"
)
NOT_FINITE = "the weight gradient of layer {} is not finite"


@dataclass
class _Batch:
    """The state of one batch.

    Attributes:
        backward: whether the backward pass has begun.
        fault: the reason to skip the batch.
        calls: ``{layer name: number of calls}`` in the forward pass.
        pairs: ``{layer name: operands of its gradient}``, one pair per call.
    """

    backward: bool = False
    fault: str | None = None
    calls: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, list[tuple[Factor, Tensor]]] = field(default_factory=dict)


class _Saved(torch.autograd.Function):
    """Saves a tensor with autograd: checkpointing may drop and recompute it, and in-place writes are detected."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise RuntimeError("the holder of a layer's input takes no part in the loss")


class GradientPass(ABC):
    """One pass over data that reduces each layer's weight gradient to something small.

    A subclass takes in the gradients of one batch at a time, and keeps them only if the whole batch is finite. Each
    of fused experts is a layer of its own.

    Args:
        layers: the observed layers.

    Attributes:
        layers: ``{name: layer}``, with each expert by itself.
        owners: ``{name: name of the layer}`` that an expert is a part of, else its own.
    """

    def __init__(self, layers: Sequence[LayerView]) -> None:
        self.watched = list(layers)
        self.layers = {part.name: part for layer in layers for part in layer.parts}
        self.owners = {part.name: layer.name for layer in layers for part in layer.parts}
        self._batch = _Batch()

    @abstractmethod
    def begin(self, is_last: bool) -> None:
        """Start a batch."""

    @abstractmethod
    def take(self, name: str, panels: Iterator[Panel]) -> str | None:
        """Take in a layer's gradient of this batch; returns the fault of a gradient that is not finite."""

    @abstractmethod
    def commit(self) -> None:
        """Keep the gradients of this batch."""

    @abstractmethod
    def was_reached(self, name: str) -> bool:
        """Whether any batch gave the layer a gradient."""

    def run(self, data: ModelPass) -> None:
        """One pass over the data.

        Raises:
            ValueError: no usable batches, a loss that is no scalar, or a layer that no batch gave a gradient.
        """

        def use(batch: Any, is_last: bool) -> str | None:
            self._batch = _Batch()
            self.begin(is_last)
            return self._backward(data.loss(batch))

        with ExitStack() as stack:
            stack.enter_context(frozen(data.model))
            for view in (view for layer in self.watched for view in layer.uses):
                stack.callback(view.watch(partial(self._see, view)))
            stack.callback(setattr, self, "_batch", _Batch())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            data.each_batch(use)
        reached = {self.owners[name] for name in self.layers if self.was_reached(name)}
        for layer in self.watched:
            if layer.name not in reached:
                raise ValueError(NOT_REACHED.format(layer.name))

    def _backward(self, loss: Any) -> str | None:
        """Run the backward pass of a batch, and keep its gradients or return its fault."""
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
            if self._batch.fault is None:
                self.commit()
        return self._batch.fault

    # ------------------------------------------------------------------ hooks

    def _see(self, layer: LayerView, x: Tensor, output: Tensor, routing: Routing | None) -> Tensor | None:
        batch = self._batch
        if x.numel() == 0:
            return None
        if not batch.backward:
            # checkpointing repeats calls during the backward pass; these are not counted again
            for name in _names(layer, routing):
                batch.calls[name] = batch.calls.get(name, 0) + 1
        if not torch.is_grad_enabled():
            return None
        replaced = None
        if not output.requires_grad:
            # nothing before this layer is trained; the copy is no leaf, so the model may write into it
            output = replaced = output.detach().requires_grad_().clone()
        anchor = torch.empty(0, device=x.device, requires_grad=True)
        holder = _Saved.apply(anchor, x.detach())
        output.register_hook(lambda grad: self._receive(layer, routing, batch, holder.grad_fn, grad))
        return replaced

    @torch.no_grad()
    def _receive(self, layer: LayerView, routing: Routing | None, batch: _Batch, saved: Any, grad: Tensor) -> None:
        if batch.fault is not None:
            return
        (x,) = saved.saved_tensors
        if routing is None:
            self._take_pair(layer.name, batch, layer.factors(x, grad))
            return
        x = flatten_tokens(x)
        x, grad = routing.sort(x), routing.sort(grad.reshape(x.shape[0], -1))
        for expert, start, stop in routing.segments():
            self._take_pair(layer.part_name(expert), batch, layer.factors(x[start:stop], grad[start:stop]))

    def _take_pair(self, name: str, batch: _Batch, pair: tuple[Factor, Tensor]) -> None:
        pairs = batch.pairs.setdefault(name, [])
        pairs.append(pair)
        if len(pairs) == batch.calls.get(name):
            self._fold(name)

    def _fold(self, name: str) -> None:
        """Reduce a layer's gradient of this batch, and release its operands."""
        batch = self._batch
        pairs = batch.pairs.pop(name)
        if batch.fault is not None:
            return
        # a backward hook runs under the caller's autocast, which would round the products
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            # int64 positions of a whole panel fit the limit as well
            panels = gradient_panels(pairs, self.layers[name].shape, torch.int64.itemsize)
            batch.fault = self.take(name, ((start, stop, panel.to(torch.float32)) for start, stop, panel in panels))


def _names(layer: LayerView, routing: Routing | None) -> list[str]:
    """The names of the matrices that an activation's rows belong to: those of experts, or the layer's."""
    return [layer.name] if routing is None else [layer.part_name(expert) for expert, _, _ in routing.segments()]


def _describe(loss: object) -> str:
    return f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
