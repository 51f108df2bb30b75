"""Weights in one memory: within a model, and of two models."""

import copy
import gc

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sparse_peft import S2FTConfig, SoRAConfig, SparseConfig
from tests.helpers.expert_models import config as experts_config
from tests.helpers.expert_models import layers, mixture
from tests.helpers.two_layers import TwoLayers


def sparse(**options):
    return SparseConfig(target_modules="all-linear", density=0.3, init_weights=False, **options)


class Tied(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = weight(self.emb.weight)

    def forward(self, ids):
        return self.head(self.emb(ids))


@pytest.mark.parametrize("config", [sparse(), S2FTConfig(ratio=0.5, target_modules=["head"]), SoRAConfig(r=2)])
@pytest.mark.parametrize(
    "share",
    [lambda w: w, lambda w: nn.Parameter(w.data), lambda w: nn.Parameter(w.data.view(-1)[: w.numel()].view_as(w))],
    ids=["one parameter", "one memory", "a view"],
)
def test_a_target_in_the_memory_of_an_embedding_is_refused(request, config, share):
    config.target_modules = ["head"]
    if isinstance(config, SparseConfig) and "one parameter" in request.node.name:
        get_peft_model(Tied(share), config)  # tied weights, which have one delta
        return
    with pytest.raises(ValueError, match=r"Target module head shares its weight with emb\.weight"):
        get_peft_model(Tied(share), config)


def test_targets_that_overlap_are_refused_and_neighbours_are_not():
    whole = torch.randn(9, 4)
    for rows, overlap in ((4, True), (5, False)):
        model = nn.Sequential(nn.Linear(4, 5), nn.Linear(4, 9 - rows))
        model[0].weight, model[1].weight = nn.Parameter(whole[:5]), nn.Parameter(whole[rows:])
        if overlap:
            with pytest.raises(ValueError, match=r"Target module 0 shares its weight with 1\.weight"):
                get_peft_model(model, sparse())
        else:
            get_peft_model(model, sparse())


@pytest.mark.parametrize("second", [sparse(), sparse(resident=False), SoRAConfig(r=2, target_modules="all-linear")])
def test_a_weight_of_another_adapted_model_is_refused(second):
    base = TwoLayers()
    twin = TwoLayers()
    twin.first.weight = base.first.weight
    get_peft_model(base, sparse())
    gc.collect()
    with pytest.raises(ValueError, match=r"first shares its weight with layer first of another model"):
        get_peft_model(twin, second)
    assert type(twin.first) is nn.Linear  # nothing was replaced


def test_fused_experts_of_another_adapted_model_are_refused():
    base = mixture()
    twin = copy.deepcopy(base)
    twin.model.layers[0].mlp.experts.gate_up_proj = base.model.layers[0].mlp.experts.gate_up_proj
    model = get_peft_model(base, experts_config())
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj shares its weight"):
        get_peft_model(twin, experts_config())
    assert model.peft_config


def test_a_second_model_may_have_a_copy_or_the_weights_of_one_that_is_unloaded_or_gone():
    base, twin = TwoLayers(), TwoLayers()
    twin.first.weight = base.first.weight
    model = get_peft_model(base, sparse())
    get_peft_model(copy.deepcopy(twin), sparse())
    model.unload()
    second = get_peft_model(twin, sparse())
    del second, twin, model  # no unload(): only the model itself refers to it
    get_peft_model(base, sparse())


def test_experts_of_an_unloaded_model_adapt_anew_while_somebody_has_their_layers():
    model = get_peft_model(mixture(), experts_config())
    kept = layers(model)  # as a controller has them
    get_peft_model(model.unload(), experts_config())
    assert kept


def test_two_models_that_write_nothing_into_a_weight_may_share_it():
    base, twin = TwoLayers(), TwoLayers()
    twin.first, twin.second = copy.copy(base.first), copy.copy(base.second)  # two layers with the same parameters
    x = torch.randn(3, 17)
    outputs = []
    for model in (base, twin):
        adapted = get_peft_model(model, SoRAConfig(r=2, target_modules="all-linear", init_weights=False))
        outputs.append(adapted(x))
        with adapted.disable_adapter():
            outputs.append(adapted(x))
    assert torch.equal(outputs[1], outputs[3]) and not torch.equal(outputs[0], outputs[2])


def test_a_tied_weight_that_something_else_has_as_well_is_refused():
    model = Tied(lambda weight: weight)
    model.norm = nn.LayerNorm(6)
    model.norm.weight = nn.Parameter(model.emb.weight.data[0])
    with pytest.raises(ValueError, match=r"Target module emb shares its weight with .*norm\.weight"):
        get_peft_model(model, SparseConfig(target_modules=["head"], density=0.3))
    twice = Tied(lambda weight: weight)
    twice.again = twice.emb
    with pytest.raises(ValueError, match=r"Target module emb shares its weight with .*again\.weight"):
        get_peft_model(twice, SparseConfig(target_modules=["head"], density=0.3))
