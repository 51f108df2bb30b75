"""Small models with embeddings, tied and not, and what they compute, written densely."""

from __future__ import annotations

import copy

import torch
from peft import get_peft_model
from torch import nn

from sparse_peft import SparseConfig
from sparse_peft.tuners.traversal import tuner_layers

ROWS, COLS = 23, 7


class Words(nn.Module):
    """Embedding, tanh, and a head, which may have the embedding's weight."""

    def __init__(self, tied=False, bias=False, **embedding):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(ROWS, COLS, **embedding)
        self.head = nn.Linear(COLS, ROWS, bias=bias)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.emb(ids)))


class Scaled(nn.Embedding):
    """An embedding with a forward of its own, as Gemma 3 has."""

    def forward(self, ids):
        return super().forward(ids) * 3.0


def hooked(model, name="emb"):
    """The model with a hook in one layer, which has to run in every pass."""
    getattr(model, name).register_forward_hook(lambda module, args, output: None)
    return model


def scaled(model):
    """The model with an embedding of another class."""
    weight = model.emb.weight
    model.emb = Scaled(ROWS, COLS)
    model.emb.weight = weight
    return model


IDS = torch.tensor([[1, 2, 2, 22], [5, 0, 1, 2], [2, 2, 2, 2]])


def adapted(model, names=("emb",), adapter_name="default", **config):
    """``(peft model, an untouched copy of its base)``."""
    reference = copy.deepcopy(model)
    settings = {"density": 0.4, "init_weights": False, "scale": 1.0, **config}
    return get_peft_model(model, SparseConfig(target_modules=list(names), **settings), adapter_name), reference


def layers(model):
    """``{name: layer}`` of the adapted layers, without the model's prefix; of tied ones the first."""
    return {layer.name: layer for layer in tuner_layers(model)}


def with_deltas(reference, model, names=("default",)):
    """The reference with the deltas of the named adapters added to its weights, which then require gradients."""
    dense = copy.deepcopy(reference)
    with torch.no_grad():
        for name, layer in layers(model).items():
            weight = dense.get_submodule(name).weight
            delta = sum(layer.get_delta_weight(n).double() for n in names if n in layer.deltas)
            weight.copy_((weight.double() + delta).to(weight.dtype))
    return dense.requires_grad_()


def wanted_gradients(dense, model, adapter="default"):
    """``{layer: the dense gradient at the adapter's support}``."""
    found = {}
    for name, layer in layers(model).items():
        gradient = dense.get_submodule(name).weight.grad
        found[name] = gradient.reshape(-1)[layer.support(adapter).indices.long()]
    return found


def backward(model, ids=IDS):
    """The output, after the backward pass of its sum of squares."""
    out = model(ids)
    out.square().sum().backward()
    return out
