"""What a step keeps and what it allocates, counted: nothing of a weight's size, no temporary above a panel."""

import functools
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import LargestTensor
from sparse_peft import SparseConfig, panel_limit, use_backend
from tests.helpers.memory import saved_bytes
from tests.helpers.two_layers import TwoLayers, adapted
from tests.helpers.versions import forms_inputs_again

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
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
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


class Block(nn.Module):
    """A norm, two layers of its output, their gated product, and a layer of that: Llama's feed-forward."""

    def __init__(self, norm=True):
        super().__init__()
        self.norm = nn.Parameter(torch.rand(WIDTH), requires_grad=False) if norm else None
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        hidden = x + 1 if self.norm is None else self.norm * (x * x.pow(2).mean(-1, keepdim=True).rsqrt())
        return self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


NAMES = ["gate", "up", "down"]


def saved_for_values(model, x):
    """Bytes kept beyond those of the frozen model."""
    nbytes = saved_bytes(model, x)[0]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return nbytes - saved_bytes(model, x)[0]


@forms_inputs_again
@pytest.mark.parametrize(("compression", "itemsize"), [(None, 4), ("bf16", 2), ("int8", 1)])
def test_inputs_that_are_products_of_kept_tensors_are_not_kept(compression, itemsize):
    config = SparseConfig(density=0.05, target_modules=NAMES, compress_inputs=compression)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    assert saved_for_values(get_peft_model(Block(), config), x) == 0
    # a sum is kept, once for both of its layers; each rounds a copy of its own
    copies, scales = (1, 0) if compression is None else (2, 2 * 4 * TOKENS * (compression == "int8"))
    model = get_peft_model(Block(norm=False), config)
    assert saved_for_values(model, x) == copies * itemsize * TOKENS * WIDTH + scales


@forms_inputs_again
def test_inputs_that_are_formed_again_are_freed():
    """Not only by autograd: after the forward pass nothing refers to them."""
    model, alive = get_peft_model(Block(), SparseConfig(density=0.05, target_modules=NAMES)), []
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.register_forward_pre_hook(lambda _, inputs: alive.append(weakref.ref(inputs[0])))
    out = model(torch.randn(TOKENS, WIDTH, requires_grad=True))
    gc.collect()
    assert len(alive) == 2 and not any(reference() is not None for reference in alive)
    out.sum().backward()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_of_one_input_keep_one_cast_of_it(checkpointed):
    model = get_peft_model(Block(norm=False), SparseConfig(density=0.05, target_modules=NAMES))
    kept, x = [], torch.randn(TOKENS, WIDTH, requires_grad=True)

    def pack(tensor):
        kept.append(tensor)
        return tensor

    def run(x):
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return model(x).float()

    out = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
    own = {p.data_ptr() for p in model.parameters()}
    casts = {t.data_ptr() for t in kept if t.dtype == torch.bfloat16 and t.data_ptr() not in own}
    # one of the input of gate and up; theirs and silu's outputs; one of the product
    assert len(casts) == 5
    out.sum().backward()
    assert x.grad is not None


def gradients(model, x, autocast):
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(x).float().square().mean().backward()
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_kept_inputs(dtype, autocast):
    """With packed tensors, as under checkpointing, every input is kept."""
    config = SparseConfig(density=0.05, target_modules=NAMES, init_weights=False)
    model, x = get_peft_model(Block().to(dtype), config), torch.randn(TOKENS, WIDTH, dtype=dtype)
    found = gradients(model, x, autocast)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        kept = gradients(model, x, autocast)
    assert found.keys() == kept.keys() and len(found) == 4
    assert all(torch.equal(found[name], kept[name]) for name in found)


@pytest.mark.parametrize("compression", ["bf16", "int8"])
def test_the_gradient_s_error_is_bounded_by_the_rounding(compression):
    torch.manual_seed(0)
    config = SparseConfig(density=0.05, target_modules=["0"], compress_inputs=compression, init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)), config)
    layer = model.base_model.model[0]
    x, out = torch.randn(TOKENS, WIDTH, dtype=torch.float32), torch.randn(TOKENS, WIDTH)
    delta, support = layer.deltas["default"], layer.support("default")
    wanted = (out.double().t() @ x.double()).view(-1)[support.indices.long()] * delta.value_scale
    (model(x) * out).sum().backward()
    error = (delta.values.grad.double() - wanted).abs()
    step = x.abs().amax(-1, keepdim=True) / 127 if compression == "int8" else x.abs() * 2**-7
    worst = (out.abs().double().t() @ step.expand_as(x).double()).view(-1)[support.indices.long()] * delta.value_scale
    assert (error <= worst * 1.001).all() and error.max() > 0
    # at random, most of it cancels
    assert error.square().mean().sqrt() < worst.square().mean().sqrt() / 2


@functools.cache
def losses(compression, seed, steps=200):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 8))
    model = get_peft_model(base, SparseConfig(density=0.2, target_modules=["0", "2"], compress_inputs=compression))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    data, found = torch.Generator().manual_seed(seed), []
    goal = torch.randn(24, 8, generator=data)
    for _ in range(steps):
        x = torch.randn(32, 24, generator=data)
        loss = (model(x) - (x @ goal).tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("compression", ["bf16", "int8"])
def test_the_loss_of_200_steps_is_that_of_exact_inputs(compression):
    """Within the difference that other data make."""
    exact, rounded = (torch.stack([losses(how, seed) for seed in range(3)]) for how in (None, compression))
    assert (exact[:, -20:].mean(1) < exact[:, :20].mean(1) / 2).all()
    noise = exact[:, -50:].mean(1).std()
    assert (exact[:, -50:].mean(1) - rounded[:, -50:].mean(1)).abs().max() < noise


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
