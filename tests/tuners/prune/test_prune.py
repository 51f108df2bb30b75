"""Layers whose weight is ``mask * (W + delta)``: passes, merging, masks, files."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_peft import PruneConfig, adapter_masks, release_masks, set_masks
from sparse_peft.numerics import panel_limit, unpack_bits
from sparse_peft.sparsify import Masks, masks_of, prune, pruned
from sparse_peft.tuners.prune.layer import PruneLinear
from tests.helpers.two_layers import TwoLayers

SIZES = (16, 24, 8)


def model_of(base=None, adapter="default", **fields):
    torch.manual_seed(0)
    base = TwoLayers(*SIZES) if base is None else base
    fields = {"target_modules": ["first", "second"], "r": 3, "density": 0.1, "init_weights": False, **fields}
    return get_peft_model(base, PruneConfig(**fields), adapter)


def layers_of(model):
    return {layer.name: layer for layer in model.modules() if isinstance(layer, PruneLinear)}


def rows(module, tensor):
    return tensor.t() if isinstance(module, Conv1D) else tensor


def dense_weight(layer, adapter="default"):
    """``(outputs, inputs)`` in float64, and the mask."""
    state, base = layer.settled(adapter), layer.get_base_layer()
    mask = unpack_bits(state.mask, layer.sides[1])
    delta = torch.zeros(layer.sides, dtype=torch.float64)
    own = {name: parameter.detach().double() for name, parameter in state.own_parameters.items()}
    if "A" in own:
        delta += state.config.scale * own["B"] @ own["A"]
    if "values" in own:
        delta.view(-1)[state.positions.long()] += own["values"]
    delta += own.get("dense", 0)
    weight = rows(base, base.weight.detach()).double()
    return (mask * weight + delta if state.outside else mask * (weight + delta)), mask


def expected(model, x):
    for name, layer in layers_of(model).items():
        base, (weight, _) = layer.get_base_layer(), dense_weight(layer)
        weight = weight.to(base.weight.dtype).double()  # rounded once
        x = F.linear(
            torch.relu(x) if name == "second" else x, weight, None if base.bias is None else base.bias.double()
        )
    return x


@pytest.mark.parametrize("trains", ["low_rank", "sparse", "low_rank+sparse", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv1d", [False, True])
def test_outputs_merging_and_zeros(trains, dtype, conv1d):
    base = TwoLayers(*SIZES, conv1d=conv1d).to(dtype)
    untouched = copy.deepcopy(base)
    model = model_of(base, pattern="2:4", trains=trains)
    x = torch.randn(5, SIZES[0]).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    with torch.no_grad(), panel_limit(1024):
        out = model(x)
        torch.testing.assert_close(out.double(), expected(model, x.double()), **tolerance)
        with model.disable_adapter():
            assert torch.equal(model(x), untouched(x))
        in_use = {name: layer.weight_in_use(("default",)).to(dtype) for name, layer in layers_of(model).items()}
        model.merge_adapter()
        near = {"rtol": 0, "atol": float(out.abs().max()) * (1e-6 if dtype == torch.float32 else 0.02)}
        torch.testing.assert_close(model(x), out, **near)
        for name, layer in layers_of(model).items():
            assert torch.equal(layer.base_layer.weight, in_use[name])
            kept = rows(layer.get_base_layer(), layer.get_base_layer().weight) != 0
            _, mask = dense_weight(layer)
            assert not (kept & ~mask).any()
            assert mask.view(mask.shape[0], -1, 4).sum(2).unique().tolist() == [2]
        model.unmerge_adapter()
        for name, layer in layers_of(model).items():
            assert torch.equal(layer.base_layer.weight, untouched.get_submodule(name).weight)
        assert torch.equal(model(x), out)
        torch.testing.assert_close(model.merge_and_unload()(x), out, **near)


def test_convolutions_and_a_hooked_base():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    model = model_of(Net(), target_modules=["conv"], pattern="2:4")
    layer = layers_of(model)["conv"]
    x = torch.randn(2, 4, 5, 5)
    weight = dense_weight_of_conv(layer)
    wanted = F.conv2d(x.double(), weight, layer.base_bias.double(), padding=1)
    with panel_limit(2048):
        out = model(x)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    layer.base_layer.register_forward_hook(lambda *_: None)
    assert layer.path() == "additive"
    torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)


def dense_weight_of_conv(layer):
    state = layer.settled("default")
    mask = unpack_bits(state.mask, layer.sides[1])
    delta = state.config.scale * (state.B @ state.A).detach().double()
    return (mask * (layer.base_layer.weight.detach().flatten(1).double() + delta)).view(layer.weight_shape)


def test_several_adapters_add_their_deltas_and_multiply_their_masks():
    model = model_of(pattern=0.5)
    model.add_adapter(
        "other", PruneConfig(pattern=0.4, r=2, target_modules=["first"], score="random", init_weights=False)
    )
    model.base_model.set_adapter(["default", "other"])
    layer, x = layers_of(model)["first"], torch.randn(3, SIZES[0])
    base = layer.base_layer.weight.detach().double()
    states = [layer.settled(name) for name in ("default", "other")]
    delta = sum(state.config.scale * (state.B @ state.A).detach().double() for state in states)
    masks = [unpack_bits(state.mask, SIZES[0]) for state in states]
    wanted = F.linear(x.double(), masks[0] * masks[1] * (base + delta), layer.base_bias.double())
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.double(), base)


def test_first_masks():
    base = TwoLayers(*SIZES)
    weight = base.first.weight.detach().abs()
    layer = layers_of(model_of(copy.deepcopy(base), pattern=0.6))["first"]
    _, mask = dense_weight(layer)
    assert mask.sum() == round(0.4 * mask.numel()) and weight[mask].min() >= weight[~mask].max()
    one, two = (
        dense_weight(layers_of(model_of(copy.deepcopy(base), pattern=0.6, score="random", seed=seed))["first"])[1]
        for seed in (0, 1)
    )
    assert one.sum() == two.sum() == mask.sum() and not torch.equal(one, two)
    with torch.no_grad():
        base.first.weight[3:7] = 0
    _, mask = dense_weight(layers_of(model_of(base, score="nonzero", target_modules=["first"]))["first"])
    assert torch.equal(mask, base.first.base_layer.weight != 0)


def test_recipes_that_begin_dense_begin_as_the_base():
    base, x = TwoLayers(*SIZES), torch.randn(4, SIZES[0])
    for recipe in ("gradual", "pst", "cast", "mdgf", "l1"):
        model = model_of(copy.deepcopy(base), recipe=recipe, init_weights=True)
        assert torch.equal(model(x), base(x)), recipe


def test_dsee_starts_as_the_pruned_base_and_puts_its_update_on_top():
    base, x = TwoLayers(*SIZES), torch.randn(4, SIZES[0])
    model = model_of(copy.deepcopy(base), recipe="dsee", pattern=0.5, init_weights=True)
    with pruned(base, 0.5):
        torch.testing.assert_close(model(x), base(x))
    state = layers_of(model)["first"].settled("default")
    assert state.values.numel() == round(0.1 * 16 * 24) == state.positions.unique().numel()
    with torch.no_grad():
        state.values.fill_(2.0)
    torch.testing.assert_close(model(x).double(), expected(model, x.double()), rtol=1e-5, atol=1e-5)
    # where the weight's best low-rank approximation is farthest off
    weight = base.first.weight.detach()
    u, s, vh = torch.linalg.svd(weight)
    assert int(state.positions.max()) < weight.numel() and s[0] > 0 and u.shape[0] == 24 and vh.shape[0] == 16


def test_slorb_fits_what_the_mask_takes_away():
    model = model_of(recipe="ast", slorb=4, init_weights=True)
    for layer in layers_of(model).values():
        weight = layer.base_layer.weight.detach()
        _, mask = dense_weight(layer)
        in_use = layer.weight_in_use(("default",))
        assert (weight - in_use).norm() < (weight - weight * mask).norm()
        residual = layer.settled("default").residual.repeat_interleave(4, 1)[:, : weight.shape[1]]
        torch.testing.assert_close(in_use, weight * mask + residual)


@pytest.mark.parametrize("recipe", ["static", "pst", "bdwp", "cast", "dsee", "ast"])
def test_files_bring_masks_and_numbers_back(recipe, tmp_path):
    fields = {"pattern": "2:4"} if recipe == "bdwp" else {}
    model = model_of(recipe=recipe, **fields, **({"slorb": 4} if recipe == "ast" else {}))
    x = torch.randn(3, SIZES[0])
    out = model(x)
    for layer in layers_of(model).values():  # as training leaves it
        state = layer.settled("default")
        state.put(beta=0.25, mask=torch.randint_like(state.mask, 256) & state.mask)
    out = model(x)
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(x), out)
    assert torch.equal(pickle.loads(pickle.dumps(again))(x), out)
    low = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(low(x), out)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mask", lambda t: t[:-1], "mask is torch.uint8 of shape"),
        ("beta", lambda t: torch.tensor(1.5), "beta=1.5"),
        ("beta", lambda t: torch.tensor(float("nan")), "NaN|not finite"),
        ("released", lambda t: torch.tensor(2, dtype=torch.uint8), "released=2"),
        ("positions", lambda t: t.flip(0), "not ascending"),
        ("positions", lambda t: t + 10**4, "not ascending numbers below"),
    ],
)
def test_damaged_files_are_refused(name, change, message, tmp_path):
    model_of(trains="sparse").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if key.endswith(f"first.sparse_peft_prune_adapter.{name}"):
            tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(TwoLayers(*SIZES), tmp_path)


def test_masks_from_outside_and_back(tmp_path):
    base = TwoLayers(*SIZES)
    batches = [torch.randn(32, SIZES[0])]
    with pruned(base, 0.5, "wanda", calibration=batches, loss_fn=lambda m, x: m(x)) as masks:
        wanted = {name: masks.layers[name].to_bool() for name in masks.layers}
    model = model_of(base, pattern=0.5)
    set_masks(model, masks)
    adapter_masks(model).save(tmp_path / "masks")
    for name, mask in Masks.load(tmp_path / "masks").layers.items():
        assert torch.equal(mask.to_bool(), wanted[name])
    merged = model.merge_and_unload()
    assert not masks.broken(merged) and masks_of(merged) is None
    other = model_of(TwoLayers(16, 24, 5), pattern=0.5)
    with pytest.raises(ValueError, match=r"layer second of .5, 24. has one of shape .8, 24."):
        set_masks(other, masks)
    with pytest.raises(ValueError, match="adapter_name='nobody'"):
        set_masks(model_of(), masks, "nobody")


@pytest.mark.parametrize("trains", ["weights", "sparse"])
def test_released_zeros_grow_from_zero(trains):
    model = model_of(trains=trains, pattern=0.5)
    x = torch.randn(6, SIZES[0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    before = model(x)
    masks = {name: dense_weight(layer)[1] for name, layer in layers_of(model).items()}
    release_masks(model, optimizer=optimizer)
    torch.testing.assert_close(model(x), before)
    layer = layers_of(model)["first"]
    if trains == "weights":
        dense = layer.settled("default").dense
        moment = optimizer.state[dense]["exp_avg"]
        assert not moment[~masks["first"]].any() and moment[masks["first"]].any()
        assert not layer.weight_in_use(("default",))[~masks["first"]].any()
        step()
        revived = layer.weight_in_use(("default",))[~masks["first"]]
        assert (revived != 0).float().mean() > 0.5  # all but those of outputs that ReLU switches off
    with pytest.raises(ValueError, match="no entries that could start at zero"):
        release_masks(model_of())


def test_what_cannot_be_masked_is_refused():
    with pytest.raises(ValueError, match="first: 17 inputs are no multiple of m=4"):
        model_of(TwoLayers(17, 8, 4), pattern="2:4")
    with pytest.raises(ValueError, match="transposed"):
        model_of(TwoLayers(16, 9, 8), recipe="bdwp", pattern="2:8")
    model = model_of(TwoLayers(*SIZES))
    with pytest.raises(ValueError, match="prune the base model before it gets adapters"):
        prune(model, 0.5)


def test_nothing_of_a_weights_size_is_saved_for_backward():
    model = model_of(TwoLayers(64, 256, 64), pattern="2:4")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(4, 64))
    own = [p for p in model.parameters() if p.requires_grad]
    assert max(t.numel() for t in saved) <= max(4 * 256, *(p.numel() for p in own))
