"""A small model whose positions change in training, and its state."""

import torch
from peft import get_peft_model

from sparse_peft import SparseConfig
from tests.helpers.two_layers import TwoLayers, layers_of


def adapted(selection="accumulated_gradient", base=None, **config):
    torch.manual_seed(0)
    base = TwoLayers() if base is None else base
    config = {"density": 0.15, "reselect_every": 6, "accumulate": 0 if selection == "set" else 3, **config}
    fields = {"target_modules": ["first", "second"], "selection": selection, "scale": 1.0, **config}
    return get_peft_model(base, SparseConfig(**fields))


def snapshot(model):
    return {
        n: (layer.support("default").indices.clone(), layer.deltas["default"].values.detach().clone())
        for n, layer in layers_of(model).items()
    }


def assert_equal(one, other):
    for name in one:
        assert torch.equal(one[name][0], other[name][0]), f"positions of {name}"
        assert torch.equal(one[name][1], other[name][1]), f"values of {name}"
