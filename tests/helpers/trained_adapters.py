"""Small models and adapters' folders for the tests of what happens after training."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from sparse_peft import S2FTConfig, SaRAConfig, SLTrainConfig, SoRAConfig, SparseConfig
from sparse_peft.tuners.delta_layer import TunerLayer

LAYERS = ["first", "second", "third"]
SPARSE = {
    "sparse": lambda n, **k: SparseConfig(**{"density": 0.3, "seed": n, **k}),
    "sara": lambda n, **k: SaRAConfig(**{"density": 0.2 + n / 10, **k}),
    "s2ft": lambda n, **k: S2FTConfig(**{"k": 2 + n, "seed": n, **k}),
}
FACTORS = {
    "sora": lambda n, **k: SoRAConfig(**{"r": 2 + n, "alpha": 3 + n, **k}),
    "sltrain": lambda n, **k: SLTrainConfig(**{"r": 2 + n, "alpha": 3 + n, "density": 0.2, "seed": n, **k}),
}
METHODS = {**SPARSE, **FACTORS}


class Three(nn.Module):
    """A linear layer with a bias, a Conv1D (its weight stored the other way), a linear layer without; odd sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(7, 11)
        self.second = Conv1D(9, 11)
        self.third = nn.Linear(9, 5, bias=False)

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def three(dtype=torch.float32):
    return Three().to(dtype).eval()


def llama(**config):
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 40, "num_hidden_layers": 2, **sizes, **config})).eval()


def trained(config, seed=0, base=three, **fields):
    """A model with an adapter of random values, as if it were trained."""
    model = base()
    torch.manual_seed(100 + seed)
    for name, value in {"init_weights": False, "target_modules": LAYERS, **fields}.items():
        setattr(config, name, value)
    return get_peft_model(model, config).eval()


def saved(folder, config, seed=0, **fields):
    """``(folder, model)`` of a random adapter."""
    model = trained(config, seed, **fields)
    model.save_pretrained(folder)
    return folder, model


def loaded(folder, base=three):
    return PeftModel.from_pretrained(base(), folder).eval()


def deltas(model, adapter_name="default"):
    """``{layer: dense float64 delta}`` of an adapter."""
    return {
        layer.name: layer.get_delta_weight(adapter_name).detach().double()
        for layer in model.modules()
        if isinstance(layer, TunerLayer) and adapter_name in layer.deltas
    }


def support_masks(model, adapter_name="default"):
    """``{layer: bool mask}`` of the trained entries."""
    return {
        layer.name: layer.support(adapter_name).to_mask()
        for layer in model.modules()
        if isinstance(layer, TunerLayer) and adapter_name in layer.deltas
    }


def weighted_sum(parts, weights):
    """``{layer: float64}`` of dense deltas, where an adapter that lacks a layer counts as zero."""
    total = {}
    for part, weight in zip(parts, weights, strict=True):
        for layer, delta in part.items():
            total[layer] = total.get(layer, 0) + weight * delta
    return total


def kept_largest(delta, mask, density):
    """A dense delta with the largest ``int(density * entries)`` of its entries alone."""
    entries = delta[mask]
    count = int(density * entries.numel())
    last = entries.abs().sort(descending=True).values[count - 1] if count else float("inf")
    return torch.where(mask & (delta.abs() >= last), delta, 0.0)


def elected(parts, weights, method):
    """TIES, sections 3.2 and 3.3 of the paper, entry by entry: the elected sign, the mean of those that have it."""
    stacked = torch.stack(parts)
    votes = stacked.sum(0) if method == "total" else stacked.sign().sum(0)
    sign = torch.where(votes >= 0, 1.0, -1.0)
    agrees = stacked.sign() == sign
    total = sum(weight * part * agree for weight, part, agree in zip(weights, stacked, agrees, strict=True))
    return total / agrees.sum(0).clamp(min=1)
