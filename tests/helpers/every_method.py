"""A small adapted model of every method, and what its base is."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

import sparse_peft
from sparse_peft import S2FTConfig, SaRAConfig, SketchConfig, SLTrainConfig, SnellaConfig, SoRAConfig, SparseConfig
from sparse_peft.tuners.base_layer import TunerLayer
from tests.helpers.two_layers import TwoLayers

CONFIGS = {
    "sparse": lambda: SparseConfig(density=0.3),
    "sparse in products": lambda: SparseConfig(density=0.3, resident="product"),
    "sara": lambda: SaRAConfig(density=0.3),
    "s2ft": lambda: S2FTConfig(ratio=0.4),
    "sltrain": lambda: SLTrainConfig(r=2, density=0.2),
    "sora": lambda: SoRAConfig(r=2),
    "snell": lambda: SnellaConfig(r=4, kernel="distance"),
    "snella": lambda: SnellaConfig(r=4, kernel="mixed"),
    "sketch": lambda: SketchConfig(bits=2),
    "sketch replace": lambda: SketchConfig(bits=2, mode="replace"),
}


class Reference(NamedTuple):
    """What a model's base was, for each of its layers.

    Attributes:
        bits: the base's tensors.
        dense: its weight.
        bias: its bias.
    """

    bits: list[list[Tensor]]
    dense: list[Tensor]
    bias: list[Tensor | None]


def adapted(method: str = "sparse", base: nn.Module | None = None) -> tuple[Any, Reference]:
    """A model with the adapters ``default``, which is active, and ``other``; both add something to the base."""
    torch.manual_seed(0)
    model: Any = None
    base = TwoLayers(7, 9, 4) if base is None else base
    for name in ("default", "other"):
        config = CONFIGS[method]()
        config.target_modules, config.init_weights = "all-linear", False
        if model is None:
            model = get_peft_model(base, config)
        else:
            model.add_adapter(name, config)
    layers = layers_of(model)
    return model.eval(), Reference(
        copy.deepcopy([bits_of(layer) for layer in layers]),
        [dense_of(layer).clone() for layer in layers],
        copy.deepcopy([layer.base_bias for layer in layers]),
    )


def layers_of(model: nn.Module) -> list[TunerLayer[Any]]:
    return [module for module in model.modules() if isinstance(module, TunerLayer)]


def dense_of(layer: Any) -> Tensor:
    replaced = getattr(layer, "replaced", None)
    return (layer.base_parameter if replaced is None else replaced.weight).detach()


def bits_of(layer: Any) -> list[Tensor]:
    replaced = getattr(layer, "replaced", None)
    return [layer.base_parameter] if replaced is None else [replaced.codes, replaced.codebook]


def is_base(model: nn.Module, reference: Reference) -> bool:
    """Whether the base, inside of a ``base_weights`` block, is what it was, bit for bit."""
    with sparse_peft.base_weights(model):
        found = [bits_of(layer) for layer in layers_of(model)]
        return all(
            torch.equal(a, b)
            for own, other in zip(found, reference.bits, strict=True)
            for a, b in zip(own, other, strict=True)
        )


def dense_output(model: nn.Module, reference: Reference, x: Tensor) -> Tensor:
    """``TwoLayers``'s in float64, with the adapters that each layer has merged or, unless disabled, active."""
    x = x.double()
    for number, layer in enumerate(layers_of(model)):
        names = layer.merged_adapters or ([] if layer.disable_adapters else layer.active_adapters)
        weight = reference.dense[number].double() + sum(layer.get_delta_weight(name).double() for name in names)
        bias = reference.bias[number]
        x = F.linear(x.relu() if number else x, weight, None if bias is None else bias.double())
    return x


@torch.no_grad()
def output(model: Any, x: Tensor) -> Tensor:
    return model.base_model.model(x)
