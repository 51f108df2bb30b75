"""SLTrain against the authors' SpLoRaModel, in place of the weights."""

import pytest
import torch

from sparse_peft import SLTrainConfig
from tests.helpers.golden import LAYERS, Toy, adapted, agree, agree_all, backward, parameter, read, train, under

TOLERANCE = 1e-4
NUMBERS = read("sltrain")
NAMES = {"scale": "theta"}  # theirs: ours


def start(folder, case, backend, B=None):
    config = SLTrainConfig(
        mode="pretrain",
        r=4,
        alpha=8,
        density=0.1,
        trainable_scale=case == "trainable_scale",
        backend=backend,
        target_modules=list(LAYERS),
    )
    tensors = {}
    for layer in LAYERS:
        given = under(NUMBERS, case, "init", layer) | ({} if B is None else {"B": B[layer]})
        tensors[layer] = {NAMES.get(name, name): tensor for name, tensor in given.items()}
    weights = {"fc1.weight": torch.zeros(32, 20), "fc2.weight": torch.zeros(20, 32)}  # which are dropped
    return adapted(lambda: Toy(weights), config, tensors, folder)


@pytest.mark.parametrize("backend", ["composed", "factored"])
@pytest.mark.parametrize("case", ["fixed", "trainable_scale"])
class TestSLTrain:
    def test_forward_and_gradients(self, case, backend, tmp_path):
        model = start(tmp_path, case, backend, {layer: NUMBERS[f"{case}.probe.{layer}.B"] for layer in LAYERS})
        output = backward(model, NUMBERS["probe.x"], NUMBERS["probe.y"])
        agree("output", output, NUMBERS[f"{case}.probe.output"], TOLERANCE)

        gradients = {name: t for name, t in under(NUMBERS, case, "probe").items() if name.endswith(".grad")}
        for name, theirs in gradients.items():
            layer, name, _ = name.split(".")
            agree(
                f"gradient of {layer}.{name}", parameter(model, layer, NAMES.get(name, name)).grad, theirs, TOLERANCE
            )
        assert len(gradients) == (6 if case == "fixed" else 8)

    def test_20_steps(self, case, backend, tmp_path):
        model = start(tmp_path, case, backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
        numbers = {**under(NUMBERS, case), "inputs": NUMBERS["inputs"], "targets": NUMBERS["targets"]}

        def ours(layer, name):
            return parameter(model, layer, NAMES.get(name, name))

        steps = train(model, numbers, optimizer, TOLERANCE)
        compared = sum(agree_all(numbers, f"step{step:02}", ours, TOLERANCE) for step in steps)
        assert compared == 4 * (6 if case == "fixed" else 8)
        with torch.no_grad():
            agree("output after training", model(NUMBERS["probe.x"]), numbers["final.output"], TOLERANCE)
