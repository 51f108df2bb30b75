"""A linear layer without its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightlessLinear(nn.Module):
    """The sizes, dtype and bias of a linear layer; its weight is a meta tensor, which takes no memory.

    Args:
        linear: the layer that it replaces.
    """

    like: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # follows .to() and .half() as a weight would
        self.register_buffer("like", torch.empty(0, dtype=linear.weight.dtype), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def weight(self) -> Tensor:
        """A weight of the layer's shape and dtype, without content."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def with_weight(self, weight: Tensor) -> nn.Linear:
        """An ordinary linear layer with this weight and the same bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(weight.to(self.dtype))
        linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(
            "a layer of an SLTrain model in mode='pretrain' has no weight of its own: everything it computes is its "
            "adapter's, which cannot be left out"
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
