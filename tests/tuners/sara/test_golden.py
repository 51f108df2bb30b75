"""SaRA against the authors' second AdamW (`optim/adamw2.py`), without and with its nuclear norm."""

import pytest
import torch

from sparse_peft import SaRAConfig, SparsityController
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

TOLERANCE = 1e-3  # the nuclear norm's gradient is a decomposition there, an iteration here
ONE_PASS = 1e-5
NUMBERS = read("sara")
BASE = {layer: NUMBERS[f"base.{layer}.weight"].flatten()[NUMBERS[f"positions.{layer}"].long()] for layer in LAYERS}


def start(folder, nuclear_weight=0.0, **values):
    config = SaRAConfig(
        threshold=1.2e-2, nuclear_weight=nuclear_weight, progressive=10, scale=1.0, target_modules=list(LAYERS)
    )
    tensors = {layer: {"values": given} for layer, given in values.items()}
    return adapted(lambda: Toy(under(NUMBERS, "base")), config, tensors, folder)


def test_positions(tmp_path):
    model = start(tmp_path)
    for layer in LAYERS:
        agree(f"positions of {layer}", positions(model, layer), NUMBERS[f"positions.{layer}"], 0)


def test_forward_and_gradients(tmp_path):
    model = start(tmp_path, **{layer: NUMBERS[f"probe.{layer}.weights"] - BASE[layer] for layer in LAYERS})
    agree("output", backward(model, NUMBERS["probe.x"], NUMBERS["probe.y"]), NUMBERS["probe.output"], ONE_PASS)
    for layer in LAYERS:
        agree(f"gradient of {layer}", parameter(model, layer).grad, NUMBERS[f"probe.{layer}.grad"], ONE_PASS)


@pytest.mark.parametrize("case", ["nuclear0", "nuclear5e-4", "nuclear5e-2"])
def test_20_steps_with_freezing(case, tmp_path):
    model = start(tmp_path, float(case.removeprefix("nuclear")))
    optimizer = torch.optim.AdamW([parameter(model, layer) for layer in LAYERS], lr=1e-3, weight_decay=0)
    controller = SparsityController(model, optimizer, total_steps=20)
    numbers = {**under(NUMBERS, case), "inputs": NUMBERS["inputs"], "targets": NUMBERS["targets"]}
    kept = {}

    def ours(layer, name):
        values = parameter(model, layer)
        return BASE[layer] + values if name == "weights" else optimizer.state[values][name]

    compared = 0
    for step in train(model, numbers, optimizer, TOLERANCE, controller):
        compared += agree_all(numbers, f"step{step:02}", ours, TOLERANCE)
        kept[step] = {layer: parameter(model, layer).detach().clone() for layer in LAYERS}
    assert compared == (18 if case == "nuclear0" else 10)

    (record,) = controller.history
    assert record.step == 10
    for layer in LAYERS:
        frozen = numbers[f"frozen.{layer}"]
        agree(f"frozen entries of {layer}", kept[10][layer] == kept[20][layer], frozen, 0)
        assert record.layers[layer].frozen == int(frozen.sum())
