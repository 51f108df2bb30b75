"""Monarch against MoRe's product of block-diagonal factors and fly's projection."""

import torch

from sparse_peft import MonarchConfig, monarch_project
from tests.helpers.golden import LAYERS, Toy, adapted, agree, agree_all, backward, parameter, read, train, under

TOLERANCE = 1e-4
NUMBERS = read("monarch")
NAMES = ("A", "B")


def start(folder, case):
    tensors = {
        layer: {name: NUMBERS[key] for name in NAMES if (key := f"{case}.{layer}.{name}") in NUMBERS}
        for layer in LAYERS
    }
    config = MonarchConfig(nblocks=4, blk_r=4, target_modules=list(LAYERS))
    return adapted(lambda: Toy(under(NUMBERS, "base")), config, tensors, folder)


def test_forward_and_gradients(tmp_path):
    model = start(tmp_path, "probe")
    agree("output", backward(model, NUMBERS["probe.x"], NUMBERS["probe.y"]), NUMBERS["probe.output"], TOLERANCE)
    for layer in LAYERS:
        for name in NAMES:
            theirs = NUMBERS[f"probe.{layer}.{name}.grad"]
            agree(f"gradient of {layer}.{name}", parameter(model, layer, name).grad, theirs, TOLERANCE)


def test_20_steps(tmp_path):
    model = start(tmp_path, "init")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    steps = train(model, NUMBERS, optimizer, TOLERANCE)
    compared = [
        agree_all(NUMBERS, f"step{step:02}", lambda layer, name: parameter(model, layer, name), TOLERANCE)
        for step in steps
    ]
    assert sum(compared) == 4 * 4


def test_projection():
    made = monarch_project(NUMBERS["projection.matrix"], nblocks=4, blk_r=4).to_dense()
    agree("projection", made, NUMBERS["projection.dense"], TOLERANCE)
