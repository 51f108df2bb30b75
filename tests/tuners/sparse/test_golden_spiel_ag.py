"""SpIEL-AG against the authors' SftSelector and SftAdamW, as they are and with four things changed."""

import pytest
import torch

from sparse_peft import SparseAdamW, SparseConfig, SparsityController
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

TOLERANCE = 1e-3
NUMBERS = read("spiel_ag")
RUNS = ("modified", "unmodified")


def start(folder, run, values=False):
    config = SparseConfig(
        scale=1.0,
        selection="accumulated_gradient",
        reselect_every=8,
        accumulate=3,
        num_params=128,
        target_modules=list(LAYERS),
    )
    tensors = {layer: under(NUMBERS, run, "init", layer) for layer in LAYERS}
    if values:
        for layer in LAYERS:
            tensors[layer]["values"] = NUMBERS[f"{run}.probe.{layer}.values"]
    return adapted(lambda: Toy(under(NUMBERS, "base")), config, tensors, folder)


def numbers_of(run):
    """What the run trains on: the unmodified one has the first batch in every step."""
    numbers = {**under(NUMBERS, run), "inputs": NUMBERS["inputs"], "targets": NUMBERS["targets"]}
    if run == "unmodified":
        for name in ("inputs", "targets"):
            numbers[name] = numbers[name][:1].expand_as(numbers[name])
    return numbers


def trained(folder, run):
    model = start(folder, run)
    # the reference's epsilon comes before the bias correction, ours after it: too small to matter
    optimizer = SparseAdamW([parameter(model, layer) for layer in LAYERS], lr=3e-3, eps=1e-12)
    controller = SparsityController(model, optimizer, total_steps=24)

    def ours(layer, name):
        values = parameter(model, layer)
        if name in ("positions", "values"):
            return values if name == "values" else positions(model, layer)
        state = optimizer.state[values][name]
        # theirs is the age that the next step will have
        return (state + 1).expand(values.shape) if name == "age" else state

    numbers = numbers_of(run)
    return numbers, controller, ours, train(model, numbers, optimizer, TOLERANCE, controller)


@pytest.mark.parametrize("run", RUNS)
def test_forward_and_gradients(run, tmp_path):
    model = start(tmp_path, run, values=True)
    output = backward(model, NUMBERS["probe.x"], NUMBERS["probe.y"])
    agree("output", output, NUMBERS[f"{run}.probe.output"], TOLERANCE)
    for layer in LAYERS:
        agree(f"gradient of {layer}", parameter(model, layer).grad, NUMBERS[f"{run}.probe.{layer}.grad"], TOLERANCE)


def test_24_steps_with_three_reselections(tmp_path):
    numbers, controller, ours, steps = trained(tmp_path, "modified")
    assert sum(agree_all(numbers, f"step{step:02}", ours, TOLERANCE) for step in steps) == 9 * 10
    replaced = torch.zeros_like(numbers["replaced"])
    for record in controller.history:
        replaced[record.step - 1] = torch.tensor([record.layers[layer].replaced for layer in LAYERS])
    agree("replaced entries", replaced, numbers["replaced"], 0)


def test_the_first_reselection_of_the_unmodified_code(tmp_path):
    numbers, controller, ours, steps = trained(tmp_path, "unmodified")
    for step in (1, 2, 3):
        assert next(steps) == step
        # after the reselection their ages are one too few
        expected = {name: tensor for name, tensor in numbers.items() if not (step == 3 and name.endswith(".age"))}
        assert agree_all(expected, f"step{step:02}", ours, TOLERANCE) == (8 if step == 3 else 10)
    (record,) = controller.history
    assert [record.layers[layer].replaced for layer in LAYERS] == numbers["replaced"][2].tolist()
    for layer in LAYERS:  # with a window of 3 steps an entry's next step is its fourth
        assert ours(layer, "age").unique().tolist() == [4]
        assert numbers[f"step03.{layer}.age"].unique().tolist() == [3]
