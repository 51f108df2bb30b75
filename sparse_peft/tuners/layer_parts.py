"""The weight and the bias of a layer, whose types torch's stubs do not say: any attribute may be a module to them."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's weight as it is stored."""
    return layer.weight  # type: ignore[return-value]  # see above


def bias_of(layer: nn.Module) -> nn.Parameter | None:
    """The layer's bias; None for a layer without."""
    return cast("nn.Parameter | None", getattr(layer, "bias", None))  # embeddings have none
