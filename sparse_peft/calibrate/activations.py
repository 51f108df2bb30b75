"""What goes into the layers, or comes out of them, over data: norms of each feature, second moments of all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.tokens import flatten_tokens
from .model_pass import each_batch, layer_input, run_model, tiles, token_mask, transposed_product


def _sum_of_squares(x: Tensor, limit: int) -> Tensor:
    """``(features,)`` float32 sums over the tokens of ``(tokens, features)``, cast a tile at a time."""
    total = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    for start, stop in tiles(x.shape[0], x.shape[1] * torch.float32.itemsize, limit):
        total += x[start:stop].to(torch.float32).square().sum(0)
    return total


class FeatureSums:
    """Sums over the tokens of data of what is measured at each layer.

    Layers that are given the same tensor one after the other, as the projections of attention are, are measured once.

    Args:
        targets: ``{layer name: module}``.
        measure: takes ``(tokens, features)`` and returns something that adds up over tokens.
        outputs: the layers whose outputs are looked at, not their inputs.

    Attributes:
        sums: ``{layer name: sum}``, of layers that a token reached.
        tokens: ``{layer name: how many}``.
    """

    def __init__(
        self,
        targets: dict[str, nn.Module],
        measure: Callable[[Tensor], Tensor],
        outputs: Collection[str] = (),
    ):
        self.targets, self.measure, self.outputs = targets, measure, outputs
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        # of one batch, added to the sums once all of it is known to be finite
        self._waiting: dict[str, tuple[Tensor, int]] = {}
        self._mask: Tensor | None = None
        self._last: tuple[tuple | None, Tensor, tuple[Tensor, int]] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block the layers are looked at; gradients are off."""
        with ExitStack() as stack:
            for name, module in self.targets.items():
                stack.callback(module.register_forward_hook(self._hook(name), with_kwargs=True).remove)
            stack.enter_context(torch.no_grad())
            yield

    def _hook(self, name: str):
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            x = (output if name in self.outputs else layer_input(args, kwargs)).detach()
            found = self._measured(x)
            if found[1] == 0:
                return
            if name in self._waiting:
                found = self._waiting[name][0] + found[0], self._waiting[name][1] + found[1]
            self._waiting[name] = found

        return see

    def _measured(self, x: Tensor) -> tuple[Tensor, int]:
        # the tensor is held, so what has its address is it; a write to it in between shows in its version
        key = None if x.is_inference() else (x.data_ptr(), x.shape, x.stride(), x._version)
        if key is not None and self._last is not None and self._last[0] == key:
            return self._last[2]
        tokens = x
        if self._mask is not None and x.shape[:-1] == self._mask.shape:
            tokens = x[self._mask.to(x.device)]
        tokens = flatten_tokens(tokens)
        # autocast would round the products
        with torch.autocast(x.device.type, enabled=False):
            found = self.measure(tokens), tokens.shape[0]
        self._last = key, x, found
        return found

    def add(self, run: Callable[[], Any], mask: Tensor | None) -> str | None:
        """Look at one batch while it runs, inside ``watching``.

        Args:
            run: runs the model.
            mask: ``(batch, seq)`` booleans, which tokens count; where a layer sees ``(batch, seq, features)`` the
                others are left out.

        Returns:
            What is wrong with the batch, if it brought numbers that are not finite; then nothing of it is added.
        """
        self._mask = mask
        self._waiting.clear()
        self._last = None
        run()
        self._last = None
        for name, (found, _) in self._waiting.items():
            if not bool(found.isfinite().all()):
                return f"the {'outputs' if name in self.outputs else 'inputs'} of layer {name} are not finite"
        for name, (found, tokens) in self._waiting.items():
            # layers may share what was found
            self.sums[name] = self.sums[name].add_(found) if name in self.sums else found.clone()
            self.tokens[name] = self.tokens.get(name, 0) + tokens
        self._waiting.clear()
        return None

    def check_reached(self) -> None:
        """Refuse data that left a layer out.

        Raises:
            ValueError: no token reached a layer.
        """
        for name in self.targets:
            if name not in self.sums:
                raise ValueError(
                    f"layer {name}: no token of the data reached it, so nothing is known of its features; give more "
                    "data, or leave the layer out with exclude_modules"
                )

    def run(self, model: nn.Module, batches: Iterable, loss_fn: Callable[[nn.Module, Any], Tensor] | None) -> None:
        """One pass of the model over the batches.

        Raises:
            ValueError: no usable batches, or a layer that no token reached.
        """

        def use(batch: Any, is_last: bool) -> str | None:
            return self.add(lambda: (loss_fn or run_model)(model, batch), token_mask(batch))

        with self.watching():
            each_batch(model, batches, use)
        self.check_reached()


def feature_norms(
    model: nn.Module,
    targets: dict[str, nn.Module],
    batches: Iterable,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    panel_bytes: int,
    outputs: Collection[str] = (),
) -> dict[str, Tensor]:
    """L2 norm of each input feature of each layer over all tokens, in one forward pass over the batches.

    Where a batch has an ``attention_mask`` of shape ``(batch, seq)`` and a layer's input is
    ``(batch, seq, features)``, masked tokens are left out.

    Args:
        model: run as ``model(**batch)``, or by ``loss_fn``, without gradients.
        targets: ``{layer name: module}``.
        batches: iterated once.
        loss_fn: ``loss_fn(model, batch)``; its result is not used.
        panel_bytes: limit of a temporary's size.
        outputs: the layers whose output features are looked at instead.

    Returns:
        ``{layer name: (in_features,) float32}``.

    Raises:
        ValueError: no usable batches, or a layer that no token reached.
    """
    found = FeatureSums(targets, lambda x: _sum_of_squares(x, panel_bytes), outputs)
    found.run(model, batches, loss_fn)
    return {name: found.sums[name].sqrt() for name in targets}


def second_moments(targets: dict[str, nn.Module], panel_bytes: int) -> FeatureSums:
    """Sums of ``x x^T`` over the inputs ``x`` of each layer: ``(in_features, in_features)`` in at least float32."""
    return FeatureSums(targets, lambda x: transposed_product(x, x, panel_bytes))
