"""Selection from data, from the config to the trained positions, against dense autograd."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from sparse_peft import SparseConfig, select_support
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
