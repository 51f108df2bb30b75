"""Entries in few input columns: gradients against dense float64, and what is kept for the backward pass."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_peft import SparseConfig
from sparse_peft.ops.gradient_observers import observe
from tests.helpers.memory import saved_bytes


class Perceptron(nn.Module):
    """Its second layer's input is no product: a GELU's output."""

    def __init__(self, kind=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 9) if kind is nn.Linear else Conv1D(9, 40)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


def adapted(kind=nn.Linear, **fields):
    config = SparseConfig(target_modules=["down"], init_weights=False, **{"density": 0.05, "columns": 0.2, **fields})
    return get_peft_model(Perceptron(kind), config)


def layer_of(model):
    return model.base_model.model.down


@pytest.mark.parametrize("fields", [{}, {"selection": "magnitude"}, {"density": 0.19}, {"compress_inputs": "bf16"}])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_gradients_are_those_of_the_dense_layer(kind, fields):
    model, x = adapted(kind, **fields), torch.randn(5, 3, 24)
    layer = layer_of(model)
    delta, inputs = layer.deltas["default"], layer.product.in_dim
    used = delta.support.to_mask().any(1 - inputs)
    assert int(used.sum()) <= 8
    with torch.no_grad():
        dense = (layer.dense_base_weight() + layer.get_delta_weight("default")).double().requires_grad_()
    hidden = nn.functional.gelu(model.base_model.model.up(x)).double()
    matrix = dense.t() if inputs == 1 else dense
    (hidden @ matrix + layer.base_bias.double()).square().sum().backward()
    model(x).square().sum().backward()
    expected = dense.grad.flatten()[delta.support.indices.long()] * delta.value_scale
    tolerance = 3e-2 if "compress_inputs" in fields else 1e-5
    torch.testing.assert_close(
        delta.values.grad.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max()
    )


def test_only_the_inputs_with_entries_are_kept():
    x = torch.randn(64, 24)
    few, all_inputs = (saved_bytes(adapted(columns=columns), x)[0] for columns in (0.2, None))
    used = int(layer_of(adapted()).support("default").to_mask().any(0).sum())
    assert all_inputs - few == 64 * (40 - used) * 4


def test_several_adapters_and_files(tmp_path):
    model, x = adapted(), torch.randn(6, 24)
    model.add_adapter("other", SparseConfig(target_modules=["down"], density=0.1, columns=0.5, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    model(x).sum().backward()
    assert all(state.values.grad is not None for state in layer_of(model).deltas.values())
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        Perceptron(), tmp_path / "default" if (tmp_path / "default").exists() else tmp_path
    )
    assert layer_of(again).deltas["default"].narrows_inputs
    assert torch.equal(again.eval()(x), copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize(
    "fields",
    [{"selection": "gradient"}, {"selection": "rigl"}, {"selection": "nonzero"}, {"granularity": "block"}],
)
def test_selections_without_columns_are_refused(fields):
    with pytest.raises(ValueError, match=r"columns=0\.5 with "):
        SparseConfig(columns=0.5, density=0.01, target_modules=["down"], **fields)


def test_an_observer_needs_all_inputs():
    model = adapted()
    observe(layer_of(model).observer_key, object())
    try:
        with pytest.raises(RuntimeError, match="train without columns="):
            model(torch.randn(4, 24)).sum().backward()
    finally:
        observe(layer_of(model).observer_key, None)
