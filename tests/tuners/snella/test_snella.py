"""SNELL's layers and files; numbers are of the oracles in the method's spec."""

import copy
import itertools
import math

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from sparse_peft import SnellaConfig, SoRAConfig, SparseConfig, panel_limit
from sparse_peft.adapters import save_as_sparse, to_sparse
from sparse_peft.tuners.delta_layer import TunerLayer
from tests.helpers.two_layers import TwoLayers

NAMES = ["first", "second"]
SETTINGS = [
    {},
    {"kernel": "mixed"},
    {"threshold": "reference"},
    {"threshold": "hard_ste"},
    {"threshold": "hard_ste", "init": "symmetric"},
    {"kernel": "mixed", "threshold": "reference", "init": "reference"},
]


def snella(base=None, **fields):
    fields = {"r": 4, "target_modules": NAMES, "init_weights": False, **fields}
    return get_peft_model(TwoLayers() if base is None else base, SnellaConfig(**fields))


def states(model, adapter="default"):
    return {m.name: m.deltas[adapter] for m in model.modules() if isinstance(m, TunerLayer)}


def layers(model):
    return {m.name: m for m in model.modules() if isinstance(m, TunerLayer)}


def trained(model, steps=3):
    """A few steps, so that thresholds and factors have moved."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        model(torch.randn(8, 17)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_fresh_adapter_is_the_base_model_to_the_bit(settings, dtype, conv1d):
    base = TwoLayers(conv1d=conv1d).to(dtype)
    x = torch.randn(2, 5, 17, dtype=dtype)
    want = base(x)
    model = snella(copy.deepcopy(base), init_weights=True, **settings)
    assert torch.equal(model(x), want) == (settings.get("init") != "reference")
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), want) == (settings.get("init") != "reference")
    with model.disable_adapter():
        assert torch.equal(model(x), want)
    rank, sides = 4, 17 + 33 + 33 + 5
    scalars = 6 if settings.get("kernel") == "mixed" else 0
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == rank * sides + scalars


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_oracle_1_forward_is_the_base_weight_plus_delta(settings, conv1d):
    torch.manual_seed(0)
    base = TwoLayers(conv1d=conv1d).double()
    model = snella(base, **settings)
    for state in states(model).values():
        state.double()
    x = torch.randn(6, 17, dtype=torch.float64)
    hidden = x
    for name, layer in layers(model).items():
        weight = layer.base_layer.weight + layer.get_delta_weight("default")
        hidden = hidden @ (weight if conv1d else weight.t()) + (
            0 if layer.base_layer.bias is None else layer.base_layer.bias
        )
        hidden = torch.relu(hidden) if name == "first" else hidden
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(model(x), hidden, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(model(x), hidden, rtol=1e-12, atol=1e-12)


def test_paths_agree_and_gradients_too():
    found = []
    for dropout, limit in ((0.0, 2**26), (0.0, 4 * 8 * 33 * 4), (1e-9, 2**26)):
        torch.manual_seed(0)
        model = snella(dropout=dropout)
        path = layers(model)["first"].path(torch.randn(2, 17))
        assert path == ("additive" if dropout else "fused")
        x = torch.randn(6, 17, requires_grad=True)
        with panel_limit(limit):
            model(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("settings", SETTINGS)
def test_as_many_entries_are_kept_as_the_config_says(sparsity, settings):
    model = trained(snella(sparsity=sparsity, **settings))
    for state in states(model).values():
        kept = state.numel - math.ceil(sparsity * state.numel)
        if settings.get("threshold") == "reference":
            kept = state.numel - math.floor(sparsity * (state.numel - 1)) - 1  # what is above a quantile
        assert state.entries == kept == int((state.dense() != 0).sum())
        assert state.sparsity == pytest.approx(1 - kept / state.numel)


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.1, 0.15, 0.3, 0.37, 0.63, 0.7, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("numel", [1, 2, 77, 640, 641, 16_385, 768 * 3072])
def test_the_reference_keeps_what_is_above_torchs_quantile(numel, sparsity):
    values = torch.randperm(numel).float()
    above = int((values > values.quantile(sparsity)).sum())
    assert SnellaConfig(threshold="reference", sparsity=sparsity).kept(numel) == above


def test_a_layer_too_large_for_torchs_quantile_keeps_its_share():
    numel = 2**25 + 1
    for sparsity in (0.0, 0.3, 1.0):
        kept = SnellaConfig(threshold="reference", sparsity=sparsity).kept(numel)
        assert kept >= 0 and kept == pytest.approx((1 - sparsity) * numel, abs=2)


def test_the_first_factors_depend_on_seed_and_name_alone():
    a, b, other = (states(snella(init_weights=True, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(a["first"].A, b["first"].A) and not torch.equal(a["first"].A, other["first"].A)
    assert not torch.equal(a["first"].B[..., :1], a["second"].A[..., :1])
    bound = 1 / math.sqrt(17 * 2)
    assert 0.9 * bound < a["first"].A.abs().max() <= bound
    same = states(snella(init_weights=True, init="symmetric", threshold="hard_ste"))["first"]
    assert torch.equal(same.A[0], same.A[1]) and not same.dense().any()


def test_a_symmetric_start_trains():
    model = trained(snella(init_weights=True, init="symmetric", threshold="hard_ste"), steps=5)
    for state in states(model).values():
        assert int((state.dense() != 0).sum()) == state.entries
        assert not torch.equal(state.A[0], state.A[1])


# ---------------------------------------------------------------------------------------------------------- threshold


def test_the_threshold_follows_the_parameters_at_its_interval():
    model = snella(tau_interval=3)
    state = states(model)["first"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen = []
    for _ in range(7):
        for _ in range(2):  # two micro-batches, a step
            model(torch.randn(4, 17)).square().mean().backward()
        seen.append(float(state.tau))
        optimizer.step()
    changes = [a != b for a, b in itertools.pairwise(seen)]
    assert changes == [False, False, True, False, False, True]


def test_a_step_that_leaves_no_trace_is_seen():
    model = snella()
    state = states(model)["first"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 17)).square().mean().backward()
    before = float(state.tau)
    state.A.data.mul_(2)
    state.B.data.mul_(2)
    state.A.grad = state.B.grad = None
    optimizer.step()
    model(torch.randn(4, 17))
    assert float(state.tau) == pytest.approx(2 * before, rel=1e-5)


def test_a_cached_delta_is_given_up_when_anything_changes():
    model = snella().eval()
    state, x = states(model)["first"], torch.randn(3, 17)
    with torch.no_grad():
        before = model(x)
        kept = state.kept_delta(torch.float32)
        assert state.kept_delta(torch.float32) is kept
        state.A.mul_(1.5)
        assert not torch.allclose(model(x), before)
        changed = model(x)
        state.keep(10)
        assert not torch.allclose(model(x), changed)
        assert int((state.kept_delta(torch.float32) != 0).sum()) == 10
    model.train()
    assert state._dense is None
    assert copy.deepcopy(model.eval()) is not None and "_dense" not in model.state_dict()
    plain = snella(cache=False).eval()
    with torch.no_grad():
        plain(x)
    assert states(plain)["first"]._dense is None


def test_parameters_changed_between_forward_and_backward_are_an_error():
    model = snella()
    loss = model(torch.randn(3, 17)).sum()
    with torch.no_grad():
        states(model)["first"].A.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------------------------- memory


def test_oracle_7_a_layer_saves_its_input_factors_and_threshold():
    model = snella(nn.Sequential(nn.Linear(64, 48)), target_modules=["0"])
    state, x = states(model)["0"], torch.randn(10, 64)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        model(x)
    weight = layers(model)["0"].base_layer.weight
    own = sum(t.nbytes for pointer, t in saved.items() if pointer != weight.data_ptr())
    assert own == x.nbytes + state.A.nbytes + state.B.nbytes + 4


# -------------------------------------------------------------------------------------------------------------- dtype


def test_oracle_12_a_bfloat16_model_computes_its_kernel_in_float32():
    model = snella(TwoLayers().to(torch.bfloat16))
    assert all(p.dtype == torch.float32 for s in states(model).values() for p in s.parameters())
    before = states(model)["first"].A.detach().clone()
    model.to(torch.bfloat16)
    state = states(model)["first"]
    assert state.A.dtype == state.tau.dtype == torch.float32 and torch.equal(state.A, before)
    x = torch.randn(4, 17, dtype=torch.bfloat16)
    out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert bool((state.A.grad != 0).any())


@pytest.mark.parametrize("settings", [{}, {"kernel": "mixed", "dropout": 1e-9}])
def test_autocast(settings):
    torch.manual_seed(0)
    model = snella(**settings)
    x = torch.randn(4, 17)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.05 * want.abs().max().item())
    out.float().square().mean().backward()
    assert all(
        p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in states(model)["first"].parameters()
    )


def test_a_cast_of_the_factors_behind_our_back_is_undone():
    model = snella(kernel="mixed")
    for state in states(model).values():
        for parameter in state.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    model(torch.randn(2, 17))  # computed in float32 all the same
    state = states(model)["first"]
    with pytest.warns(UserWarning, match="cast back"):
        state.restore_dtype()
    assert all(p.dtype == torch.float32 for p in state.parameters())


# ------------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS[:2])
def test_oracle_11_merge_and_unmerge_to_the_bit(settings, dtype, conv1d):
    torch.manual_seed(0)
    base = TwoLayers(conv1d=conv1d).to(dtype)
    model = snella(copy.deepcopy(base), **settings).eval()
    x = torch.randn(4, 17, dtype=dtype)
    with torch.no_grad():
        before = model(x)
        model.merge_adapter(safe_merge=True)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance * before.abs().max().item())
        model.unmerge_adapter()
        for name in NAMES:
            assert torch.equal(layers(model)[name].base_layer.weight, getattr(base, name).weight)
        assert torch.equal(model(x), before)
    merged = model.merge_and_unload()
    assert type(merged.first) is type(base.first)


def test_several_adapters_and_mixed_batches():
    torch.manual_seed(0)
    model = snella()
    model.add_adapter("other", SnellaConfig(target_modules=NAMES[:1], r=2, seed=5, kernel="mixed", init_weights=False))
    x = torch.randn(4, 17)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    layer = layers(model)["first"]
    hidden = layer.base_layer(x) + x @ (layer.get_delta_weight("default") + layer.get_delta_weight("other")).t()
    second = layers(model)["second"]
    want = torch.relu(hidden) @ (second.base_layer.weight + second.get_delta_weight("default")).t()
    torch.testing.assert_close(both, want, rtol=1e-4, atol=1e-4)
    model.eval()
    names = ["default", "__base__", "other", "default"]
    got = model(x, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name) if name != "__base__" else None
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    want = model(x[row])
            else:
                want = model(x[row])
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    torch.manual_seed(0)
    model = snella()
    x = torch.randn(4, 17, requires_grad=True)
    model(x).square().mean().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), wanted, strict=True):
        assert torch.equal(parameter.grad, gradient)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("settings", [*SETTINGS, {"tau_interval": 5}])
def test_oracle_9_a_file_gives_the_same_bits_after_shares_changed(tmp_path, settings):
    torch.manual_seed(0)
    base = TwoLayers()
    model = trained(snella(copy.deepcopy(base), **settings))
    states(model)["first"].keep(77)
    model = trained(model, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    x = torch.randn(5, 17)
    model.eval()
    assert states(loaded)["first"].entries == 77
    assert torch.equal(loaded(x), model(x))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert torch.equal(states(loaded)["first"].tau, states(model)["first"].tau)
    names = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    extra = {"mix"} if settings.get("kernel") == "mixed" else set()
    first = {"first_tau", "seed"} if settings.get("init", "residual") == "residual" else set()
    assert names == {"A", "B", "kept", "tau", "age"} | extra | first


def test_a_state_goes_on_from_its_own_seed():
    torch.manual_seed(0)
    base = TwoLayers()
    model, other = trained(snella(copy.deepcopy(base), seed=1)), snella(copy.deepcopy(base), seed=2)
    x = torch.randn(5, 17)
    other(x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_rounded_file_loads(tmp_path, low_cpu_mem_usage):
    torch.manual_seed(0)
    base = TwoLayers()
    model = snella(copy.deepcopy(base), save_dtype="bfloat16", kernel="mixed").eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    x = torch.randn(5, 17)
    torch.testing.assert_close(loaded(x), model(x), rtol=0.05, atol=0.05 * model(x).abs().max().item())
    assert states(loaded)["first"].A.dtype == torch.float32


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop("base_model.model.first.sparse_peft_snella_adapter.kept"), "no kept for layer first"),
        (lambda t: t["base_model.model.first.sparse_peft_snella_adapter.kept"].fill_(-3), "layer first: kept=-3"),
        (
            lambda t: t.update({"base_model.model.first.sparse_peft_snella_adapter.A": torch.zeros(2, 17, 3)}),
            r"layer first: A is.*\(2, 17, 3\).*\(2, 17, 2\)",
        ),
        (
            lambda t: t["base_model.model.second.sparse_peft_snella_adapter.B"].fill_(float("nan")),
            r"layer second \(B\).*20 of 20",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    snella().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(snella(), tensors)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("settings", [{}, {"threshold": "hard_ste", "sparsity": 0.9}])
def test_export_as_a_plain_sparse_delta(tmp_path, settings, conv1d):
    torch.manual_seed(0)
    base = TwoLayers(conv1d=conv1d)
    model = trained(snella(copy.deepcopy(base), **settings)).eval()
    config = save_as_sparse(model, tmp_path)
    assert config.num_entries == {name: state.entries for name, state in states(model).items()}
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert isinstance(loaded.peft_config["default"], SparseConfig)
    x = torch.randn(5, 17)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_export_takes_along_what_trains_whole(tmp_path):
    base = nn.Sequential(TwoLayers(), nn.Linear(5, 3))
    model = snella(copy.deepcopy(base), target_modules=["first"], modules_to_save=["1"]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    save_as_sparse(model, tmp_path)
    x = torch.randn(2, 17)
    torch.testing.assert_close(PeftModel.from_pretrained(base, str(tmp_path))(x), model(x), rtol=1e-5, atol=1e-5)


def test_export_of_a_convolution_and_of_nothing(tmp_path):
    base = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    model = snella(copy.deepcopy(base), target_modules=["0", "2"]).eval()
    save_as_sparse(model, tmp_path)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(PeftModel.from_pretrained(base, str(tmp_path))(x), model(x), rtol=1e-4, atol=1e-4)
    for state in states(model).values():
        state.keep(0)
    with pytest.raises(ValueError, match="keeps any entry"):
        to_sparse(model)
    with pytest.raises(ValueError, match="layer first: the delta has no sparse form because it has low-rank factors"):
        to_sparse(get_peft_model(TwoLayers(), SoRAConfig(r=2, target_modules=NAMES)))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"r": 3}, ValueError, "r=3.*multiple of 2"),
        ({"r": 0}, ValueError, "r=0.*at least 2"),
        ({"kernel": "rbf"}, ValueError, "kernel='rbf'.*'distance'"),
        ({"threshold": "hard"}, ValueError, "threshold='hard'.*'hard_ste'"),
        ({"init": "zeros"}, ValueError, "init='zeros'.*'residual'"),
        ({"init": "symmetric"}, ValueError, "init='symmetric'.*'soft'.*'hard_ste'"),
        ({"sparsity": 1.5}, ValueError, "sparsity=1.5.*share"),
        ({"target_sparsity": 0.2, "sparsity": 0.4}, ValueError, "target_sparsity=0.2 below sparsity=0.4"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
        ({"tau_interval": 0}, ValueError, "tau_interval=0"),
        ({"beta1": 1.0}, ValueError, "beta1=1.0"),
        ({"allocate_stop": 1.5}, ValueError, "allocate_stop=1.5.*share"),
        ({"seed": "a"}, TypeError, "seed='a'"),
    ],
)
def test_errors_name_the_field(fields, error, message):
    with pytest.raises(error, match=message):
        SnellaConfig(**fields)


def test_grouped_convolutions_are_refused():
    with pytest.raises(TypeError, match=r"Target module 0.*2 groups"):
        snella(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), target_modules=["0"])


def test_defaults_and_the_papers_settings():
    assert SnellaConfig().sparsity == 0.5 and SnellaConfig(target_sparsity=0.9).sparsity == 0.0
    paper = SnellaConfig.paper(target_sparsity=0.3)
    assert (paper.kernel, paper.threshold, paper.init, paper.target_sparsity) == (
        "mixed",
        "reference",
        "reference",
        0.3,
    )
