"""A linear layer as this package sees it: a name, a module to hook, and a stored weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LayerView:
    """One target layer.

    Attributes:
        name: of the layer in the model.
        module: whose inputs, outputs and gradients are observed.
        shape: ``(rows, cols)`` of the stored weight.
        in_dim: the weight's dimension of input features: 1 in ``nn.Linear``, 0 in ``Conv1D``.
        weight: returns the stored weight in floats; quantised layers dequantise it at each call.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]
    in_dim: int
    weight: Callable[[], Tensor]

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
