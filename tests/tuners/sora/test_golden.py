"""SoRA against the authors' LowRankLinear and SparseAdamW."""

import pytest
import torch

from sparse_peft import SoRAConfig, SparsityController
from tests.helpers.golden import LAYERS, Toy, adapted, agree, agree_all, backward, parameter, read, train, under

TOLERANCE = 1e-4
NUMBERS = read("sora")
CASES = {
    "constant": {"penalty": 2e-2, "l1_weight": 0.0},
    "constant_l1": {"penalty": 2e-2, "l1_weight": 10.0},
    "rate": {"prox": "lr", "penalty": 3.0, "l1_weight": 0.0},
}


def start(folder, B=None, **fields):
    config = SoRAConfig.paper(**{"r": 6, "alpha": 12, "target_modules": list(LAYERS), **fields})
    tensors = {layer: under(NUMBERS, "init", layer) for layer in LAYERS}
    for layer, given in (B or {}).items():
        tensors[layer]["B"] = given
    return adapted(lambda: Toy(under(NUMBERS, "base")), config, tensors, folder)


def test_forward_and_gradients(tmp_path):
    model = start(tmp_path, {layer: NUMBERS[f"probe.{layer}.B"] for layer in LAYERS})
    agree("output", backward(model, NUMBERS["probe.x"], NUMBERS["probe.y"]), NUMBERS["probe.output"], TOLERANCE)
    for layer in LAYERS:
        for name in ("A", "B", "gate"):
            theirs = NUMBERS[f"probe.{layer}.{name}.grad"]
            agree(f"gradient of {layer}.{name}", parameter(model, layer, name).grad, theirs, TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_20_steps(case, tmp_path):
    model = start(tmp_path, **CASES[case])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # the reference's epsilon comes before the bias correction, ours after it: too small to matter
    optimizer = torch.optim.AdamW(trained, eps=1e-12, weight_decay=0.1)
    controller = SparsityController(model, optimizer, total_steps=20)
    numbers = {**under(NUMBERS, case), "inputs": NUMBERS["inputs"], "targets": NUMBERS["targets"]}

    def set_rate(step):
        optimizer.param_groups[0]["lr"] = NUMBERS["rates"][step - 1].item()

    def ours(layer, name):
        name, _, moment = name.partition(".")
        found = parameter(model, layer, name)
        return optimizer.state[found][moment] if moment else found

    compared, ranks = 0, []
    for step in train(model, numbers, optimizer, TOLERANCE, controller, set_rate):
        compared += agree_all(numbers, f"step{step:02}", ours, TOLERANCE)
        ranks.append([int((parameter(model, layer, "gate") != 0).sum()) for layer in LAYERS])
    assert compared == 4 * 6 + 2 * 4
    agree("ranks", torch.tensor(ranks), numbers["ranks"], 0)
