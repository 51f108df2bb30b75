"""Selection from data, from the config to the trained positions, against dense autograd."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_peft import (
    SLTrainConfig,
    SparseConfig,
    build_for_pretraining,
    select_support,
)
from sparse_peft.adapters import read_stored, supports_of
from sparse_peft.planning import PlanOptions, plan_training
from sparse_peft.structure import read_model_config
from sparse_peft.support import Support
from sparse_peft.tuners.base_layer import TunerLayer
from tests.helpers.two_layers import TwoLayers, layers_of

NAMES = ["first", "second"]


def loss_fn(model, batch):
    return model(batch).pow(2).sum()


def dense_scores(model, batches, selection):
    """Scores of every entry in float64, from plain autograd on a copy."""
    model = copy.deepcopy(model).double()
    sums = {name: 0.0 for name in NAMES}
    for batch in batches:
        model.zero_grad()
        loss_fn(model, batch.double()).backward()
        for name in NAMES:
            grad = getattr(model, name).weight.grad
            sums[name] = sums[name] + (grad.square() if selection == "fisher" else grad)
    weights = {name: getattr(model, name).weight.detach() for name in NAMES}
    if selection == "movement":
        return {name: -weights[name] * sums[name] for name in NAMES}
    if selection == "gallop":
        return {name: sums[name].abs() / len(batches) / (weights[name].abs() + 1e-8) for name in NAMES}
    return {name: value.abs() for name, value in sums.items()}


@pytest.mark.parametrize("selection", ["gradient", "fisher", "movement", "gallop"])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("allocation", ["numel", "global"])
def test_the_best_entries_train(selection, conv1d, allocation):
    model = TwoLayers(conv1d=conv1d)
    batches = [torch.randn(6, 17) for _ in range(3)]
    before = copy.deepcopy(model.state_dict())
    config = SparseConfig(selection=selection, density=0.1, target_modules=NAMES, allocation=allocation)
    chosen = select_support(model, config, batches, loss_fn=loss_fn, oversample=float("inf"))
    assert config.num_entries is None and "supports" not in config.__dict__  # the caller's config is as it was
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])

    scores = dense_scores(model, batches, selection)
    adapted = get_peft_model(model, chosen)
    if allocation == "global":
        everything = torch.cat([scores[name].reshape(-1) for name in NAMES])
        best = everything.topk(round(0.1 * everything.numel())).values.min()
        for name, layer in layers_of(adapted).items():
            expected = (scores[name].reshape(-1) >= best).nonzero().reshape(-1)
            assert torch.equal(layer.support("default").indices.long(), expected)
    else:
        for name, layer in layers_of(adapted).items():
            k = layer.support("default").nnz
            expected = scores[name].reshape(-1).topk(k).indices.sort().values
            assert torch.equal(layer.support("default").indices.long(), expected)
    assert sum(chosen.num_entries.values()) == round(0.1 * (17 * 33 + 33 * 5))


def test_gradients_that_are_known_already():
    model = TwoLayers()
    loss_fn(model, torch.randn(6, 17)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    config = SparseConfig(selection="gradient", density=0.1, target_modules=NAMES)
    layers = layers_of(get_peft_model(model, select_support(model, config, gradients=gradients)))
    for name, layer in layers.items():
        k = layer.support("default").nnz
        expected = gradients[f"{name}.weight"].abs().reshape(-1).topk(k).indices.sort().values
        assert torch.equal(layer.support("default").indices.long(), expected)


@pytest.mark.parametrize("conv1d", [False, True])
def test_wanda(conv1d):
    model = TwoLayers(conv1d=conv1d)
    batches = [{"x": torch.randn(6, 17)} for _ in range(3)]
    config = SparseConfig(selection="wanda", density=0.1, target_modules=["first"])
    layers = layers_of(get_peft_model(model, select_support(model, config, batches)))
    norms = torch.cat([b["x"] for b in batches]).norm(dim=0)
    weight = layers["first"].base_layer.weight.abs()
    scores = weight * (norms[:, None] if conv1d else norms)
    k = layers["first"].support("default").nnz
    assert torch.equal(
        layers["first"].support("default").indices.long(), scores.reshape(-1).topk(k).indices.sort().values
    )


def test_chosen_positions_train_and_travel(tmp_path):
    model = TwoLayers()
    config = SparseConfig(selection="fisher", density=0.1, target_modules=NAMES)
    chosen = copy.deepcopy(select_support(model, config, [torch.randn(4, 17)], loss_fn=loss_fn))
    adapted = get_peft_model(model, chosen)
    adapted.save_pretrained(tmp_path)

    again = PeftModel.from_pretrained(TwoLayers(), tmp_path)
    for a, b in zip(layers_of(adapted).values(), layers_of(again).values(), strict=True):
        assert torch.equal(a.support("default").indices, b.support("default").indices)


@pytest.mark.parametrize("selection", ["magnitude", "magnitude_smallest", "principal", "threshold"])
def test_criteria_on_weights(selection):
    model = TwoLayers()
    options = {"threshold": 0.05} if selection == "threshold" else {"density": 0.1}
    layers = layers_of(get_peft_model(model, SparseConfig(selection=selection, target_modules=NAMES, **options)))
    for layer in layers.values():
        weight = layer.base_layer.weight.detach().double()
        scores = weight.abs().reshape(-1)
        support = layer.support("default")
        if selection == "threshold":
            expected = (scores < 0.05).nonzero().reshape(-1)
        elif selection == "principal":  # rank 32 covers the smaller side: the approximation is the weight itself
            expected = scores.topk(support.nnz).indices.sort().values
        else:
            order = scores.sort(descending=selection == "magnitude", stable=True).indices
            expected = order[: support.nnz].sort().values
        assert torch.equal(support.indices.long(), expected)


def test_global_magnitude():
    model = TwoLayers()
    with torch.no_grad():
        model.second.weight.mul_(100)
    config = SparseConfig(selection="magnitude", density=0.1, allocation="global", target_modules=NAMES)
    get_peft_model(model, config)
    # all of the larger weights' layer that fits, and at least one entry of the other
    assert config.num_entries == {"first": 1, "second": round(0.1 * (17 * 33 + 33 * 5)) - 1}


# ---------------------------------------------------------------------------------------------------- given positions


def given(conv1d=False):
    """A support, a mask, and the positions of both in float64's dense form."""
    torch.manual_seed(4)
    masks = {name: torch.rand(getattr(TwoLayers(conv1d=conv1d), name).weight.shape) < 0.2 for name in NAMES}
    return {"first": Support.from_mask(masks["first"]), "second.weight": masks["second"]}, masks


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("config_class", [SparseConfig, SLTrainConfig])
def test_given_positions_train_and_no_others(conv1d, config_class, tmp_path):
    supports, masks = given(conv1d)
    base = TwoLayers(conv1d=conv1d)
    flat = {"first": masks["first"].flatten().nonzero().squeeze(1).flip(0), "second": supports["second.weight"]}
    assert flat["first"][0] > flat["first"][-1]
    for source in (supports, flat):
        config = select_support(base, config_class(selection="given"), supports=source)
        assert sorted(config.target_modules) == NAMES
        model = get_peft_model(copy.deepcopy(base), config)
        for name, layer in layers_of(model).items():
            assert torch.equal(layer.support("default").indices.long(), masks[name].flatten().nonzero().squeeze(1))
        assert config.num_entries == {name: int(mask.sum()) for name, mask in masks.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss_fn(model, torch.randn(4, 17)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in layers_of(model).items():
        moved = layer.get_delta_weight("default")
        if config_class is SLTrainConfig:
            moved = moved - layer.low_rank_weight("default")
        assert not bool(moved[~masks[name]].any()) and bool(moved[masks[name]].all())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(torch.ones(2, 17)), model(torch.ones(2, 17)))
    assert again.peft_config["default"].selection == "given"


def test_positions_of_one_adapter_are_given_to_another(tmp_path):
    base = TwoLayers()
    model = get_peft_model(copy.deepcopy(base), SparseConfig(density=0.1, seed=3, target_modules=NAMES))
    model.save_pretrained(tmp_path)
    supports = supports_of(read_stored(tmp_path))
    second = get_peft_model(base, select_support(base, SparseConfig(selection="given"), supports=supports))
    for name, layer in layers_of(second).items():
        assert torch.equal(layer.support("default").indices, layers_of(model)[name].support("default").indices)


def test_given_positions_of_convolutions_have_the_weights_shape():
    layer = torch.nn.Conv1d(4, 6, 3)
    mask = torch.rand(layer.weight.shape) < 0.3
    net = torch.nn.Sequential(layer)
    model = get_peft_model(net, select_support(net, SparseConfig(selection="given"), supports={"0": mask}))
    model.base_model.model[0].deltas["default"].values.data.fill_(1.0)
    assert torch.equal(model.base_model.model[0].get_delta_weight("default") != 0, mask)


def test_given_positions_can_leave_a_layer_alone():
    config = SparseConfig(selection="given", target_modules=NAMES)
    supports = {"first": torch.tensor([5]), "second": torch.tensor([], dtype=torch.int64)}
    model = get_peft_model(TwoLayers(), select_support(TwoLayers(), config, supports=supports))
    assert model.peft_config["default"].num_entries == {"first": 1, "second": 0}


def test_given_positions_without_a_dense_weight():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SLTrainConfig(mode="pretrain", r=2, selection="given", target_modules=["q_proj"])
    net = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    mask = torch.rand(16, 16) < 0.2
    chosen = select_support(net, config, supports={"model.layers.0.self_attn.q_proj": mask})
    model = build_for_pretraining(net.config, chosen)
    (layer,) = (m for m in model.modules() if isinstance(m, TunerLayer))
    assert torch.equal(layer.support("default").indices.long(), mask.flatten().nonzero().squeeze(1))


def test_given_positions_are_planned(world):
    net = LlamaForCausalLM.from_pretrained(world / "base")
    name = "model.layers.0.self_attn.q_proj"
    supports = {name: torch.arange(7)}
    config = select_support(net, SparseConfig(selection="given", target_modules=[name]), supports=supports)
    plan = plan_training(read_model_config(world / "base"), config, PlanOptions(flops=1e12))
    assert plan.needs[0].trained == 7
    with pytest.raises(ValueError, match="selection='given' takes positions from you"):
        plan_training(read_model_config(world / "base"), SparseConfig(selection="given"), PlanOptions(flops=1e12))


@pytest.mark.parametrize(
    "fields, supports, message",
    [
        ({}, {"first": torch.tensor([0])}, "supports are for other layers.*missing \\['second'\\]"),
        ({}, {"first": torch.tensor([0]), "second": torch.tensor([165])}, "layer second.*165.*0 to 164"),
        ({}, {"first": torch.tensor([3, 3]), "second": torch.tensor([1])}, "layer first.*3 occurs twice"),
        (
            {},
            {"first": torch.ones(17, 33).bool(), "second": torch.tensor([1])},
            r"layer first.*\(17, 33\)",
        ),
        ({}, {"first": Support((3, 3), torch.tensor([1])), "second": torch.tensor([1])}, r"layer first.*\(3, 3\)"),
        ({}, {"first": torch.ones(4), "second": torch.tensor([1])}, "layer first.*float32"),
        ({}, {name: torch.tensor([], dtype=torch.int64) for name in NAMES}, "finds no entry in any layer"),
        ({"density": 0.1}, {}, "selection='given' and density are both given"),
        ({"density_pattern": {"first": 0.1}}, {}, "selection='given' and density_pattern are both given"),
        ({"granularity": "block"}, {}, "granularity='block' with selection='given'"),
    ],
)
def test_bad_given_positions_are_refused(fields, supports, message):
    with pytest.raises((TypeError, ValueError), match=message):
        config = SparseConfig(selection="given", target_modules=NAMES, **fields)
        get_peft_model(TwoLayers(), select_support(TwoLayers(), config, supports=supports))


def test_given_positions_that_are_missing_or_not_asked_for():
    with pytest.raises(ValueError, match=r"selection='given' takes positions from you.*supports="):
        get_peft_model(TwoLayers(), SparseConfig(selection="given", target_modules=["first"]))
    config = SparseConfig(selection="given", target_modules=["first"], num_entries={"first": 3})  # as in a file
    with pytest.raises(ValueError, match="layer first: selection='given' takes positions from you"):
        get_peft_model(TwoLayers(), config)(torch.ones(1, 17))
    with pytest.raises(ValueError, match="selection='given': select_support needs supports, and one source only"):
        select_support(TwoLayers(), SparseConfig(selection="given", target_modules=NAMES), [1])
    with pytest.raises(ValueError, match=r"needs data or gradients.*are supports"):
        select_support(TwoLayers(), SparseConfig(selection="fisher", target_modules=NAMES), supports={})
    with pytest.raises(ValueError, match="positions of your own with selection='given'"):
        select_support(TwoLayers(), SparseConfig(target_modules=NAMES), supports={})
