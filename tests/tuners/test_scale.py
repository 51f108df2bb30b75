"""The scale that ``"auto"`` stands for: the rule of docs/learning_rate.md, its norms, and each method's scale."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sparse_peft import S2FTConfig, SaRAConfig, SLTrainConfig, SoRAConfig, SparseConfig, select_support
from sparse_peft.support import CRITERIA, REGROWTHS, Support, get_criterion
from sparse_peft.tuners.scale import delta_norm, lora_norm, matched_scale

WIDTH = 384
SHAPES = [(96, 64), (200, 96), (33, 200)]


class Three(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.Linear(cols, rows) for rows, cols in SHAPES))


def documented(entries, spread, shapes=SHAPES):
    """The page's formulas, with its numbers."""
    weights = sum(rows * cols for rows, cols in shapes)
    density, width = entries / weights, math.sqrt(weights / len(shapes))
    exact = {
        "flat": 1.155 / math.sqrt(density),
        "channels": 4.619 / (1 + math.sqrt(density)),
        "peaked": 4.619 / math.sqrt(density * width),
    }[spread]
    return min(64.0, 2.0 ** round(math.log2(exact)))


def norm(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2))


# ---------------------------------------------------------------------------------------------------- norms


def lora_update(gradient):
    """One step of AdamW with rate 1 on a new LoRA (r=16, alpha=32), as a change of the weight."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), LoraConfig(r=16, lora_alpha=32, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.0)
    (model(torch.eye(WIDTH)).t() * gradient).sum().backward()
    optimizer.step()
    return layer.get_delta_weight("default").detach()


def sparse_update(config, gradient):
    """The same of a new sparse delta of scale 1."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    config.target_modules, config.scale = ["0"], 1.0
    if config.selection_needs == "gradient":
        config = select_support(base, config, gradients={"0": gradient})
    model = get_peft_model(base, config)
    layer = model.base_model.model[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.0)
    (model(torch.eye(WIDTH)).t() * gradient).sum().backward()
    optimizer.step()
    return layer.get_delta_weight("default").detach()


def noise():
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))


def one_direction():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(WIDTH, 1, generator=generator) @ torch.randn(1, WIDTH, generator=generator)


def test_lora_lies_between_the_two_extremes():
    low, high = norm(lora_update(noise())), norm(lora_update(one_direction()))
    assert high == pytest.approx(lora_norm(WIDTH, "peaked"), rel=0.1)
    assert math.sqrt(low * high) == pytest.approx(lora_norm(WIDTH, "flat"), rel=0.25)
    assert low < lora_norm(WIDTH, "flat") < high


@pytest.mark.parametrize("density", [0.01, 0.05])
def test_scattered_entries_and_channels_of_independent_signs(density):
    entries = int(density * WIDTH**2)
    update = sparse_update(SparseConfig(num_params=entries), noise())
    assert norm(update) == pytest.approx(delta_norm(WIDTH, entries, "flat"), rel=0.25)
    count = int(density * WIDTH)
    update = sparse_update(S2FTConfig(k=count), noise())
    assert norm(update) == pytest.approx(delta_norm(WIDTH, count * WIDTH, "channels"), rel=0.1)


def test_entries_chosen_by_a_gradient_of_one_direction_come_close_to_the_most():
    entries = int(0.01 * WIDTH**2)
    update = sparse_update(SparseConfig(num_params=entries, selection="gradient"), one_direction())
    most = delta_norm(WIDTH, entries, "peaked")
    assert 0.6 * most < norm(update) <= most * 1.001
    scattered = sparse_update(SparseConfig(num_params=entries), one_direction())
    assert norm(scattered) < 0.4 * most


# ---------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("spread", ["flat", "channels", "peaked"])
@pytest.mark.parametrize("density", [1e-6, 1e-3, 5e-3, 0.01, 0.03, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shapes", [SHAPES, [(4096, 4096)], [(1024, 4096), (14336, 4096)]], ids=str)
def test_the_rule_is_the_documented_one(spread, density, shapes):
    entries = max(1, int(density * sum(math.prod(shape) for shape in shapes)))
    scale = matched_scale(entries, shapes, spread)
    assert scale == documented(entries, spread, shapes)
    assert math.log2(scale) == int(math.log2(scale))


def test_nothing_that_trains_has_scale_1():
    assert matched_scale(0, SHAPES, "flat") == 1.0


SPREADS = {
    **{name: "flat" if get_criterion(name).needs in ("none", "weight") else "peaked" for name in CRITERIA},
    **{name: "flat" if regrowth.observes == "nothing" else "peaked" for name, regrowth in REGROWTHS.items()},
}


@pytest.mark.parametrize("selection", SPREADS)
def test_every_selection_has_the_documented_scale(selection):
    base, fields = Three(), {"threshold": {"threshold": 0.01}, "given": {}}.get(selection, {"r": 4})
    config = SparseConfig(selection=selection, target_modules=["0", "1", "2"], **fields)
    if selection == "given":
        supports = {f"{n}": Support.random(shape, 99, seed=n, name="") for n, shape in enumerate(SHAPES)}
        config = select_support(base, SparseConfig(selection="given"), supports=supports)
    elif config.selection_needs in ("gradient", "activation"):
        config = select_support(base, config, [torch.randn(8, 64)], loss_fn=lambda net, x: net(x).square().mean())
    model = get_peft_model(base, config)
    entries = sum(config.num_entries.values())
    assert entries == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert config.scale == documented(entries, SPREADS[selection])
    assert config.recommended_rate == 2e-4


METHODS = {
    "sara": (SaRAConfig(density=0.05), "flat"),
    "block": (SparseConfig(density=0.1, granularity="block", block_size=4), "flat"),
    "s2ft random": (S2FTConfig(ratio=0.1), "channels"),
    "s2ft weight": (S2FTConfig(ratio=0.1, selection="weight"), "channels"),
    "sltrain": (SLTrainConfig(r=2, density=0.05), "flat"),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_documented_scale(name):
    config, spread = METHODS[name]
    config = copy.copy(config)
    config.target_modules = ["0", "1", "2"]
    model = get_peft_model(Three(), config)
    states = [layer.deltas["default"] for layer in model.base_model.model]
    entries = sum(state.values.numel() for state in states)
    assert config.scale == documented(entries, spread)
    assert all(state.value_scale == config.scale for state in states)


def test_channels_chosen_by_gradients_are_peaked():
    config = S2FTConfig(ratio=0.1, selection="gradient", target_modules=["0", "1", "2"])
    gradients = {str(i): torch.randn(shape) for i, shape in enumerate(SHAPES)}
    config = select_support(Three(), config, gradients=gradients)
    model = get_peft_model(Three(), config)
    assert config.scale == documented(sum(p.numel() for p in model.parameters() if p.requires_grad), "peaked")
    assert S2FTConfig(selection="gradient", largest=False).spread == "channels"


def test_pretraining_has_no_scale_and_no_recommendation():
    config = SLTrainConfig(mode="pretrain", r=2, target_modules=["0", "1", "2"])
    get_peft_model(Three(), config)
    assert config.scale == 1.0 and config.recommended_rate is None


@pytest.mark.parametrize("r, alpha", [(16, 32), (8, 16), (8, 8)])
def test_low_rank_has_the_rate_of_lora_with_the_same_factor(r, alpha):
    config = SoRAConfig(r=r, alpha=alpha, target_modules=["0", "1", "2"])
    get_peft_model(Three(), config)
    assert config.recommended_rate == pytest.approx(2e-4 * 2 / (alpha / r))
