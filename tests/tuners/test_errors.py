"""Bad input: the exception names the field, the value, the layer and the cure."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_peft import S2FTConfig, SoRAConfig, SparseConfig, select_support
from tests.helpers.two_layers import TwoLayers


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"density": 0}, "density=0"),
        ({"density": -0.1}, "density=-0.1"),
        ({"density": 1.5}, "density=1.5"),
        ({"density": float("nan")}, "density=nan"),
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, "r=2.5"),
        ({"num_params": -3}, "num_params=-3"),
        ({"density": 0.1, "r": 4}, "density.*r"),
        ({"density_pattern": {"q": 2}}, "density_pattern.*2"),
        ({"allocation": "fair"}, "allocation='fair'.*numel"),
        ({"selection": "best"}, "selection='best'.*random"),
        ({"selection": "threshold"}, "selection='threshold' with threshold=None"),
        ({"threshold": 0.1}, "threshold=0.1: a threshold is given exactly when selection='threshold'"),
        ({"selection": "threshold", "threshold": -1.0}, "threshold=-1.0: a number above 0"),
        ({"selection": "threshold", "threshold": 0.1, "density": 0.1}, "threshold=0.1 and density are both given"),
        ({"principal_rank": 0}, "principal_rank=0"),
        ({"seed": "a"}, "seed='a'"),
        ({"bias": "lora_only"}, "bias='lora_only'.*'sparse_peft_delta_only'"),
        ({"save_dtype": "int8"}, "save_dtype='int8'.*'bfloat16'"),
        ({"layers_pattern": "h", "target_modules": ["q"]}, "`layers_to_transform` must also be specified"),
    ],
)
def test_bad_config(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SparseConfig(**kwargs)


def test_budgets_above_the_targets():
    for budget in ({"num_params": 10**6}, {"r": 1000}):
        field, value = next(iter(budget.items()))
        with pytest.raises(ValueError, match=f"{field}={value}"):
            get_peft_model(TwoLayers(), SparseConfig(target_modules=["first", "second"], **budget))


def test_targets_that_match_nothing():
    with pytest.raises(ValueError, match=r"Target modules \{'nothing'\} not found in the base model"):
        get_peft_model(TwoLayers(), SparseConfig(target_modules=["nothing"]))


def test_layers_of_other_kinds():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.EmbeddingBag(5, 4), nn.Linear(3, 3))
    for name, kind in (("0", "ConvTranspose2d"), ("1", "EmbeddingBag")):
        with pytest.raises(TypeError, match=f"Target module {name} of type {kind} is not supported.*exclude_modules"):
            get_peft_model(model, SparseConfig(target_modules=[name, "2"]))
    assert not any("sparse" in n for n, _ in model.named_parameters())  # nothing was replaced


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_tied_weights():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    with pytest.raises(ValueError, match=r"Target module lm_head shares its weight with model\.embed_tokens\.weight"):
        get_peft_model(LlamaForCausalLM(config), S2FTConfig(target_modules=["lm_head"], ratio=0.5))


def test_a_module_under_two_names_and_a_weight_in_two_modules():
    shared = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"Target module 0 shares its weight with 1\.weight"):
        get_peft_model(nn.Sequential(shared, shared), SparseConfig(target_modules=["0"]))
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"Target module 1 shares its weight with 0\.weight"):
        get_peft_model(nn.Sequential(first, second), SparseConfig(target_modules=["1"]))


def test_criteria_that_need_data_say_how_to_give_it():
    with pytest.raises(ValueError, match=r"selection='gradient'.*layer first.*select_support"):
        get_peft_model(TwoLayers(), SparseConfig(selection="gradient", target_modules=["first"]))
    with pytest.raises(ValueError, match="selection='random' needs no data"):
        select_support(TwoLayers(), SparseConfig(target_modules=["first"]), [torch.ones(1, 17)])
    config = SparseConfig(selection="gradient", target_modules=["first"])
    with pytest.raises(
        ValueError,
        match="needs data or gradients, and one source only; given are none",
    ):
        select_support(TwoLayers(), config)
    with pytest.raises(
        ValueError,
        match=r"\{'fist'\} match no layer of TwoLayers; did you mean 'first'\?; its linear layers are first, second",
    ):
        select_support(TwoLayers(), SparseConfig(selection="gradient", target_modules=["fist"]), [1])


def test_positions_for_another_model():
    config = SparseConfig(selection="gradient", target_modules=["first"], density=0.1)
    chosen = select_support(TwoLayers(), config, gradients={"first": torch.randn(33, 17)})
    with pytest.raises(ValueError, match="positions chosen by select_support are for other layers"):
        get_peft_model(nn.ModuleDict({"a": nn.ModuleDict({"first": nn.Linear(17, 33)})}), chosen)


def test_threshold_that_selects_nothing():
    with pytest.raises(ValueError, match=r"threshold.*finds no entry in any layer, neither in layer first"):
        get_peft_model(TwoLayers(), SparseConfig(selection="threshold", threshold=1e-30, target_modules=["first"]))


def test_uniform_scores_cannot_be_shared_out_globally():
    with pytest.raises(ValueError, match="allocation='global'"):
        get_peft_model(TwoLayers(), SparseConfig(allocation="global", target_modules=["first", "second"]))


@pytest.mark.parametrize(
    "first", [SparseConfig(density=0.2, target_modules=["first"]), LoraConfig(target_modules=["first"])]
)
@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.base_model], ids=["PeftModel", "tuner"])
def test_models_that_have_an_adapter(first, part):
    model = get_peft_model(TwoLayers(), copy.deepcopy(first))
    before = {name: type(module) for name, module in model.named_modules()}
    again = SparseConfig(density=0.2, target_modules=["second"])
    message = r"the model has an adapter already \('default'\): call model.add_adapter"
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="second time|peft_config"):
        get_peft_model(part(model), again)
    with pytest.raises(ValueError, match=message):
        select_support(part(model), SparseConfig(selection="fisher", target_modules=["second"]), [], loss_fn=max)
    assert before == {name: type(module) for name, module in model.named_modules()}


def test_cures_of_a_model_that_has_an_adapter():
    model = get_peft_model(TwoLayers(), SparseConfig(density=0.2, target_modules=["first"]))
    config = SparseConfig(selection="fisher", density=0.2, target_modules=["second"])
    batches = [torch.randn(2, 17)]
    chosen = select_support(model.get_base_model(), config, batches, loss_fn=lambda m, x: m(x).square().sum())
    model.add_adapter("other", chosen)
    assert get_peft_model(model.unload(), SparseConfig(density=0.2, target_modules=["first"]))


def test_layers_with_another_methods_adapter():
    model = get_peft_model(TwoLayers(), SparseConfig(density=0.2, target_modules=["first"])).get_base_model()
    message = "Target module first has adapters of another method already.*merge_and_unload"
    with pytest.raises(TypeError, match=message), pytest.warns(UserWarning, match="peft_config"):
        inject_adapter_in_model(SoRAConfig(target_modules=["first"]), model, "b")
