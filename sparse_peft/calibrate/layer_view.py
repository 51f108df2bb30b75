"""A target layer as this package sees it: a name, how it is watched, and a stored weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..numerics.tokens import flatten_tokens
from ..ops.communication import gather_features
from ..ops.embedding import EmbeddingProduct
from ..ops.expert_products import Routing
from ..ops.one_hot import Factor
from .model_pass import layer_input

See = Callable[[Tensor, Tensor, Routing | None], Tensor | None]
"""Called with the inputs of a product, its output, and the experts of the inputs' rows; None for a single matrix.

It returns the output that the model goes on with; None for the same.
"""

KeptTokens = Callable[[], Tensor | None]
"""The tokens of the current batch that count, as booleans; None for all."""


def _all_tokens() -> None:
    return None


def whole_features(x: Tensor, module: nn.Module, is_input: bool) -> Tensor:
    """An input or output of a layer with all of its features, where tensor parallelism divides them.

    Args:
        x: ``(..., features)``.
        module: the layer.
        is_input: whether ``x`` is its input.
    """
    weight = module._parameters.get("weight")
    if not isinstance(weight, DTensor) or not isinstance(module, nn.Linear):
        return x
    features = module.in_features if is_input else module.out_features
    return x if x.shape[-1] == features else gather_features(x, features, weight.device_mesh.get_group())


@dataclass(frozen=True)
class LayerView:
    """One target layer.

    Attributes:
        name: of the layer in the model.
        module: whose inputs, outputs and gradients are observed.
        shape: ``(rows, cols)`` of the stored weight.
        in_dim: the weight's dimension of input features: 1 in ``nn.Linear``, 0 in ``Conv1D`` and ``nn.Embedding``.
        weight: returns the stored weight in floats; quantised layers dequantise it at each call.
        experts: the number of matrices that the weight consists of, one above the other, as of fused experts.
        watch_experts: ``watch_experts(see, kept)``: calls ``see`` for each product with experts, and returns a
            function that ends this.
        lookup: the product of an embedding; None for others.
        tied: views of the other layers that have the same weight.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]
    in_dim: int
    weight: Callable[[], Tensor]
    experts: int = 1
    watch_experts: Callable[[See, KeptTokens], Callable[[], None]] | None = None
    lookup: EmbeddingProduct | None = None
    tied: tuple[LayerView, ...] = ()

    @classmethod
    def of(cls, name: str, module: nn.Linear | Conv1D) -> LayerView:
        """The view of a layer whose weight is not quantised."""
        rows, cols = module.weight.shape
        in_dim = 0 if isinstance(module, Conv1D) else 1
        return cls(name, module, (rows, cols), in_dim, lambda: module.weight.detach())

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def uses(self) -> list[LayerView]:
        """The views of all layers that have the weight, under this layer's name."""
        return [self, *(replace(view, name=self.name) for view in self.tied)]

    def factors(self, x: Tensor, grad: Tensor) -> tuple[Factor, Tensor]:
        """The factors ``(tokens, rows)`` and ``(tokens, cols)`` of the weight's gradient.

        Args:
            x: the layer's input.
            grad: the gradient of its output.
        """
        if self.lookup is not None:
            return self.lookup.factors(x, grad)
        x = flatten_tokens(whole_features(x, self.module, True))
        grad = flatten_tokens(whole_features(grad, self.module, False))
        return (grad, x) if self.in_dim == 1 else (x, grad)

    @property
    def parts(self) -> list[LayerView]:
        """The view of each expert; of a layer with one matrix the view itself."""
        if self.watch_experts is None:
            return [self]
        rows, cols = self.shape[0] // self.experts, self.shape[1]
        return [
            LayerView(self.part_name(number), self.module, (rows, cols), self.in_dim, partial(self._part, number))
            for number in range(self.experts)
        ]

    def part_name(self, number: int) -> str:
        """The name of an expert, or of the layer if it has one matrix."""
        return self.name if self.watch_experts is None else f"{self.name}[{number}]"

    def _part(self, number: int) -> Tensor:
        rows = self.shape[0] // self.experts
        return self.weight()[number * rows : (number + 1) * rows]

    def watch(self, see: See, kept: KeptTokens = _all_tokens) -> Callable[[], None]:
        """Call ``see`` for each product with the weight, until the returned function is called.

        Args:
            see: takes inputs, output and routing.
            kept: the tokens whose products are seen, where the layer gets tokens of several sequences in one
                dimension.
        """
        if self.watch_experts is not None:
            return self.watch_experts(see, kept)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            return see(layer_input(args, kwargs), output, None)

        return self.module.register_forward_hook(hook, with_kwargs=True).remove
