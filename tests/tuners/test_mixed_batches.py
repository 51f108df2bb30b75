"""A batch whose items use several sparse deltas: one sparse product a layer, each item as if it were alone."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_peft import SaRAConfig, SLTrainConfig, SparseConfig
from sparse_peft.tuners import delta_layer as base_layer
from sparse_peft.tuners.stacks import EntryStack

CONFIGS = {
    "sparse": lambda seed: SparseConfig(density=0.05 * (seed + 1), seed=seed),
    "sara": lambda seed: SaRAConfig(density=0.1 + 0.05 * seed),
}
ORDERS = ["a b c", "c a a", "__base__ b b a __base__", "b b", "__base__"]


def served(method="sparse", kind="Linear", dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(9, 13) if kind == "Linear" else Conv1D(13, 9)
    base = nn.Sequential(layer).to(dtype)

    def config(seed):
        made = CONFIGS[method](seed)
        made.target_modules, made.init_weights = ["0"], False
        return made

    model = get_peft_model(base, config(0), adapter_name="a")
    for seed, name in enumerate("bc", 1):
        model.add_adapter(name, config(seed))
    return model.eval(), model.base_model.model[0]


def alone(model, x, names):
    rows = []
    for row, name in zip(x, names, strict=True):
        model.base_model.set_adapter([] if name == "__base__" else name)
        rows.append(model(row[None])[0])
    return torch.stack(rows)


@pytest.fixture
def products(monkeypatch):
    """How often an adapter's product was made alone."""
    made = []
    plain = base_layer.delta_matmul
    monkeypatch.setattr(base_layer, "delta_matmul", lambda *args: made.append(1) or plain(*args))
    return made


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("shape", [(), (4,)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_each_item_is_as_if_it_were_alone(method, kind, shape, order, products):
    model, layer = served(method, kind)
    names = order.split()
    x = torch.randn(len(names), *shape, 9)
    for _ in range(2):
        torch.testing.assert_close(model(x, adapter_names=names), alone(model, x, names), rtol=1e-5, atol=1e-5)
        for delta in layer.deltas.values():
            delta.values.mul_(1.5)  # the adapters side by side are made anew
    assert not products


@torch.no_grad()
def test_bfloat16_and_autocast(products):
    model, _ = served(dtype=torch.bfloat16)
    names = ["c", "a", "__base__"]
    x = torch.randn(3, 2, 9, dtype=torch.bfloat16)
    torch.testing.assert_close(model(x, adapter_names=names), alone(model, x, names), rtol=2e-2, atol=2e-2)
    model, _ = served()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x.float(), adapter_names=names)
        torch.testing.assert_close(mixed, alone(model, x.float(), names), rtol=2e-2, atol=2e-2)
        assert not products
        x = torch.randn(3, 200, 9)
        torch.testing.assert_close(model(x, adapter_names=names), alone(model, x, names), rtol=2e-2, atol=2e-2)
        assert products


@torch.no_grad()
def test_the_adapters_lie_side_by_side_until_they_are_switched():
    model, layer = served()
    x = torch.randn(3, 9)
    model(x, adapter_names=["a", "b", "c"])
    stack = layer._stack
    assert isinstance(stack, EntryStack) and stack.names == ("a", "b", "c")
    model(x.flip(0), adapter_names=["c", "a", "b"])
    assert layer._stack is stack
    assert copy.deepcopy(layer)._stack is None and pickle.loads(pickle.dumps(layer))._stack is None
    model.set_adapter("a")
    assert layer._stack is None
    model(x, adapter_names=["a", "b", "c"])
    model.delete_adapter("b")
    assert layer._stack is None
    model(x[:2], adapter_names=["a", "c"])
    model.double()
    assert layer._stack is None


@torch.no_grad()
def test_many_tokens_take_each_adapters_own_product(products):
    model, layer = served()
    names = ["a", "b", "a"]
    x = torch.randn(3, 65, 9)
    torch.testing.assert_close(model(x, adapter_names=names), alone(model, x, names), rtol=1e-5, atol=1e-5)
    assert layer._stack is None and len(products) == 2


def test_what_trains_has_its_gradient():
    model, layer = served()
    x = torch.randn(2, 9)
    for mixed in (True, False):
        for name in "ab":
            model.base_model.set_adapter(name)
            layer.deltas[name].values.grad = None
        model.base_model.set_adapter(["a", "b"])
        if mixed:
            model(x, adapter_names=["a", "b"]).square().sum().backward()
            found = [layer.deltas[name].values.grad.clone() for name in "ab"]
        else:
            for row, name, got in zip(x, "ab", found, strict=True):
                model.base_model.set_adapter(name)
                (expected,) = torch.autograd.grad(model(row[None]).square().sum(), layer.deltas[name].values)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_methods_with_more_than_entries_have_no_common_product(products):
    torch.manual_seed(0)
    config = SLTrainConfig(r=2, density=0.1, target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(9, 13)), config, adapter_name="a").eval()
    x = torch.randn(2, 9)
    torch.testing.assert_close(model(x, adapter_names=["a", "__base__"]), alone(model, x, ["a", "__base__"]))
    assert len(products) == 1
