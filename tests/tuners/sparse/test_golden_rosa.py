"""SLTrainConfig with positions from gradients against RoSA."""

import math

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import mse_loss

from sparse_peft import SLTrainConfig, select_support
from tests.helpers.golden import (
    LAYERS,
    Toy,
    adapted,
    agree,
    agree_all,
    backward,
    parameter,
    positions,
    read,
    train,
    under,
)

TOLERANCE = 1e-4
NUMBERS = read("rosa")
CALIBRATION = list(zip(NUMBERS["calibration.inputs"], NUMBERS["calibration.targets"], strict=True))


def toy():
    return Toy(under(NUMBERS, "base"))


def config(selection):
    return SLTrainConfig(r=4, alpha=8, density=0.05, selection=selection, scale=1.0, target_modules=list(LAYERS))


def loss_fn(model, batch):
    x, y = batch
    return mse_loss(model(x), y)


@pytest.mark.parametrize(
    "case, selection, batches",
    [("mean_squared1", "fisher", 1), ("mean_squared4", "fisher", 4), ("mean4", "gradient", 4)],
)
def test_masks(case, selection, batches):
    base = toy()
    chosen = select_support(base, config(selection), CALIBRATION[:batches], loss_fn=loss_fn, oversample=math.inf)
    model = get_peft_model(base, chosen)
    for layer in LAYERS:
        agree(f"positions of {layer}", positions(model, layer), NUMBERS[f"{case}.{layer}.positions"], 0)


def start(folder):
    chosen = select_support(toy(), config("fisher"), CALIBRATION, loss_fn=loss_fn, oversample=math.inf)
    return adapted(toy, chosen, {layer: under(NUMBERS, "init", layer) for layer in LAYERS}, folder)


def test_forward_and_gradients(tmp_path):
    model = start(tmp_path)
    agree("output", backward(model, NUMBERS["probe.x"], NUMBERS["probe.y"]), NUMBERS["probe.output"], TOLERANCE)
    for layer in LAYERS:
        for name in ("A", "B", "values"):
            theirs = NUMBERS[f"probe.{layer}.{name}.grad"]
            agree(f"gradient of {layer}.{name}", parameter(model, layer, name).grad, theirs, TOLERANCE)


def test_20_steps(tmp_path):
    model = start(tmp_path)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)

    def ours(layer, name):
        name, _, moment = name.partition(".")
        found = parameter(model, layer, name)
        return optimizer.state[found][moment] if moment else found

    steps = train(model, NUMBERS, optimizer, TOLERANCE)
    assert sum(agree_all(NUMBERS, f"step{step:02}", ours, TOLERANCE) for step in steps) == 4 * 6 + 12
