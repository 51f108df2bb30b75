"""Experts' weights through threads and interruptions: never half written, and the base's own when they have to be."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from peft import get_peft_model

import sparse_peft
from tests.helpers.expert_models import Holder, config, layers
from tests.helpers.interrupts import first_of_each, interrupted, lines_of
from tests.helpers.threads import together

# The files with the code of experts.
FILES = ("expert_layer", "expert_mode", "expert_sources", "expert_weights")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.rand(6, 3, generator=torch.Generator().manual_seed(1))


def made(dtype=torch.float32):
    """``(model with the adapters default and other, its base's tensors)``."""
    torch.manual_seed(0)
    base = Holder().to(dtype)
    before = {name: tensor.clone() for name, tensor in base.named_parameters()}
    settings = {"task_type": None, "density": 0.3}
    model = get_peft_model(base, config(**settings))
    model.add_adapter("other", config(seed=7, **settings))
    return model.eval(), before


@torch.no_grad()
def output(model):
    return model.base_model.model(X, WEIGHTS)


def is_base(model, before):
    with sparse_peft.base_weights(model):
        return all(torch.equal(layer.base_parameter, before[name]) for name, layer in layers(model).items())


@torch.no_grad()
def dense_output(model, before):
    """In float64, with the adapters that each parameter has merged or, unless disabled, active."""
    dense = Holder().double()
    for name, layer in layers(model).items():
        names = layer.merged_adapters or ([] if layer.disable_adapters else layer.active_adapters)
        delta = sum(layer.get_delta_weight(adapter).double() for adapter in names)
        dense.get_parameter(name).copy_(before[name].double() + delta)
    return dense(X.double(), WEIGHTS.double())


def train_once(model, lr=0.1):
    values = [p for p in model.parameters() if p.requires_grad]
    x = X.clone().requires_grad_()
    model.train()(x, WEIGHTS).sum().backward()
    torch.optim.SGD(values, lr=lr).step()
    model.eval()


def everything(model):
    """All that the layer of experts does in a model's life."""
    train_once(model)
    output(model)
    model.set_adapter("other")
    with model.disable_adapter():
        output(model)
        model(X.clone().requires_grad_(), WEIGHTS).sum().backward()
    model(X, WEIGHTS, adapter_names=["default", "other", "__base__"] * 2)
    model.merge_adapter(["default"])
    output(model)
    model.to(torch.float64).to(torch.float32)
    model.unmerge_adapter()
    model.state_dict()
    copy.deepcopy(model)


@pytest.fixture(scope="module")
def elsewhere():
    """Runs something in another thread, which has twenty seconds for it."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda act: pool.submit(act).result(20)


def check_mended(template, before, number, elsewhere):
    model = copy.deepcopy(template)
    interrupted(lambda: everything(model), number)
    model.to(torch.float32).eval()
    y = elsewhere(lambda: output(model))  # another thread is neither kept out nor given something else
    assert torch.equal(output(model), y)
    torch.testing.assert_close(y.double(), dense_output(model, before), rtol=1e-4, atol=1e-4)
    if any(layer.merged for layer in layers(model).values()):
        model.unmerge_adapter()
    assert is_base(model, before)


def check_each(choose, elsewhere):
    template, before = made()
    twin = copy.deepcopy(template)
    numbers = choose(lines_of(lambda: everything(twin)))
    assert len(numbers) > 5
    for number in numbers:
        check_mended(template, before, number, elsewhere)


def test_an_interruption_at_some_lines_of_experts_is_mended(elsewhere):
    check_each(lambda lines: first_of_each(lines, FILES)[::20], elsewhere)


def test_an_interruption_between_pieces_of_experts_is_mended(elsewhere, monkeypatch):
    monkeypatch.setattr("sparse_peft.ops.held_entries.FEW_ENTRIES", 0)
    monkeypatch.setattr("sparse_peft.support.support.PIECE_ENTRIES", 5)

    def within(lines):
        return [number for number, (file, _) in enumerate(lines) if file.endswith("held_entries.py")][::11]

    check_each(within, elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_an_interruption_at_any_line_of_experts_is_mended(part, elsewhere):
    def of_files(lines):
        return [number for number, (file, _) in enumerate(lines) if any(f"{name}.py" in file for name in FILES)]

    check_each(lambda lines: of_files(lines)[part::4], elsewhere)


def test_training_in_one_thread_leaves_inference_in_others_alone():
    """The values stay the same in training, so that each pass has one right output, while weights are written."""
    model, before = made(torch.bfloat16)
    model, before = model.float(), {name: tensor.float() for name, tensor in before.items()}
    other, _ = made()
    expected, wanted, done = output(copy.deepcopy(model)), output(copy.deepcopy(other)), threading.Event()

    def train():
        try:
            for _ in range(6):
                values = [p for p in model.parameters() if p.requires_grad]
                model(X.clone().requires_grad_(), WEIGHTS).sum().backward()
                torch.optim.SGD(values, lr=0.0).step()
        finally:
            done.set()

    def infer(served):
        found = [output(served)]
        while not done.is_set():
            found.append(output(served))
        return found

    _, first, second = together(train, lambda: infer(model), lambda: infer(other))
    assert all(torch.equal(y, expected) for y in first)
    assert all(torch.equal(y, wanted) for y in second)
    assert is_base(model, before)


def test_two_models_trained_at_once_train_as_if_alone():
    def train(model):
        for _ in range(4):
            train_once(model)
            model.zero_grad()
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    models = [made() for _ in range(2)]
    alone = train(copy.deepcopy(models[0][0]))
    for found in together(*[lambda model=model: train(model) for model, _ in models]):
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert all(is_base(*pair) for pair in models)


def test_no_pass_sees_half_a_weight():
    """Each parameter is in one of its states in a pass; parameters switch one after the other, as layers do."""
    model, before = made()
    states, done, expected = copy.deepcopy(model), threading.Event(), []
    up, down = layers(states).values()
    for names in product((["default"], ["other"], []), repeat=2):
        up.set_adapter(names[0])
        down.set_adapter(names[1])
        expected.append(output(states))

    def infer():
        return [output(model) for _ in range(30)]

    def guarded():
        try:
            return infer()
        finally:
            done.set()

    def change():
        while not done.is_set():
            model.set_adapter("other")
            with model.disable_adapter():
                time.sleep(1e-4)
            model.set_adapter("default")

    first, second, _ = together(guarded, infer, change)
    assert all(any(torch.equal(y, one) for one in expected) for y in [*first, *second])
    assert is_base(model, before)
