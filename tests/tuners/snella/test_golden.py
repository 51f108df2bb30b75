"""SNELL and SNELLA against the authors' classes of these names: kernel, threshold, survivors."""

import pytest
import torch

from sparse_peft import SnellaConfig, SparsityController
from tests.helpers.golden import LAYERS, Toy, adapted, agree, agree_all, backward, parameter, read, train, under

TOLERANCE = 1e-3
NUMBERS = {method: read(method) for method in ("snell", "snella")}
KERNELS = {"snell": "distance", "snella": "mixed"}
MIX = ("alpha", "gamma", "beta")  # of one parameter here, which has gamma's logarithm
CASES = [(method, sparsity) for method in NUMBERS for sparsity in (0.25, 0.5, 0.875)]


def start(folder, method, **fields):
    numbers = NUMBERS[method]
    config = SnellaConfig.paper(
        **{"kernel": KERNELS[method], "r": 4, "dropout": 0, "target_modules": list(LAYERS), **fields}
    )
    tensors = {}
    for layer in LAYERS:
        given = under(numbers, "init", layer)
        tensors[layer] = {name: given[name] for name in ("A", "B")}
        if method == "snella":
            tensors[layer]["mix"] = torch.cat([given["alpha"], given["gamma"].log(), given["beta"]])
    return adapted(lambda: Toy(under(numbers, "base")), config, tensors, folder)


def dense(model, layer):
    return model.get_base_model().get_submodule(layer).get_delta_weight("default")


def survivors(model, layer):
    return dense(model, layer).flatten().nonzero().squeeze(1)


def value_of(tensor, name):
    """One of the trained numbers, or of their gradients, under the authors' name."""
    return tensor[MIX.index(name)] if name in MIX else tensor


@pytest.mark.parametrize("method", NUMBERS)
def test_kernel(method, tmp_path):
    # without a threshold the delta is the kernel itself
    model = start(tmp_path, method, threshold="hard_ste", sparsity=0.0)
    for layer in LAYERS:
        agree(f"kernel of {layer}", dense(model, layer), NUMBERS[method][f"init.{layer}.kernel"], TOLERANCE)


@pytest.mark.parametrize("method, sparsity", CASES)
def test_delta_forward_and_gradients(method, sparsity, tmp_path):
    model = start(tmp_path, method, sparsity=sparsity)
    numbers = under(NUMBERS[method], f"s{sparsity}")
    ours = {"survivors": survivors, "delta": dense}
    assert agree_all(numbers, "init", lambda layer, name: ours[name](model, layer), TOLERANCE) == 4
    output = backward(model, NUMBERS[method]["probe.x"], NUMBERS[method]["probe.y"])
    agree("output", output, numbers["probe.output"], TOLERANCE)

    for layer in LAYERS:
        gradients = under(numbers, "probe", layer)
        assert len(gradients) == (2 if method == "snell" else 5)
        for name, theirs in gradients.items():
            name = name.removesuffix(".grad")
            found = parameter(model, layer, "mix" if name in MIX else name)
            # gamma is 1, where the gradient of its logarithm is its own
            agree(f"gradient of {layer}.{name}", value_of(found.grad, name), theirs, TOLERANCE)


@pytest.mark.parametrize("method, sparsity", CASES)
def test_20_steps(method, sparsity, tmp_path):
    model = start(tmp_path, method, sparsity=sparsity)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.01)
    shared = {name: NUMBERS[method][name] for name in ("inputs", "targets")}
    numbers = {**under(NUMBERS[method], f"s{sparsity}"), **shared}

    def hold_gamma(step):
        for layer in LAYERS if method == "snella" else ():
            parameter(model, layer, "mix").grad[MIX.index("gamma")] = 0

    def ours(layer, name):
        if name == "survivors":
            return survivors(model, layer)
        return value_of(parameter(model, layer, "mix" if name in MIX else name), name)

    steps = train(model, numbers, optimizer, TOLERANCE, before_step=hold_gamma)
    compared = sum(agree_all(numbers, f"step{step:02}", ours, TOLERANCE) for step in steps)
    assert compared == 2 * (4 * (2 if method == "snell" else 4) + 1)


# ------------------------------------------------------------------ layers that compete


ALLOCATION = read("snella_allocation")


def test_allocation(tmp_path):
    config = SnellaConfig.paper(
        r=4,
        dropout=0,
        sparsity=0.05,
        target_sparsity=0.7,
        allocate_start=4,
        allocate_stop=16,
        allocate_every=4,
        target_modules=list(LAYERS),
    )
    model = adapted(lambda: Toy(under(ALLOCATION, "base")), config, {}, tmp_path)
    factors = {(layer, name): parameter(model, layer, name) for layer in LAYERS for name in ("A", "B")}
    optimizer = torch.optim.SGD(factors.values(), lr=0.0)
    controller = SparsityController(model, optimizer, total_steps=20)

    def ours(layer, name):
        factor, kind = name.split(".")
        return controller.state_dict()["adapters"]["default"]["layers"][layer][f"{kind}_{factor}"]

    compared = 0
    for step in range(1, 17):
        for (layer, name), factor in factors.items():
            fed = ALLOCATION[f"fed.{layer}.{name}"][step - 1], ALLOCATION[f"fed.{layer}.{name}.grad"][step - 1]
            factor.data.copy_(fed[0])
            factor.grad = fed[1].clone()
        optimizer.step()
        controller.step()
        compared += agree_all(ALLOCATION, f"step{step:02}", ours, 1e-4)
    assert compared == 5 * 8

    events = under(ALLOCATION, "events")
    agree("steps", torch.tensor([record.step for record in controller.history]), events["step"], 0)
    scores = torch.tensor([[record.layers[layer].score for layer in LAYERS] for record in controller.history])
    agree("scores", scores, events["score"], 1e-4)
    # they round the budget and the shares of it down; here both are rounded so that shares add up to the budget
    agree("shares", (scores * events["budget"][:, None]).int(), events["entries"], 0)
    for record, budget, entries in zip(controller.history, events["budget"], events["entries"], strict=True):
        found = [record.layers[layer].entries for layer in LAYERS]
        assert sum(found) == record.budget and record.budget - int(budget) in (0, 1)
        assert all(0 <= mine - theirs <= 2 for mine, theirs in zip(found, entries.tolist(), strict=True))
