"""Statistics of the layers' inputs or outputs over data: norms of each feature, and second moments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.panels import panels
from ..numerics.tokens import flatten_tokens, transposed_product
from ..ops.expert_products import Routing
from .layer_view import LayerView, whole_features
from .model_pass import ModelPass, layer_input, token_mask


def _sum_of_squares(x: Tensor) -> Tensor:
    """``(features,)`` float32 sums over the tokens of ``(tokens, features)``, cast a panel at a time."""
    total = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    for start, stop in panels(x.shape[0], x.shape[1] * torch.float32.itemsize):
        total += x[start:stop].to(torch.float32).square().sum(0)
    return total


class FeatureSums:
    """Sums over tokens of a measure of each layer's activations.

    Consecutive layers with the same input tensor, as the projections of attention, are measured once.

    Args:
        targets: ``{layer name: module}``.
        measure: maps ``(tokens, features)`` to a tensor that adds up over tokens, or that ``join`` joins.
        outputs: the layers whose outputs are measured instead of their inputs.
        experts: fused experts; each is measured by itself, over the tokens routed to it.
        join: of a layer's measures so far, which may be overwritten, and a new one; by default their sum.

    Attributes:
        sums: ``{layer name: sum}`` of the layers that a token reached.
        tokens: ``{layer name: number of tokens}``.
    """

    def __init__(
        self,
        targets: Mapping[str, nn.Module],
        measure: Callable[[Tensor], Tensor],
        outputs: Collection[str] = (),
        experts: Sequence[LayerView] = (),
        join: Callable[[Tensor, Tensor], Tensor] = Tensor.add_,
    ) -> None:
        self.targets, self.measure, self.outputs, self.experts = targets, measure, outputs, experts
        self.join = join
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        # of one batch, added to the sums once all of it is known to be finite
        self._waiting: dict[str, tuple[Tensor, int]] = {}
        self._mask: Tensor | None = None
        self._last: tuple[tuple | None, Tensor, tuple[Tensor, int]] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block the layers are hooked, and gradients are off."""
        with ExitStack() as stack:
            for name, module in self.targets.items():
                stack.callback(module.register_forward_hook(self._hook(name), with_kwargs=True).remove)
            for layer in self.experts:
                stack.callback(layer.watch(partial(self._see_experts, layer), lambda: self._mask))
            stack.enter_context(torch.no_grad())
            yield

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = (output if name in self.outputs else layer_input(args, kwargs)).detach()
            if isinstance(module, nn.Embedding) and name not in self.outputs:
                self._add(name, *self._occurrences(x, module))
            else:
                self._add(name, *self._measured(whole_features(x, module, name not in self.outputs)))

        return see

    def _see_experts(self, layer: LayerView, x: Tensor, output: Tensor, routing: Routing | None) -> None:
        assert routing is not None
        rows = routing.sort((output.reshape(x.shape[0], -1) if layer.name in self.outputs else x).detach())
        for expert, start, stop in routing.segments():
            self._add(layer.part_name(expert), *self._measured(rows[start:stop]))

    def _add(self, name: str, found: Tensor, tokens: int) -> None:
        if tokens == 0:
            return
        if name in self._waiting:
            found, tokens = self.join(self._waiting[name][0].clone(), found), self._waiting[name][1] + tokens
        self._waiting[name] = found, tokens

    def _occurrences(self, ids: Tensor, embedding: nn.Embedding) -> tuple[Tensor, int]:
        """How often each id occurs: the squares of an embedding's one-hot inputs, summed over the tokens."""
        if self._mask is not None and ids.shape == self._mask.shape:
            ids = ids[self._mask.to(ids.device)]
        found = torch.bincount(ids.reshape(-1), minlength=embedding.num_embeddings).to(torch.float32)
        if embedding.padding_idx is not None:
            found[embedding.padding_idx] = 0
        return found, ids.numel()

    def _measured(self, x: Tensor) -> tuple[Tensor, int]:
        # the last tensor is held, so its address identifies it; its version shows a write in between
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
        """Measure one batch while it runs, inside ``watching``.

        Args:
            run: runs the model.
            mask: ``(batch, seq)`` booleans of the tokens that count. It applies to activations of shape
                ``(batch, seq, features)``.

        Returns:
            The reason to skip the batch, if its activations are not finite; then nothing is added.
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
            # layers may share a measure
            self.sums[name] = self.join(self.sums[name], found) if name in self.sums else found.clone()
            self.tokens[name] = self.tokens.get(name, 0) + tokens
        self._waiting.clear()
        return None

    def check_reached(self) -> None:
        """Check that the data reached every layer.

        Raises:
            ValueError: no token reached a layer.
        """
        parts = {name: [name] for name in self.targets}
        parts |= {layer.name: [part.name for part in layer.parts] for layer in self.experts}
        for name, members in parts.items():
            if not any(member in self.sums for member in members):
                raise ValueError(
                    f"layer {name}: no token of the data reached it, so nothing is known of its features; give more "
                    "data, or leave the layer out with exclude_modules"
                )

    def run(self, data: ModelPass) -> None:
        """One pass over the data.

        Raises:
            ValueError: no usable batches, or a layer that no token reached.
        """

        def use(batch: Any, is_last: bool) -> str | None:
            return self.add(lambda: data.forward(batch), token_mask(batch))

        with self.watching():
            data.each_batch(use)
        self.check_reached()


def feature_norms(data: ModelPass, layers: Sequence[LayerView], outputs: Collection[str] = ()) -> dict[str, Tensor]:
    """L2 norm of each layer's input features over all tokens, in one forward pass.

    An embedding's input is one-hot, so the norm of an id is the root of the number of its occurrences; that of
    ``padding_idx`` is 0.

    Where a batch has an ``attention_mask`` of shape ``(batch, seq)`` and an activation has shape
    ``(batch, seq, features)``, masked tokens do not count; nor do they for fused experts.

    Args:
        data: the model and its batches.
        layers: the layers.
        outputs: names of the layers whose output features are measured instead.

    Returns:
        ``{layer name: (features,) float32}``; for each of fused experts that a token reached under its own name.

    Raises:
        ValueError: no usable batches, or a layer that no token reached.
    """
    linear = {layer.name: layer.module for layer in layers if layer.watch_experts is None}
    experts = [layer for layer in layers if layer.watch_experts is not None]
    found = FeatureSums(linear, _sum_of_squares, outputs, experts)
    found.run(data)
    return {name: total.sqrt() for name, total in found.sums.items()}


def second_moments(targets: Mapping[str, nn.Module]) -> FeatureSums:
    """Sums of ``x x^T`` over the inputs ``x`` of each layer: ``(in_features, in_features)`` in at least float32."""
    return FeatureSums(targets, lambda x: transposed_product(x, x))


def first_two_moments(targets: Mapping[str, nn.Module]) -> FeatureSums:
    """Sums of ``x`` and of ``x^2`` over the inputs of each layer: ``(2, in_features)`` in float64.

    Float64 since a variance is the difference of two numbers that may be close.
    """
    return FeatureSums(targets, _two_sums)


def _two_sums(x: Tensor) -> Tensor:
    total = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    for start, stop in panels(x.shape[0], x.shape[1] * torch.float64.itemsize):
        panel = x[start:stop].to(torch.float64)
        total += torch.stack((panel.sum(0), panel.square_().sum(0)))
    return total
