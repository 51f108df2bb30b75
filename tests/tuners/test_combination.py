"""``add_weighted_adapter`` of live models against dense float64 sums, TIES and pruning."""

import copy
import warnings

import peft
import pytest
import torch
from packaging.version import Version
from peft.utils import merge_utils
from torch import nn

from sparse_peft import S2FTConfig, SaRAConfig, SLTrainConfig, SoRAConfig, SparseConfig
from sparse_peft.ops import Combination, combine_factors, combine_on_supports
from sparse_peft.support import Support
from tests.helpers.trained_adapters import (
    FACTORS,
    METHODS,
    SPARSE,
    deltas,
    elected,
    kept_largest,
    loaded,
    support_masks,
    three,
    trained,
    weighted_sum,
)

WEIGHTS = [0.7, -0.4, 1.3]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def three_adapters(method, **fields):
    """A model with adapters "one", "two" and "three"; the last has two layers only."""
    model = trained(METHODS[method](0), **fields)
    model.add_adapter("two", _with(METHODS[method](1), **fields))
    model.add_adapter("three", _with(METHODS[method](2), **{**fields, "target_modules": ["second", "third"]}))
    return model


def _with(config, **fields):
    for name, value in {"init_weights": False, "target_modules": ["first", "second", "third"], **fields}.items():
        setattr(config, name, value)
    return config


NAMES = ["default", "two", "three"]


@pytest.mark.parametrize("method", METHODS)
def test_linear_is_the_weighted_sum_of_the_deltas(method, tmp_path):
    model = three_adapters(method)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum")
    expected = weighted_sum([deltas(model, name) for name in NAMES], WEIGHTS)
    found = deltas(model, "sum")
    assert set(found) == set(expected) == {"first", "second", "third"}
    for layer, delta in expected.items():
        torch.testing.assert_close(found[layer], delta, rtol=1e-5, atol=1e-5)
    # an adapter like any other: not active, trainable once it is, saved, loaded, combined again
    assert model.active_adapters == ["default"]
    before = three()
    x = torch.randn(2, 3, 7)
    model.set_adapter("sum")
    reference = copy.deepcopy(before).double()
    for layer, delta in expected.items():
        reference.get_submodule(layer).weight.data += delta
    torch.testing.assert_close(model(x).double(), reference(x.double()), rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for name, p in model.named_parameters() if ".sum." in name)
    model(x).sum().backward()
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(loaded(tmp_path / "sum")(x), model(x))
    model.add_weighted_adapter(["sum", "default"], [1.0, -WEIGHTS[0]], "less")
    for layer, delta in deltas(model, "less").items():
        rest = expected[layer] - WEIGHTS[0] * deltas(model, "default")[layer]
        torch.testing.assert_close(delta, rest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_pruned_combinations_against_dense_references(method, kind, sign):
    model = three_adapters(method)
    model.add_weighted_adapter(NAMES, WEIGHTS, "new", kind, density=0.4, majority_sign_method=sign)
    dense = {name: deltas(model, name) for name in NAMES}
    masks = {name: support_masks(model, name) for name in NAMES}
    for layer, found in deltas(model, "new").items():
        parts = [
            kept_largest(dense[name][layer], masks[name][layer], 0.4) if layer in dense[name] else None
            for name in NAMES
        ]
        parts = [torch.zeros_like(found) if part is None else part for part in parts]
        expected = (
            elected(parts, WEIGHTS, sign)
            if kind == "ties"
            else sum(w * part for w, part in zip(WEIGHTS, parts, strict=True))
        )
        assert bool((expected != 0).any())
        torch.testing.assert_close(found, expected, **CLOSE)
        if method != "s2ft":  # what nothing is left of is not stored
            assert torch.equal(support_masks(model, "new")[layer], expected != 0)


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_on_full_supports_it_is_what_peft_computes_of_dense_tensors(kind, monkeypatch):
    if kind.startswith("dare") and Version(peft.__version__) < Version("0.19.1"):
        pytest.skip("PEFT 0.18 does not scale what DARE keeps")
    # dropped at random: by a mask that is no matter of chance
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.arange(p.numel()).view(p.shape) % 3 != 1).to(p))
    shape = (6, 7)
    values = [torch.randn(shape) for _ in WEIGHTS]
    full = Support(shape, torch.arange(42))
    support, found = combine_on_supports([full] * 3, [v.flatten() for v in values], WEIGHTS, Combination(kind, 0.45))
    dense = torch.zeros(42).index_copy_(0, support.indices.long(), found).view(shape)
    options = {"density": 0.45}
    expected = getattr(merge_utils, kind)([v.double() for v in values], torch.tensor(WEIGHTS).double(), **options)
    torch.testing.assert_close(dense.double(), expected, **CLOSE)


def test_dare_keeps_the_expectation_and_depends_on_its_seed_alone():
    shape, density = (40, 50), 0.3
    support = Support.random(shape, 600, seed=0, name="x")
    values = torch.rand(600) + 1
    results = []
    for seed in range(200):
        state = torch.random.get_rng_state()
        found_support, found = combine_on_supports(
            [support], [values], [2.0], Combination("dare_linear", density, seed=seed), "layer"
        )
        assert torch.equal(torch.random.get_rng_state(), state)
        dense = torch.zeros(2000).index_copy_(0, found_support.indices.long(), found)[support.indices.long()]
        kept = dense != 0
        torch.testing.assert_close(dense[kept], 2 * values[kept] / density, rtol=1e-6, atol=0)
        results.append(dense)
    stacked = torch.stack(results)
    assert abs(float((stacked != 0).double().mean()) - density) < 0.01
    torch.testing.assert_close(stacked.mean(0).mean(), 2 * values.mean(), rtol=0.02, atol=0)
    torch.rand(3)
    again = combine_on_supports([support], [values], [2.0], Combination("dare_linear", density, seed=7), "layer")[1]
    other = combine_on_supports([support], [values], [2.0], Combination("dare_linear", density, seed=7), "other")[1]
    assert torch.equal(again, results[7][results[7] != 0]) and not torch.equal(again, other)


def test_pruning_never_leaves_a_layer_without_entries():
    support = Support((3, 4), torch.tensor([2, 5]))
    found, values = combine_on_supports([support], [torch.ones(2)], [1.0], Combination("magnitude_prune", 0.1))
    assert found.indices.tolist() == [2] and values.tolist() == [0.0]


def test_density_one_prunes_nothing_and_warns_of_nothing():
    support = Support((3, 4), torch.tensor([2, 5]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, values = combine_on_supports(
            [support] * 2, [torch.ones(2), torch.full((2,), 3.0)], [0.5, 0.5], Combination("dare_ties", 1.0)
        )
    assert found == support and values.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("method", FACTORS)
def test_svd_is_the_best_approximation_of_the_low_rank_part(method):
    model = three_adapters(method)
    model.add_weighted_adapter(NAMES, WEIGHTS, "svd", "svd", svd_rank=2)
    for layer in model.modules():
        if not hasattr(layer, "deltas"):
            continue
        parts = [layer.low_rank_weight(name).detach().double() for name in NAMES if name in layer.deltas]
        weights = [w for w, name in zip(WEIGHTS, NAMES, strict=True) if name in layer.deltas]
        total = sum(w * part for w, part in zip(weights, parts, strict=True))
        u, s, vh = torch.linalg.svd(total)
        best = u[:, :2] * s[:2] @ vh[:2]
        torch.testing.assert_close(layer.low_rank_weight("svd").detach().double(), best, rtol=1e-4, atol=1e-4)


def test_factors_are_not_averaged_one_by_one():
    torch.manual_seed(0)
    pairs = [(torch.randn(2, 5), torch.randn(4, 2)) for _ in range(2)]
    down, up = combine_factors(pairs, [0.5, 0.5], Combination("linear"))
    exact = sum(b.double() @ a.double() for a, b in pairs) / 2
    torch.testing.assert_close(up.double() @ down.double(), exact, **CLOSE)
    wrong = (pairs[0][1] + pairs[1][1]) / 2 @ ((pairs[0][0] + pairs[1][0]) / 2)
    assert not torch.allclose(wrong.double(), exact, atol=0.1)


@pytest.mark.parametrize("config", [SoRAConfig, SLTrainConfig])
def test_ranks_that_add_up_to_more_than_a_layer_has_are_refused_before_they_are_written(config):
    model = trained(config(r=40))
    model.add_adapter("two", _with(config(r=40)))
    with pytest.raises(ValueError, match=r"add up to 80, more than the 64 .* 'svd' with svd_rank=7, which is exact"):
        model.add_weighted_adapter(["default", "two"], [1.0, -2.0], "sum")
    assert set(model.peft_config) == {"default", "two"}
    model.add_weighted_adapter(["default", "two"], [1.0, -2.0], "sum", "svd", svd_rank=11)
    expected = weighted_sum([deltas(model, "default"), deltas(model, "two")], [1.0, -2.0])
    for layer, delta in deltas(model, "sum").items():
        torch.testing.assert_close(delta, expected[layer], rtol=1e-4, atol=1e-4)


def test_sora_keeps_its_gates_and_drops_ranks_that_are_shut():
    model = three_adapters("sora")
    layer = model.base_model.model.first
    layer.deltas["default"].gate.data[0] = 0
    model.add_weighted_adapter(["default", "two"], [1.0, 2.0], "sum")
    state = layer.deltas["sum"]
    assert state.rank == 1 + 3 and state.scale == 1.0
    assert torch.equal(state.gate, torch.cat([layer.deltas["default"].gate[1:], layer.deltas["two"].gate]))
    config = model.peft_config["sum"]
    assert config.ranks["first"] == 4 and config.rank_pattern == {} and config.alpha == config.r


@pytest.mark.parametrize("method", METHODS)
def test_combinations_that_a_method_lacks_say_what_it_has(method):
    model = three_adapters(method)
    before = set(model.peft_config), {name for name, _ in model.named_parameters()}
    wrong, has = ("svd", "ties, dare_linear") if method in SPARSE else ("ties", "linear, cat, svd")
    density = 0.5 if wrong == "ties" else None
    with pytest.raises(ValueError, match=f"combination_type='{wrong}'.*{has}"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "new", wrong, density=density)
    assert before == (set(model.peft_config), {name for name, _ in model.named_parameters()})


@pytest.mark.parametrize("arguments, message", [
    ((["default", "other"], [1.0, 1.0], "new"), "no adapter 'other'; it has 'default', 'two', 'three'"),
    (("default", [1.0], "new"), "a list of names"),
    (([], [], "new"), "a list of names"),
    ((NAMES, [1.0], "new"), "one finite number for each of 3 adapters"),
    ((NAMES, [1.0, 1.0, float("nan")], "new"), "one finite number"),
    ((NAMES, WEIGHTS, "two"), "has an adapter of this name"),
    ((NAMES, WEIGHTS, "new", "sum"), "combination_type='sum': one of 'linear', 'ties'"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    model = three_adapters("sparse")
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == set(NAMES)


@pytest.mark.parametrize("fields, message", [
    ({"combination_type": "ties"}, "density=None: a density"),
    ({"combination_type": "linear", "density": 0.5}, "a density.*exactly with ties"),
    ({"combination_type": "ties", "density": 0.0}, r"density=0.0: a share in \(0, 1\]"),
    ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, "one of 'total', 'frequency'"),
    ({"combination_type": "svd", "svd_rank": 0}, "svd_rank=0: an int of at least 1"),
    ({"svd_rank": 2}, "with 'svd' only"),
])  # fmt: skip
def test_bad_combinations(fields, message):
    with pytest.raises(ValueError, match=message):
        Combination(**fields)


def test_adapters_that_train_more_than_deltas_are_referred_to_compose():
    model = trained(SparseConfig(density=0.2), target_modules=["first"], modules_to_save=["third"])
    with pytest.raises(ValueError, match=r"modules_to_save.*sparse_peft\.adapters\.compose"):
        model.add_weighted_adapter(["default"], [1.0], "new")


def test_rows_here_and_columns_there_are_no_s2ft():
    model = trained(S2FTConfig(k=2, side="in"))
    model.add_adapter("two", _with(S2FTConfig(k=2, side="out")))
    with pytest.raises(ValueError, match="layer first: one adapter trains its rows and another its columns"):
        model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "new")


def test_the_new_config_keeps_what_holds():
    model = trained(SparseConfig(density=0.2, selection="rigl", allocation="erk"))
    model.add_weighted_adapter(["default"], [1.0], "new")
    config = model.peft_config["new"]
    assert config.selection == "rigl" and config.density is None and config.allocation == "numel"
    assert (
        config.num_params == sum(config.num_entries.values()) == sum(model.peft_config["default"].num_entries.values())
    )
    model = trained(SaRAConfig(threshold=0.05))
    model.add_weighted_adapter(["default"], [2.0], "new")
    assert model.peft_config["new"].threshold is None
    model = trained(SLTrainConfig(r=2, density=0.1, trainable_scale=True))
    model.add_weighted_adapter(["default"], [2.0], "new")
    assert not model.peft_config["new"].trainable_scale
    for layer, delta in deltas(model, "new").items():
        torch.testing.assert_close(delta, 2 * deltas(model)[layer], **CLOSE)


def test_half_precision_bases_and_convolutions():
    model = trained(SoRAConfig(r=2), base=lambda: nn.ModuleDict({"c": nn.Conv2d(3, 4, 3)}), target_modules=["c"])
    model.add_adapter("two", _with(SoRAConfig(r=3), target_modules=["c"]))
    model.add_weighted_adapter(["default", "two"], [1.0, 2.0], "sum")
    expected = weighted_sum([deltas(model), deltas(model, "two")], [1.0, 2.0])
    torch.testing.assert_close(deltas(model, "sum")["c"], expected["c"], rtol=1e-5, atol=1e-5)
    model = trained(SparseConfig(density=0.3), base=lambda: three(torch.bfloat16))
    model.add_weighted_adapter(["default"], [0.5], "scaled")
    for layer, delta in deltas(model, "scaled").items():
        torch.testing.assert_close(delta, deltas(model)[layer] / 2, rtol=0, atol=0)
    model.set_adapter("scaled")
    assert model(torch.randn(2, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("config_cls", [SparseConfig, S2FTConfig, SLTrainConfig])
def test_quantised_bases(config_cls):
    build = pytest.importorskip("tests.helpers.quantized").build
    names = {"target_modules": ["first", "second"]}
    model = trained(config_cls(), base=lambda: build("4bit"), **names)
    model.add_adapter("two", _with(config_cls(seed=1), **names))
    model.add_weighted_adapter(["default", "two"], [0.5, -2.0], "sum")
    expected = weighted_sum([deltas(model), deltas(model, "two")], [0.5, -2.0])
    for layer, delta in deltas(model, "sum").items():
        torch.testing.assert_close(delta, expected[layer], rtol=1e-5, atol=1e-5)
    model.set_adapter("sum")
    assert model(torch.randn(3, 128)).isfinite().all()
