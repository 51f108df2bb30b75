"""What a step keeps and what it allocates, counted: nothing of a weight's size, no temporary above a panel."""

import gc

import pytest
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn

from benchmarks.measure import LargestTensor
from sparse_peft import SparseConfig, panel_limit, use_backend
from tests.helpers.memory import saved_bytes
from tests.helpers.two_layers import TwoLayers, adapted

TOKENS, WIDTH = 8, 256


class Stack(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("names", ["one adapter", "two adapters"])
def test_only_the_inputs_are_saved(resident, names):
    config = {"target_modules": r"layers\.\d", "density": 0.05, "resident": resident}
    model = get_peft_model(Stack(), SparseConfig(**config))
    if names == "two adapters":
        model.add_adapter("other", SparseConfig(seed=3, **config))
        model.base_model.set_adapter(["default", "other"])
    x = torch.randn(TOKENS, WIDTH)
    nbytes, y = saved_bytes(model, x)
    # of each adapter its places in the union, and one number: its scale
    slots = 0 if names == "one adapter" else 6 * 8 * (round(0.05 * WIDTH * WIDTH) + 1)
    assert nbytes <= 2 * TOKENS * WIDTH * 4 + slots
    y.sum().backward()


def storages_alive():
    """``{address: bytes}`` of all memory that Python's tensors have."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.layout is torch.strided}


@pytest.mark.parametrize(("dtype", "original"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_that_live_for_an_entry(dtype, original):
    model = Stack(2).to(dtype)
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    x.grad = torch.zeros_like(x)
    before = storages_alive()
    model = get_peft_model(model, SparseConfig(density=0.05, target_modules=r"layers\.\d"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=True)
    for _ in range(2):
        optimizer.step()
        model(x).float().square().sum().backward()
    # the weights hold their entries, whose originals are kept; gradients and moments are there
    found = sum(nbytes for address, nbytes in storages_alive().items() if address not in before)
    entries = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # value, gradient, two moments, column, original; a row pointer for each row, and a few numbers for each layer
    assert entries * (16 + 2 + original) < found <= entries * (16 + 2 + original) + 2 * (4 * (WIDTH + 1) + 64)


def test_shira_saves_a_merged_weight_per_layer_and_we_do_not():
    x = torch.randn(TOKENS, WIDTH)
    shira = get_peft_model(Stack(), ShiraConfig(r=4, target_modules=r"layers\.\d"))
    ours = get_peft_model(Stack(), SparseConfig(r=4, target_modules=r"layers\.\d"))
    lora = get_peft_model(Stack(), LoraConfig(r=4, target_modules=r"layers\.\d"))
    assert saved_bytes(shira, x)[0] > WIDTH * WIDTH * 4
    assert saved_bytes(ours, x)[0] < saved_bytes(lora, x)[0]


def test_frozen_adapter_saves_nothing():
    model, _ = adapted(Stack(), names=["0", "1", "2"])
    for p in model.parameters():
        p.requires_grad_(False)
    assert saved_bytes(model, torch.randn(TOKENS, WIDTH, requires_grad=True))[0] == 0


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("backend", ["sampled", "panels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv1d", [False, True])
def test_no_temporary_of_a_training_step_is_larger_than_a_panel(resident, backend, dtype, conv1d):
    limit = 32 * 1024  # an eighth of the smaller weight in float32
    model, _ = adapted(TwoLayers(WIDTH, 4 * WIDTH, WIDTH, conv1d=conv1d).to(dtype), density=0.01, resident=resident)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    activations = TOKENS * 4 * WIDTH * dtype.itemsize
    with panel_limit(limit), use_backend(backend), LargestTensor() as largest:
        for _ in range(2):
            model(x).float().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 0 < largest.nbytes <= max(limit, activations)


def test_the_largest_tensor_mode_sees_a_dense_temporary():
    model = get_peft_model(Stack(1), ShiraConfig(r=1, target_modules=r"layers\.\d"))
    with LargestTensor() as largest:
        model(torch.randn(2, WIDTH)).sum().backward()
    assert largest.nbytes >= WIDTH * WIDTH * 4


def test_inference_allocates_the_outputs_only():
    model, _ = adapted(Stack(), names=["0", "1", "2"])
    x = torch.randn(1, WIDTH)
    with torch.no_grad():
        model(x)
        with LargestTensor() as largest:
            model(x)
    assert largest.nbytes <= WIDTH * 4
