"""Every module of fused experts in transformers, with the smallest config that makes one."""

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from tests.helpers.expert_models import config, layers

FOLDER = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", re.MULTILINE)
DOCS = Path(__file__).parents[2] / "docs" / "experts.md"
EXPERTS, HIDDEN = 4, 16


def found():
    """``[(module's name, class)]`` of the modules with transformers' decorator."""
    for file in sorted(FOLDER.glob("*/modeling_*.py")):
        for name in DECORATED.findall(file.read_text()):
            yield f"transformers.models.{file.parent.name}.{file.stem}", name


CLASSES = list(found())


class SmallConfig:
    """Any number that a module of experts asks its config for."""

    _experts_implementation = "eager"
    hidden_act = hidden_activation = mlp_hidden_act = activation = "silu"
    swiglu_limit, swiglu_alpha, rms_norm_eps = 7.0, 1.7, 1e-6
    moe_latent_size = mlp_bias = None

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        if "intermediate" in name:
            return 12
        return EXPERTS if "experts" in name else HIDDEN


class Block(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def block(module, name):
    torch.manual_seed(0)
    made = Block(getattr(importlib.import_module(module), name)(SmallConfig()))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize(("module", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_every_module_of_experts_trains(module, name, implementation):
    dtype, tolerance = (torch.float32, 1e-4) if implementation == "grouped_mm" else (torch.float64, 1e-9)
    base, dense = block(module, name).to(dtype), block(module, name).double()
    model = get_peft_model(base, config(task_type=None, density=0.2))
    base.experts.config._experts_implementation = implementation
    if implementation == "batched_mm":  # which some classes compute in another precision than their loop
        dense.experts.config._experts_implementation = implementation
    assert len(layers(model)) == 2
    parameters = dict(dense.named_parameters())
    with torch.no_grad():
        for path, layer in layers(model).items():
            parameters[path].add_(layer.get_delta_weight("default"))
    x, weights = torch.randn(7, HIDDEN, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)
    index = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(7)])  # the last expert gets no token
    found, wanted = model(x.to(dtype), index, weights.to(dtype)), dense(x, index, weights)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for path, layer in layers(model).items():
        gradient = parameters[path].grad.reshape(-1)[layer.support("default").indices.long()]
        error = (layer.deltas["default"].values.grad.double() - gradient).abs().max() / gradient.abs().max()
        assert error < tolerance, path


@pytest.mark.slow
def test_the_page_has_every_model_type():
    types = {module.split(".")[2] for module, _ in CLASSES}
    listed = set(re.findall(r"`(\w+)`", DOCS.read_text().partition("## Model types")[2]))
    assert types <= listed, sorted(types - listed)


def test_a_config_of_experts_is_asked_for_what_the_small_one_has():
    assert len(CLASSES) > 20
    assert isinstance(copy.copy(SmallConfig()).num_experts, int)
