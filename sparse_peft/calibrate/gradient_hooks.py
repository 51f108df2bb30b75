"""Seeing every layer's weight gradient over batches, in the moment the backward pass reaches the layer.

A gradient is formed from the layer's input and the gradient of its output, a block of rows at a time; none lives
longer than a panel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.tokens import flatten_tokens
from .model_pass import each_batch, frozen, layer_input, model_loss, tiles, transposed_product

Pair = tuple[Tensor, Tensor]

NOT_REACHED = (
    "layer {}: no batch gave its weight a gradient. The loss must depend on the layer, the layer must not run under "
    "no_grad (reentrant gradient checkpointing does that where no input requires a gradient), and a router may never "
    "have chosen it: give other data, or leave the layer out with exclude_modules"
)
NOT_FINITE = "the weight gradient of layer {} is not finite"


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
            product = transposed_product(left[:, start:stop], right, limit)
            panel = product if panel is None else panel.add_(product)
        yield start, stop, panel.to(torch.float32)


@dataclass(frozen=True)
class Place:
    """Where a layer's gradient belongs.

    Attributes:
        shape: ``(rows, cols)`` of the stored weight.
        in_dim: which of the two is the input features'.
    """

    shape: tuple[int, int]
    in_dim: int


@dataclass
class _Batch:
    """What one batch has brought so far."""

    backward: bool = False
    fault: str | None = None
    calls: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, list[Pair]] = field(default_factory=dict)


class _Saved(torch.autograd.Function):
    """Keeps a tensor by autograd's means: checkpointing may drop and recompute it, and a write to it is noticed."""

    @staticmethod
    def forward(ctx, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        raise RuntimeError("the holder of a layer's input takes no part in the loss")


class GradientPass(ABC):
    """One pass over batches of an unwrapped model that reduces each layer's weight gradient to something small.

    A subclass takes in the gradients of a batch, and keeps what it took only if all of the batch is finite.

    Args:
        places: ``{layer name: where its gradient belongs}``.
        panel_bytes: limit of a temporary's size.
    """

    def __init__(self, places: dict[str, Place], panel_bytes: int):
        self.places, self.panel_bytes = places, panel_bytes
        self._batch: _Batch | None = None

    @abstractmethod
    def begin(self, is_last: bool) -> None:
        """A batch begins; it is the last, or not."""

    @abstractmethod
    def take(self, name: str, panels: Iterator[tuple[int, int, Tensor]]) -> str | None:
        """Take in a layer's gradient of this batch; says what is wrong with it if it is not finite."""

    @abstractmethod
    def commit(self) -> None:
        """Keep what this batch brought."""

    @abstractmethod
    def was_reached(self, name: str) -> bool:
        """Whether any batch brought the layer a gradient."""

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
            self._batch = _Batch()
            self.begin(is_last)
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
                return self._batch.fault or self.commit()

        with ExitStack() as stack:
            stack.enter_context(frozen(model))
            for name, module in targets.items():
                stack.callback(module.register_forward_hook(self._hook(name), with_kwargs=True).remove)
            stack.callback(setattr, self, "_batch", None)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            each_batch(model, batches, use)
        for name in self.places:
            if not self.was_reached(name):
                raise ValueError(NOT_REACHED.format(name))

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

    def _fold(self, name: str) -> None:
        """Reduce a layer's gradient of this batch, and let go of what it is made from."""
        batch, place = self._batch, self.places[name]
        pairs = batch.pairs.pop(name)
        if batch.fault is not None:
            return
        # a backward hook runs under the caller's autocast, which would round the products
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            batch.fault = self.take(name, gradient_panels(pairs, place.shape, place.in_dim, self.panel_bytes))


def _describe(loss: object) -> str:
    return f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
