"""Small models and data for pruning."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tests.helpers.language_models import small_llama

GRADIENT_SCORES = ("gradient", "fisher", "gallop", "movement", "snip")


def llama(**config):
    return small_llama(attention_bias=True, initializer_range=0.3, **config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def batches(count=3, size=4, length=12, labels=False):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 40, (size, length), generator=generator) for _ in range(count)]
    return [{"input_ids": x, **({"labels": x} if labels else {}), "use_cache": False} for x in ids]


def linear_layers(model):
    """The layers that are pruned by default."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and n != "lm_head"}


def rows(module, tensor=None):
    """``(outputs, inputs)`` of a weight, or of a tensor of its layout."""
    tensor = module.weight.detach() if tensor is None else tensor
    return tensor.t() if isinstance(module, Conv1D) else tensor


@torch.no_grad()
def inputs_of(model, names, data):
    """``{layer name: (tokens, inputs)}`` float64 that the layers see, by running the whole model."""
    found = {name: [] for name in names}
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _, args, __, name=name: found[name].append(args[0].flatten(0, -2)))
        for name in names
    ]
    for batch in data:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}
