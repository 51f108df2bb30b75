"""The scale between trained values and the delta: whatever is made of an adapter has ``scale * values``."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from sparse_peft import SM3, S2FTConfig, SaRAConfig, SLTrainConfig, SparseAdamW, SparseConfig, SparsityController
from sparse_peft.adapters import AdapterPool, compose, convert, save_as_lora, soup, to_sparse
from tests.helpers.trained_adapters import LAYERS, deltas, loaded, saved, three, trained, weighted_sum
from tests.helpers.training_loop import train
from tests.helpers.two_layers import TwoLayers, adapted, assert_base_untouched, layers_of, oracle_output

SCALES = [8.0, 3.0]
CONFIGS = {
    "sparse": lambda **k: SparseConfig(**{"density": 0.3, **k}),
    "block": lambda **k: SparseConfig(**{"density": 0.5, "granularity": "block", "block_size": [3, 2], **k}),
    "sara": lambda **k: SaRAConfig(**{"density": 0.3, **k}),
    "s2ft in": lambda **k: S2FTConfig(**{"k": 2, "side": "in", **k}),
    "s2ft out": lambda **k: S2FTConfig(**{"k": 2, "side": "out", **k}),
    "sltrain": lambda **k: SLTrainConfig(**{"r": 2, "density": 0.3, **k}),
}
ONLY_ENTRIES = [name for name in CONFIGS if name != "sltrain"]


def dense_of(state, scale):
    """``scale * values`` at the trained positions, float64."""
    dense = torch.zeros(state.shape, dtype=torch.float64)
    dense.view(-1)[state.support.indices.long()] = scale * state.values.detach().double()
    return dense


# ---------------------------------------------------------------------------------------------------- passes


def _hooked(model):
    for layer in layers_of(model).values():
        layer.base_layer.register_forward_hook(lambda *_: None)


PATHS = {
    "resident": ({}, None, lambda model: model),
    "overlay": ({"resident": False}, None, lambda model: model),
    "additive": ({}, _hooked, lambda model: model),
    "traced": ({}, None, lambda model: torch.compile(model, backend="eager", fullgraph=True)),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_passes_against_float64(path, scale, conv1d, dtype):
    fields, prepare, wrap = PATHS[path]
    torch.compiler.reset()
    model, reference = adapted(TwoLayers(conv1d=conv1d).to(dtype), scale=scale, **fields)
    states = {name: layer.deltas["default"] for name, layer in layers_of(model).items()}
    assert all(state.values.dtype == torch.float32 for state in states.values())
    if prepare is not None:
        prepare(model)
    x = torch.randn(2, 3, 17).to(dtype).requires_grad_()
    y = wrap(model)(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    weights = {}
    for name, state in states.items():
        base = getattr(reference, name).weight.detach()
        rounded = (base.double() + dense_of(state, scale)).to(base.dtype).double()
        exact = base.double() + dense_of(state, scale)
        weights[name] = (exact if path == "additive" else rounded).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    expected = oracle_output(reference, weights, exact_x)
    expected.backward(grad.double())
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    size = max(1.0, scale)
    for got, want in ((y, expected), (x.grad, exact_x.grad)):
        torch.testing.assert_close(got.double(), want, rtol=tolerance["rtol"], atol=tolerance["atol"] * 20 * size)
    for name, state in states.items():
        sampled = scale * weights[name].grad.reshape(-1)[state.support.indices.long()]
        atol = tolerance["atol"] * sampled.abs().max().item()
        torch.testing.assert_close(state.values.grad.double(), sampled, rtol=tolerance["rtol"], atol=atol)
    assert state.values.grad.dtype == torch.float32
    model.unload()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_power_of_two_rounds_nothing_in_half_precision(dtype):
    """Values of half precision, with scale 1 and 8: the same delta, and eight times the gradient, to the bit."""
    grads, outputs = [], []
    for scale in (1.0, 8.0):
        torch.manual_seed(0)
        base = TwoLayers().to(dtype)
        config = SparseConfig(density=0.2, scale=scale, target_modules=LAYERS[:2])
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        for layer in layers_of(model).values():
            values = layer.deltas["default"].values
            torch.manual_seed(1)
            values.data = (torch.randn(values.shape) / 8).to(dtype) * 8 / scale
        torch.manual_seed(2)
        y = model(torch.randn(6, 17).to(dtype))
        y.float().square().sum().backward()
        outputs.append(y.detach())
        grads.append([layer.deltas["default"].values.grad.float() for layer in layers_of(model).values()])
    assert torch.equal(*outputs)
    assert all(torch.equal(b, 8 * a) for a, b in zip(*grads, strict=True))


def test_a_scale_of_1_makes_no_tensor():
    model, _ = adapted(scale=1.0)
    state = layers_of(model)["first"].deltas["default"]
    assert state() is state.values


@pytest.mark.parametrize("kind", [n for n in CONFIGS if n != "block"])
def test_convolutions_and_their_unmerging(kind):
    base = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 4, 2))
    before = copy.deepcopy(base)
    config = CONFIGS[kind](scale=8.0, target_modules=["0", "2"], init_weights=False)
    model = get_peft_model(base, config)
    x = torch.randn(2, 3, 7, 7)
    reference = copy.deepcopy(before).double()
    for name, delta in deltas(model).items():
        reference.get_submodule(name).weight.data += delta
    torch.testing.assert_close(model(x).double(), reference(x.double()), rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(model(x).double(), reference(x.double()), rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    for own, other in zip(model.unload().parameters(), before.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_delta_merge_and_base(kind, scale):
    model = trained(CONFIGS[kind](scale=scale))
    assert model.peft_config["default"].scale == scale
    for layer in LAYERS:
        module = model.base_model.model.get_submodule(layer)
        state, found = module.deltas["default"], deltas(model)[layer]
        expected = dense_of(state, scale)
        if kind == "sltrain":
            product = (state.B * state.scale).double() @ state.A.double()
            expected = expected + (product if module.product.in_dim == 1 else product.t()).detach()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        low, sparse = state.low_rank_part(), state.sparse_part()
        assert torch.equal(sparse.values, state.values.detach() * scale) and (low is None) == (kind != "sltrain")
    x = torch.randn(4, 7)
    with torch.no_grad():
        plain = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(model(x), plain)
    for before, after in zip(three().state_dict().values(), model.unload().state_dict().values(), strict=True):
        assert torch.equal(before, after)


def test_pretraining_starts_with_the_same_weights():
    weights = []
    for scale in (1.0, 8.0):
        torch.manual_seed(0)
        config = SLTrainConfig(mode="pretrain", r=2, density=0.3, scale=scale, target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(9, 7)), config)
        weights.append((model(torch.eye(9)), model.merge_and_unload()[0].weight))
    assert torch.equal(weights[0][0], weights[1][0]) and torch.equal(weights[0][1], weights[1][1])


def test_mixed_batches_and_adapters_that_add_up():
    model = trained(CONFIGS["sparse"](scale=8.0))
    other = CONFIGS["sparse"](scale=0.5, seed=3, target_modules=LAYERS, init_weights=False)
    model.add_adapter("other", other)
    x, names = torch.randn(5, 7), ["default", "other", "__base__", "other", "default"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
    for i, name in enumerate(names):
        reference = three().double()
        for layer, delta in deltas(model, name).items() if name != "__base__" else ():
            reference.get_submodule(layer).weight.data += delta
        torch.testing.assert_close(mixed[i].double(), reference(x[i].double()), rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["default", "other"])
    reference = three().double()
    for layer, delta in weighted_sum([deltas(model), deltas(model, "other")], [1, 1]).items():
        reference.get_submodule(layer).weight.data += delta
    torch.testing.assert_close(model(x).double(), reference(x.double()), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- training

OPTIMIZERS = {
    "adamw": lambda values, model, lr, eps, wd: torch.optim.AdamW(values, lr=lr, eps=eps, weight_decay=wd),
    "by age": lambda values, model, lr, eps, wd: SparseAdamW(values, lr=lr, eps=eps, weight_decay=wd),
    "sm3": lambda values, model, lr, eps, wd: SM3(values, lr=lr, eps=eps**2, weight_decay=wd, peft_model=model),
}
REGROWN = {"density": 0.2, "reselect_every": 4, "replace_rate": 0.4}
TRAINED = {
    "random": SparseConfig(density=0.2),
    "set": SparseConfig(selection="set", **REGROWN),
    "rigl": SparseConfig(selection="rigl", **REGROWN),
    "spiel-ag": SparseConfig(selection="accumulated_gradient", accumulate=2, redistribute=True, **REGROWN),
    "spiel-ma": SparseConfig(selection="momentum", accumulate=2, **REGROWN),
    "sara": SaRAConfig(density=0.2, progressive=4, nuclear_weight=1e-2, nuclear_min_size=2, nuclear_matrices="all"),
    "s2ft": S2FTConfig(k=3),
}

RUNS = [*((name, "by age") for name in TRAINED), ("spiel-ag", "adamw"), ("spiel-ma", "sm3"), ("random", "sm3")]


def trained_with(config, scale, optimizer, lr=2**-5, eps=2**-10, decay=2**-3):
    """A run whose rate, epsilon and weight decay make up for the scale."""
    torch.manual_seed(0)
    config = copy.copy(config)
    config.scale, config.target_modules = scale, ["first", "second"]
    model = get_peft_model(TwoLayers(), config)
    values = [p for p in model.parameters() if p.requires_grad]
    stepper = OPTIMIZERS[optimizer](values, model, lr / scale, eps * scale, decay * scale)
    controller = SparsityController(model, stepper, total_steps=8)
    records = train(model, stepper, controller, range(8))
    controller.close()
    return model, records


@pytest.mark.parametrize("name, optimizer", RUNS)
def test_a_scale_is_a_learning_rate(name, optimizer):
    """Weight decay, reselection, freezing and the nuclear norm act on deltas: both runs are the same, to the bit."""
    (plain, records), (scaled, others) = (trained_with(TRAINED[name], scale, optimizer) for scale in (1.0, 8.0))
    for layer, other in zip(layers_of(plain).values(), layers_of(scaled).values(), strict=True):
        state, twin = layer.deltas["default"], other.deltas["default"]
        assert state.support == twin.support
        assert bool(state.values.any()) and torch.equal(state.values, 8 * twin.values)
    assert [(type(r), r.step) for r in records] == [(type(r), r.step) for r in others]
    thresholds = [
        [getattr(layer, "drop_threshold", None) for r in found for layer in r.layers.values()]
        for found in (records, others)
    ]
    assert thresholds[0] == thresholds[1]


def test_gradients_that_vanish_leave_the_scale_between_observed_and_used_ones():
    model, _ = adapted(scale=4.0, selection="accumulated_gradient", reselect_every=2, accumulate=1, init_weights=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller = SparsityController(model, optimizer, total_steps=4)
    (dynamics,) = controller.parts["adapters"].values()
    windows = [(track.window, torch.zeros(track.support.nnz)) for track in dynamics.tracks.values()]
    assert dynamics._factor(windows) == 4.0
    controller.close()


# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_files_have_the_values_and_the_config_the_scale(kind, dtype, tmp_path):
    folder, model = saved(tmp_path, CONFIGS[kind](scale=8.0, save_dtype=dtype))
    assert json.loads((folder / "adapter_config.json").read_text())["scale"] == 8.0
    again, x = loaded(folder), torch.randn(3, 7)
    if dtype == "float32":
        assert torch.equal(again(x), model(x))
    for layer in LAYERS:
        state = again.base_model.model.get_submodule(layer).deltas["default"]
        values = model.base_model.model.get_submodule(layer).deltas["default"].values
        assert state.value_scale == 8.0
        assert torch.equal(state.values, values.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_without_a_scale_have_one_of_1(kind, tmp_path):
    folder, model = saved(tmp_path, CONFIGS[kind](scale=1.0))
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    del fields["scale"]
    path.write_text(json.dumps(fields))
    again, x = loaded(folder), torch.randn(3, 7)
    assert again.peft_config["default"].scale == 1.0
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("kind", ONLY_ENTRIES)
def test_conversions_keep_the_delta(kind, tmp_path):
    folder, model = saved(tmp_path / "own", CONFIGS[kind](scale=8.0))
    expected = deltas(model)
    config, _ = to_sparse(model)
    assert config.scale == 1.0
    convert(folder, tmp_path / "sparse")
    for layer, delta in deltas(loaded(tmp_path / "sparse")).items():
        torch.testing.assert_close(delta, expected[layer], rtol=0, atol=0)
    save_as_lora(model, tmp_path / "lora")
    lora, x = PeftModel.from_pretrained(three(), tmp_path / "lora").eval(), torch.randn(3, 7)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_combinations_of_different_scales(kind, tmp_path):
    """The sum of deltas, with the first one's scale."""
    fields, scales, weights = {"target_modules": LAYERS, "init_weights": False}, [8.0, 0.5, 1.0], [0.7, -0.4, 1.3]
    model = trained(CONFIGS[kind](scale=scales[0]))
    for name, scale in zip(["two", "three"], scales[1:], strict=True):
        model.add_adapter(name, CONFIGS[kind](scale=scale, **({} if kind == "sara" else {"seed": 7}), **fields))
    names = ["default", "two", "three"]
    expected = weighted_sum([deltas(model, name) for name in names], weights)
    model.add_weighted_adapter(names, weights, "sum")
    assert model.peft_config["sum"].scale == 8.0
    model.save_pretrained(tmp_path)
    compose([tmp_path, tmp_path / "two", tmp_path / "three"], tmp_path / "composed", weights=weights)
    for found in (deltas(model, "sum"), deltas(loaded(tmp_path / "composed"))):
        for layer, delta in expected.items():
            torch.testing.assert_close(found[layer], delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_mismatch", ["union", "intersection"])
def test_soups_of_different_scales(on_mismatch, tmp_path):
    one, first = saved(tmp_path / "one", CONFIGS["sparse"](scale=8.0, density=0.6))
    two, second = saved(tmp_path / "two", CONFIGS["sparse"](scale=2.0, density=0.6, seed=1))
    made = soup([one, two], tmp_path / "soup", on_mismatch=on_mismatch)
    assert made.config.scale == 8.0
    parts = [deltas(first), deltas(second)]
    for layer, delta in deltas(loaded(tmp_path / "soup")).items():
        common = (parts[0][layer] != 0) & (parts[1][layer] != 0)
        mean = (parts[0][layer] + parts[1][layer]) / 2
        expected = mean if on_mismatch == "union" else torch.where(common, mean, 0.0)
        torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-6)


def test_a_pool_serves_different_scales(tmp_path):
    folders = {f"of {s}": saved(tmp_path / f"of {s}", CONFIGS["sparse"](scale=s), seed=s) for s in (1, 8)}
    pool, x = AdapterPool(three()), torch.randn(3, 7)
    for name, (folder, _) in folders.items():
        pool.add(name, folder)
    for name, (_, model) in folders.items():
        with pool.use(name) as base, torch.no_grad():
            assert torch.equal(base(x), model(x))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e30, True, "large"])
def test_other_scales_are_refused(value):
    with pytest.raises((TypeError, ValueError), match="scale="):
        SparseConfig(scale=value)


def test_a_loaded_base_is_left_alone():
    model, reference = adapted(scale=8.0)
    F.mse_loss(model(torch.randn(3, 17)), torch.randn(3, 5)).backward()
    model.base_model.release()
    assert_base_untouched(model, reference)


# ---------------------------------------------------------------------------------------------------- resolving


def test_auto_is_resolved_with_the_adapter_and_saved(tmp_path):
    config = SparseConfig(density=0.3, target_modules=LAYERS)
    with pytest.raises(ValueError, match="it is a number once an adapter is made"):
        config.value_scale  # noqa: B018
    model = get_peft_model(three(), config)
    assert config.scale == 2.0 and config.recommended_rate == 2e-4
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(three(), tmp_path).peft_config["default"]
    assert again.scale == 2.0 and again.recommended_rate == 2e-4


def test_a_new_budget_resolves_auto_anew_and_leaves_a_number():
    auto, fixed = SparseConfig(density=0.3, target_modules=LAYERS), SparseConfig(density=0.3, scale=5.0)
    fixed.target_modules = LAYERS
    for config in (auto, fixed):
        get_peft_model(three(), config)
        config.density = 0.02
        get_peft_model(three(), config)
    assert auto.scale == 8.0 and fixed.scale == 5.0
    assert auto.recommended_rate == 2e-4 and fixed.recommended_rate == pytest.approx(2e-4 * 8 / 5)


def test_a_file_of_another_scale_that_is_loaded_again_keeps_its_meaning(tmp_path):
    """As a run that an earlier version began, and that is resumed with a config of today."""
    folder, old = saved(tmp_path / "old", CONFIGS["sparse"](scale=1.0))
    path, x = folder / "adapter_config.json", torch.randn(3, 7)
    fields = json.loads(path.read_text())
    del fields["scale"], fields["recommended_rate"]
    path.write_text(json.dumps(fields))
    model = trained(CONFIGS["sparse"](scale=8.0), seed=3)
    with pytest.warns(UserWarning, match=r"saved with scale=1.0, and the model's adapter was made with scale=8.0"):
        model.load_adapter(folder, "default")
    assert torch.equal(model(x), old(x))
    assert model.peft_config["default"].scale == 1.0
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(loaded(tmp_path / "new")(x), old(x))


def test_the_twin_of_an_adapter_has_its_scale():
    config = SparseConfig(density=0.1, target_modules=LAYERS)
    model = get_peft_model(three(), config)
    model.add_adapter("reference", config)
    for layer in LAYERS:
        states = model.base_model.model.get_submodule(layer).deltas
        assert states["default"].value_scale == states["reference"].value_scale == config.scale == 4.0
