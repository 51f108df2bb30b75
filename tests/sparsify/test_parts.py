"""The damage of parts pruned alone, and the densities that follow from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_peft.sparsify import Sensitivity, masks_of, prune, sensitivity
from sparse_peft.sparsify.parts import skipped
from tests.sparsify.models import batches, gpt2, linear_layers, llama


def zero_counter(model):
    return sum(int((module.weight == 0).sum()) for module in linear_layers(model).values())


@pytest.mark.parametrize("by", ["layer", "kind", "width"])
def test_each_part_is_pruned_alone(by):
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = sensitivity(model, zero_counter, by, higher_is_better=False, progress=False)
    sizes = {name: module.weight.numel() for name, module in linear_layers(model).items()}
    if by == "kind":
        kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        sizes = {kind: sum(size for name, size in sizes.items() if name.endswith(kind)) for kind in kinds}
    assert found.sizes == sizes and found.dense == 0
    share = 0.25 if by == "width" else 0.5
    assert found.damage == pytest.approx({part: share * size for part, size in sizes.items()})
    assert list(found.damage.values()) == sorted(found.damage.values(), reverse=True)
    assert masks_of(model) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_names_that_are_suffixes_of_others_are_parts_of_their_own():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleDict({"a": nn.Linear(8, 8)})})
    found = sensitivity(model, zero_counter, higher_is_better=False, progress=False)
    assert found.damage == {"b.a": 32, "a": 8}


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_a_skipped_block_passes_its_input_on(make):
    model, batch = make(), batches(1)[0]
    blocks, seen = model.model.layers if hasattr(model, "model") else model.transformer.h, []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch)
    with skipped(blocks[0]):
        model(**batch)
    model(**batch)
    first, second, _, passed_on, _, again = seen
    assert torch.equal(passed_on, first) and torch.equal(again, second) and not torch.equal(first, second)
    found = sensitivity(model, lambda m: float(m(**batch).logits.double().sum()), "depth", progress=False)
    assert len(found.metrics) == 2 and len(set(found.metrics.values()) | {found.dense}) == 3


def test_densities_have_the_asked_mean_and_favour_what_hurts():
    sizes = {"a": 1000, "b": 1000, "c": 4000}
    found = Sensitivity("layer", 0.0, {"a": -1.0, "b": -3.0, "c": -2.0}, sizes, True)
    densities = found.densities(0.3)
    zeros = {name: (1 - densities[name]) * size for name, size in sizes.items()}
    assert sum(zeros.values()) == pytest.approx(0.3 * 6000)
    # no bound is reached: shares of zeros are in proportion to size / damage
    shares = {name: zeros[name] / sizes[name] * damage / sizes[name] for name, damage in found.damage.items()}
    assert max(shares.values()) == pytest.approx(min(shares.values()), rel=0.01)
    assert min(found.densities(0.6).values()) >= 0.2 - 1e-9
    same = Sensitivity("layer", 0.0, {"a": -1.0, "b": -1.0, "c": -4.0}, sizes, True).densities(0.5)
    assert same == pytest.approx(dict.fromkeys(sizes, 0.5), abs=1e-3)
    gains = Sensitivity("layer", 0.0, {"a": 1.0, "b": -1.0, "c": 0.0}, sizes, True).densities(0.5)
    assert gains["b"] > 0.9 and min(gains.values()) >= 0.25 - 1e-9


def test_densities_shape_a_pruning_of_the_same_total():
    model = llama()
    data = batches(1, labels=True)[0]
    found = sensitivity(model, lambda m: float(m(**data).loss), higher_is_better=False, progress=False)
    densities = found.densities(0.5)
    masks = prune(model, 0.5, allocation=densities, progress=False)
    assert masks.kept == round(0.5 * sum(found.sizes.values())) and masks.about["allocation"] == "given"
    assert {name: mask.density for name, mask in masks.layers.items()} == pytest.approx(densities, abs=5e-3)
    with pytest.raises(
        ValueError, match=r"allocation: no density of layer model\.layers\.0\..*, and one of 'x', which"
    ):
        prune(llama(), 0.5, allocation={"x": 0.5}, progress=False)


def test_requests_that_make_no_sense():
    with pytest.raises(ValueError, match=r"by='rows'.*one of 'layer'"):
        sensitivity(llama(), zero_counter, "rows")
    with pytest.raises(ValueError, match=r"pattern=0\.5: by='depth' skips whole blocks"):
        sensitivity(llama(), zero_counter, "depth", 0.5)
    with pytest.raises(ValueError, match="by='depth': no layer of Sequential"):
        sensitivity(nn.Sequential(nn.Linear(4, 4)), zero_counter, "depth")
    with pytest.raises(ValueError, match="by='kind': densities are of single layers"):
        Sensitivity("kind", 0.0, {"a": 1.0}, {"a": 4}, True).densities(0.5)
