"""Layers that take the place of linear ones in a model, and give it back."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class ReplacedLinear(nn.Module):
    """A layer with the weight and bias of a linear layer whose place it takes.

    The parameters are the same objects, so that nothing is copied and nothing moves when the other layer comes back.
    Adapters are refused: they would know nothing of the other terms of its output.

    Args:
        original: an ``nn.Linear`` or a ``Conv1D``.
        weight_name: under which the weight is registered.

    Attributes:
        changes_weight: whether the weight has other values than in the original layer.
        original: the layer that was replaced; no submodule.
        in_features, out_features: sizes.
        bias: ``(out_features,)`` or None.
    """

    changes_weight: ClassVar[bool] = True
    original: nn.Module
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(self, original: nn.Module, weight_name: str) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.weight_name, self.is_transposed = weight_name, isinstance(original, Conv1D)
        weight, bias = original.weight, original.bias
        assert isinstance(weight, nn.Parameter) and (bias is None or isinstance(bias, nn.Parameter))
        self.out_features, self.in_features = weight.shape[::-1] if self.is_transposed else weight.shape
        self.register_parameter(weight_name, weight)
        self.register_parameter("bias", bias)
        self.training = original.training

    def rows(self) -> Tensor:
        """The weight as ``(out_features, in_features)``."""
        weight = self._parameters[self.weight_name]
        assert weight is not None
        return weight.t() if self.is_transposed else weight

    def product(self, x: Tensor) -> Tensor:
        """The weight's product with ``(..., in_features)``, without the bias."""
        return F.linear(x, self.rows())

    def given_back(self) -> nn.Module:
        """The layer that was replaced, as it was but for the weight's values."""
        return self.original

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def check_replaceable(name: str) -> None:
    """Refuse a model that is a layer itself, of which no model holds the place.

    Raises:
        ValueError: the name is empty.
    """
    if not name:
        raise ValueError("layers of a model are replaced here, and this one is a layer; put it into a model")


def weight_name_of(module: nn.Module) -> str:
    """The name of the parameter that has a layer's weight."""
    return module.weight_name if isinstance(module, ReplacedLinear) else "weight"


def replaced_layers(model: nn.Module) -> dict[str, ReplacedLinear]:
    """``{layer name: layer}`` of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ReplacedLinear)}
