"""Small models, and what a layer computes, written densely in float64."""

from __future__ import annotations

import copy

import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_peft import SparseConfig
from sparse_peft.tuners.delta_layer import SparseTunerLayer


class TwoLayers(nn.Module):
    """Linear(in, hidden) with bias, ReLU, Linear(hidden, out) without; or GPT-2's Conv1D (always with bias)."""

    def __init__(self, n_in=17, hidden=33, n_out=5, conv1d=False, bias=True):
        super().__init__()
        self.first = Conv1D(hidden, n_in) if conv1d else nn.Linear(n_in, hidden, bias=bias)
        self.second = Conv1D(n_out, hidden) if conv1d else nn.Linear(hidden, n_out, bias=False)
        if conv1d:
            nn.init.normal_(self.first.weight)
            nn.init.normal_(self.second.weight)
            nn.init.normal_(self.first.bias)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def adapted(model=None, names=("first", "second"), adapter_name="default", **config):
    """``(peft model, an untouched copy of its base)``."""
    model = TwoLayers() if model is None else model
    reference = copy.deepcopy(model)
    config.setdefault("density", 0.2)
    config.setdefault("init_weights", False)
    config.setdefault("scale", 1.0)
    return get_peft_model(model, SparseConfig(target_modules=list(names), **config), adapter_name), reference


def layers_of(model):
    return {n.rpartition("model.")[2]: m for n, m in model.named_modules() if isinstance(m, SparseTunerLayer)}


def oracle_output(reference, weights, x):
    """TwoLayers in float64 with these effective weights (as stored), differentiable."""

    def linear(module, weight, x):
        weight = weight if isinstance(module, Conv1D) else weight.t()
        bias = 0 if module.bias is None else module.bias.detach().double()
        return x @ weight + bias

    return linear(reference.second, weights["second"], torch.relu(linear(reference.first, weights["first"], x)))


def effective_weights(model, reference, names=("default",)):
    """Base plus the adapters' deltas, rounded once to the base's dtype, in float64 and requiring grad."""
    weights = {}
    for name, layer in layers_of(model).items():
        base = getattr(reference, name).weight.detach()
        delta = sum(layer.get_delta_weight(n).double() for n in names if n in layer.deltas)
        weights[name] = (base.double() + delta).to(base.dtype).double().requires_grad_()
    return weights


def assert_base_untouched(model, reference):
    for name, parameter in reference.named_parameters():
        module, _, leaf = name.rpartition(".")
        layer = layers_of(model).get(module)
        base = layer.get_base_layer() if layer is not None else model.get_submodule(f"base_model.model.{module}")
        assert torch.equal(getattr(base, leaf), parameter), f"{name} of the base was changed"
