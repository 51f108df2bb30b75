"""SketchTune against the authors' layers, in place of the weights."""

import pytest
import torch

from sparse_peft import SketchConfig
from tests.helpers.golden import LAYERS, Toy, adapted, agree, agree_all, backward, parameter, read, train, under

TOLERANCE = 1e-4
NUMBERS = read("sketch")
CASES = {"b4g1": (4, 1), "b4g2": (4, 2), "b3g2": (3, 2), "b2g4": (2, 4)}


def start(folder, case):
    bits, groups = CASES[case]
    config = SketchConfig(mode="replace", bits=bits, groups=groups, target_modules=list(LAYERS))
    return adapted(lambda: Toy(under(NUMBERS, case, "base")), config, {}, folder)


def decoded(tables, codes):
    """The weight that the authors' codes and tables stand for."""
    rows, groups, _ = tables.shape
    return tables.gather(2, codes.long().view(rows, groups, -1)).view_as(codes)


@pytest.mark.parametrize("case", CASES)
def test_tables_forward_and_gradients(case, tmp_path):
    model, numbers = start(tmp_path, case), under(NUMBERS, case)
    for layer in LAYERS:
        # every entry of the authors' tables is in use, so no other tables have these weights
        agree(f"tables of {layer}", parameter(model, layer, "codebook"), numbers[f"init.{layer}.tables"], 0)
    output = backward(model, NUMBERS["probe.x"], NUMBERS["probe.y"])
    agree("output", output, numbers["probe.output"], TOLERANCE)
    for layer in LAYERS:
        theirs = numbers[f"probe.{layer}.tables.grad"]
        agree(f"gradient of {layer}", parameter(model, layer, "codebook").grad, theirs, TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_20_steps_and_codes(case, tmp_path):
    model = start(tmp_path, case)
    tables = [parameter(model, layer, "codebook") for layer in LAYERS]
    optimizer = torch.optim.AdamW(tables, lr=1e-3, weight_decay=0)
    numbers = {**under(NUMBERS, case), "inputs": NUMBERS["inputs"], "targets": NUMBERS["targets"]}

    def ours(layer, name):
        return parameter(model, layer, "codebook")

    steps = train(model, numbers, optimizer, TOLERANCE)
    compared = sum(agree_all(numbers, f"step{step:02}", ours, TOLERANCE) for step in steps)
    assert compared == (4 if case.startswith("b4") else 8)

    dense = model.merge_and_unload()
    for layer in LAYERS:
        theirs = decoded(numbers[f"step20.{layer}.tables"], numbers[f"init.{layer}.codes"])
        agree(f"weight of {layer} after training", dense.get_submodule(layer).weight, theirs, TOLERANCE)
