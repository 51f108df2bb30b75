"""SpIEL-MA against the authors' SftSelector and SftSM3."""

import torch
from torch import Tensor

from sparse_peft import SM3, SparseConfig, SparsityController
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
NUMBERS = read("spiel_ma")
EVENTS = [3, 11, 19]


def start(folder, **values: Tensor):
    config = SparseConfig(
        scale=1.0, selection="momentum", reselect_every=8, accumulate=3, num_params=128, target_modules=list(LAYERS)
    )
    tensors = {layer: under(NUMBERS, "init", layer) for layer in LAYERS}
    for layer, given in values.items():
        tensors[layer]["values"] = given
    return adapted(lambda: Toy(under(NUMBERS, "base")), config, tensors, folder)


def test_forward_and_gradients(tmp_path):
    model = start(tmp_path, **{layer: NUMBERS[f"probe.{layer}.values"] for layer in LAYERS})
    agree("output", backward(model, NUMBERS["probe.x"], NUMBERS["probe.y"]), NUMBERS["probe.output"], TOLERANCE)
    for layer in LAYERS:
        agree(f"gradient of {layer}", parameter(model, layer).grad, NUMBERS[f"probe.{layer}.grad"], TOLERANCE)


def test_24_steps_with_three_reselections(tmp_path):
    model = start(tmp_path)
    trained = [parameter(model, layer) for layer in LAYERS]
    optimizer = SM3(trained, lr=3e-3, peft_model=model)
    controller = SparsityController(model, optimizer, total_steps=24)

    def ours(layer, name):
        if name == "positions":
            return positions(model, layer)
        values = parameter(model, layer)
        return values if name == "values" else optimizer.state[values][name]

    steps = train(model, NUMBERS, optimizer, TOLERANCE, controller)
    assert sum(agree_all(NUMBERS, f"step{step:02}", ours, TOLERANCE) for step in steps) == 9 * 8

    assert [record.step for record in controller.history] == EVENTS
    replaced = torch.zeros_like(NUMBERS["replaced"])
    for record in controller.history:
        replaced[record.step - 1] = torch.tensor([record.layers[layer].replaced for layer in LAYERS])
    agree("replaced entries", replaced, NUMBERS["replaced"], 0)
