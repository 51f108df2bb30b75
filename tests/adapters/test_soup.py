"""Soups against the mean of the merged weights in float64."""

import pytest
import torch
from safetensors.torch import load_file

from sparse_peft import SLTrainConfig, SoRAConfig, SparseConfig
from sparse_peft.adapters import compose, greedy_soup, soup
from sparse_peft.tuners.traversal import tuner_layers
from tests.helpers.trained_adapters import SPARSE, deltas, loaded, saved, support_masks, three, weighted_sum

FILE = "adapter_model.safetensors"


def one_support(tmp_path, method="sparse", count=3, **fields):
    """Adapters of one support that differ in their values."""
    fixed = {"density": 0.3, "seed": 0} if method == "sparse" else {"k": 2, "seed": 0} if method == "s2ft" else {}
    fixed = {**fixed, "density": 0.3} if method == "sara" else fixed
    return [saved(tmp_path / str(n), SPARSE[method](0, **fixed), n, **fields) for n in range(count)]


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 0.3]])
def test_a_soup_is_the_mean_of_the_merged_weights(tmp_path, method, weights):
    made = one_support(tmp_path, method)
    result = soup([folder for folder, _ in made], tmp_path / "soup", weights=weights)
    parts = weights or [1 / 3] * 3
    merged = [model.merge_and_unload() for _, model in made]
    mean = {
        name: sum(w * dict(m.named_parameters())[name].double() for w, m in zip(parts, merged, strict=True))
        for name, _ in three().named_parameters()
    }
    found = dict(loaded(tmp_path / "soup").merge_and_unload().named_parameters())
    for name, expected in mean.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)
    member = load_file(made[0][0] / FILE)
    mixed = load_file(tmp_path / "soup" / FILE)
    assert {k: v.shape for k, v in member.items()} == {k: v.shape for k, v in mixed.items()}  # as many entries
    assert result.entries == sum(v.numel() for k, v in member.items() if k.endswith(".values"))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("method", SPARSE)
def test_the_average_of_deltas_is_the_delta_of_the_average_bit_for_bit(tmp_path, method, count):
    made = one_support(tmp_path, method, count)
    soup([folder for folder, _ in made], tmp_path / "soup")
    found = tuner_layers(loaded(tmp_path / "soup"))
    members = [tuner_layers(model) for _, model in made]
    for layer, *parts in zip(found, *members, strict=True):
        deltas = torch.stack([part.get_delta_weight("default").double() for part in parts])
        assert torch.equal(layer.get_delta_weight("default"), deltas.mean(0).float())


def test_the_mean_of_equal_adapters_is_that_adapter_and_the_order_is_no_matter(tmp_path):
    made = [folder for folder, _ in one_support(tmp_path)]
    soup([made[0]] * 3, tmp_path / "same")
    for name, tensor in load_file(made[0] / FILE).items():
        assert torch.equal(load_file(tmp_path / "same" / FILE)[name], tensor)
    soup(made, tmp_path / "one")
    soup(made[::-1], tmp_path / "other")
    for name, tensor in load_file(tmp_path / "one" / FILE).items():
        assert torch.equal(load_file(tmp_path / "other" / FILE)[name], tensor)


def test_values_stored_in_bfloat16_are_averaged_in_float32(tmp_path):
    made = [saved(tmp_path / str(n), SparseConfig(density=0.3, save_dtype="bfloat16"), n)[0] for n in range(2)]
    soup(made, tmp_path / "soup")
    parts = [load_file(folder / FILE) for folder in made]
    for name, tensor in load_file(tmp_path / "soup" / FILE).items():
        if name.endswith("values"):
            assert parts[0][name].dtype == torch.bfloat16 and tensor.dtype == torch.float32
            assert torch.equal(tensor, (parts[0][name].double() + parts[1][name].double()).div(2).float())


def test_distances_and_cosines(tmp_path):
    made = one_support(tmp_path)
    result = soup([folder for folder, _ in made], tmp_path / "soup")
    flat = [torch.cat([d.flatten() for d in deltas(model).values()]) for _, model in made]
    mean = sum(flat) / 3
    for i, one in enumerate(flat):
        assert result.from_average[i] == pytest.approx(float((one - mean).norm()), rel=1e-6)
        for j, other in enumerate(flat):
            assert result.distances[i][j] == pytest.approx(float((one - other).norm()), abs=1e-5)
            assert result.cosines[i][j] == pytest.approx(float(one @ other / one.norm() / other.norm()), abs=1e-9)


@pytest.mark.parametrize("method", ["sparse", "s2ft"])
def test_other_supports(tmp_path, method):
    made = [saved(tmp_path / str(n), SPARSE[method](n, **({} if method == "s2ft" else {"density": 0.6})), n)
            for n in range(2)]  # fmt: skip
    folders, models = [folder for folder, _ in made], [model for _, model in made]
    with pytest.raises(ValueError, match=r"layer first: the adapters train different entries.*on_mismatch='union'"):
        soup(folders, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    mean = weighted_sum([deltas(m) for m in models], [0.5, 0.5])
    union = soup(folders, tmp_path / "union", on_mismatch="union")
    for layer, delta in deltas(loaded(tmp_path / "union")).items():
        torch.testing.assert_close(delta, mean[layer], rtol=1e-6, atol=1e-6)
    common = soup(folders, tmp_path / "common", on_mismatch="intersection")
    assert common.entries < union.entries
    found = deltas(loaded(tmp_path / "common"))
    masks = [support_masks(m) for m in models]
    assert common.entries == sum(int((masks[0][layer] & masks[1][layer]).sum()) for layer in mean)
    for layer, delta in found.items():
        expected = mean[layer] * (masks[0][layer] & masks[1][layer])
        torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-6)


def test_modules_saved_whole_are_averaged(tmp_path):
    fields = {"target_modules": ["first"], "modules_to_save": ["third"]}
    made = one_support(tmp_path, count=2, **fields)
    for n, (folder, model) in enumerate(made):
        model.base_model.model.third.modules_to_save["default"].weight.data.fill_(1.0 + n)
        model.save_pretrained(folder)
    soup([folder for folder, _ in made], tmp_path / "soup", weights=[0.25, 0.75])
    third = loaded(tmp_path / "soup").base_model.model.third.modules_to_save["default"].weight
    assert torch.equal(third, torch.full_like(third, 1.75))
    plain, _ = saved(tmp_path / "plain", SparseConfig(density=0.3), target_modules=["first"])
    with pytest.raises(ValueError, match=r"third\.weight: .* do not both have it"):
        soup([made[0][0], plain], tmp_path / "bad")


@pytest.mark.parametrize("config", [SoRAConfig(r=2), SLTrainConfig(r=2, density=0.2)], ids=["sora", "sltrain"])
def test_factors_are_refused_and_the_exact_way_is_named(tmp_path, config):
    folder, model = saved(tmp_path / "a", config)
    with pytest.raises(ValueError, match=r"mean\(B\) mean\(A\).*combination_type='cat', weights=\[1/k\]"):
        soup([folder, folder], tmp_path / "soup")
    compose([folder, folder], tmp_path / "cat", weights=[0.5, 0.5], combination_type="cat")
    for layer, delta in deltas(loaded(tmp_path / "cat")).items():
        torch.testing.assert_close(delta, deltas(model)[layer], rtol=1e-5, atol=1e-6)


def test_bad_arguments(tmp_path):
    made = [folder for folder, _ in one_support(tmp_path, count=2)]
    with pytest.raises(ValueError, match="their sum is 2, an average's is 1"):
        soup(made, tmp_path / "bad", weights=[1, 1])
    with pytest.raises(ValueError, match="on_mismatch='x': one of error, union, intersection"):
        soup(made, tmp_path / "bad", on_mismatch="x")
    other, _ = saved(tmp_path / "other", SparseConfig(density=0.3), target_modules=["first"])
    with pytest.raises(ValueError, match=r"layer second: .* do not both have it"):
        soup([made[0], other], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_greedy_soup_takes_what_does_not_make_it_worse(tmp_path):
    made = one_support(tmp_path, count=4)
    target = weighted_sum([deltas(made[1][1]), deltas(made[3][1])], [0.5, 0.5])

    def score(folder):
        found = deltas(loaded(folder))
        return -sum(float((found[layer] - delta).square().sum()) for layer, delta in target.items())

    folders = [folder for folder, _ in made]
    result = greedy_soup(folders, tmp_path / "soup", score)
    assert sorted(result.folders) == sorted(str(folders[n]) for n in (1, 3))
    assert score(tmp_path / "soup") == pytest.approx(0, abs=1e-8)
    assert score(tmp_path / "soup") >= max(score(folder) for folder in folders)
    alone = greedy_soup(folders, tmp_path / "alone", lambda folder: float(folder == folders[2]))
    assert alone.folders == (str(folders[2]),)
