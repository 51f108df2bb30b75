"""Adapters' folders composed without a model, against dense float64 sums and the live model's method."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from sparse_peft import S2FTConfig, SaRAConfig, SLTrainConfig, SoRAConfig, SparseConfig
from sparse_peft.adapters import compose
from sparse_peft.adapters.offline_adapter import read_stored
from tests.helpers.trained_adapters import METHODS, SPARSE, deltas, loaded, saved, three, weighted_sum

WEIGHTS = [0.7, -0.4, 1.3]


def three_folders(tmp_path, method):
    folders, models = [], []
    for n in range(3):
        targets = {} if n < 2 else {"target_modules": ["second", "third"]}
        folder, model = saved(tmp_path / str(n), METHODS[method](n), n, **targets)
        folders.append(folder)
        models.append(model)
    return folders, models


@pytest.mark.parametrize("method", METHODS)
def test_the_weighted_sum_loads_as_any_adapter(tmp_path, method):
    folders, models = three_folders(tmp_path, method)
    config = compose(folders, tmp_path / "new", weights=WEIGHTS)
    assert type(config) is type(METHODS[method](0)) and config.target_modules == {"first", "second", "third"}
    model = loaded(tmp_path / "new")
    found, expected = deltas(model), weighted_sum([deltas(m) for m in models], WEIGHTS)
    assert set(found) == set(expected)
    for layer, delta in expected.items():
        torch.testing.assert_close(found[layer], delta, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    card = (tmp_path / "new" / "README.md").read_text()
    assert "0.7 x `0`, -0.4 x `1`, 1.3 x `2`" in card and "import sparse_peft" in card


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_files_and_live_models_are_combined_alike(tmp_path, method, kind):
    folders, _ = three_folders(tmp_path, method)
    options = {} if kind == "linear" else {"density": 0.5, "seed": 3}
    compose(folders, tmp_path / "new", weights=WEIGHTS, combination_type=kind, **options)
    model = loaded(folders[0])
    for number in (1, 2):
        model.load_adapter(folders[number], f"n{number}")
    model.add_weighted_adapter(["default", "n1", "n2"], WEIGHTS, "new", kind, **options)
    found = deltas(loaded(tmp_path / "new"))
    for layer, delta in deltas(model, "new").items():
        assert torch.equal(found[layer], delta)


def test_disjoint_supports_are_undone_exactly_and_the_order_is_no_matter(tmp_path):
    """LT-SFT: composition is commutative, and exactly reversible on disjoint supports (spec 3.1, sft.md 2h.5)."""
    first, _ = saved(tmp_path / "a", SparseConfig(density=0.3, selection="magnitude"))
    second, _ = saved(tmp_path / "b", SparseConfig(density=0.3, selection="magnitude_smallest"), 1)
    compose([first, second], tmp_path / "ab")
    compose([second, first], tmp_path / "ba")
    compose([tmp_path / "ab", second], tmp_path / "back", weights=[1, -1])
    one, other, back = (deltas(loaded(tmp_path / name)) for name in ("ab", "ba", "back"))
    for layer, delta in deltas(loaded(first)).items():
        assert torch.equal(one[layer], other[layer]) and torch.equal(back[layer], delta)


def test_different_methods_with_sparse_deltas_make_a_sparse_delta(tmp_path):
    configs = [SparseConfig(density=0.2), SaRAConfig(density=0.3), S2FTConfig(k=2)]
    made = [saved(tmp_path / str(n), config, n) for n, config in enumerate(configs)]
    folders, models = [folder for folder, _ in made], [model for _, model in made]
    config = compose(folders, tmp_path / "new", weights=WEIGHTS)
    assert type(config) is SparseConfig
    found = deltas(loaded(tmp_path / "new"))
    for layer, delta in weighted_sum([deltas(m) for m in models], WEIGHTS).items():
        torch.testing.assert_close(found[layer], delta, rtol=1e-6, atol=1e-6)


def test_rows_here_and_columns_there_make_a_sparse_delta(tmp_path):
    made = [saved(tmp_path / side, S2FTConfig(k=2, side=side)) for side in ("in", "out")]
    config = compose([folder for folder, _ in made], tmp_path / "new")
    assert type(config) is SparseConfig
    found = deltas(loaded(tmp_path / "new"))
    for layer, delta in weighted_sum([deltas(m) for _, m in made], [1, 1]).items():
        torch.testing.assert_close(found[layer], delta, rtol=1e-6, atol=1e-6)


CONVOLUTIONS = [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 2))]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=["1d", "2d"])
@pytest.mark.parametrize("config", [
    lambda n: SparseConfig(density=0.3, seed=n), lambda n: S2FTConfig(k=2, side="in", seed=n),
    lambda n: S2FTConfig(k=2, side="out", seed=n), lambda n: SoRAConfig(r=2 + n),
], ids=["sparse", "in", "out", "sora"])  # fmt: skip
def test_convolutions(tmp_path, conv, config):
    def base():
        torch.manual_seed(1)
        return nn.ModuleDict({"c": type(conv)(4, 6, conv.kernel_size)})

    made = [saved(tmp_path / str(n), config(n), n, base=base, target_modules=["c"]) for n in (0, 1)]
    compose([folder for folder, _ in made], tmp_path / "new", weights=[0.5, 2])
    expected = weighted_sum([deltas(m) for _, m in made], [0.5, 2])
    torch.testing.assert_close(deltas(loaded(tmp_path / "new", base))["c"], expected["c"], rtol=1e-5, atol=1e-5)


def test_modules_saved_whole_come_from_the_adapter_that_has_them(tmp_path):
    task, model = saved(
        tmp_path / "task", SparseConfig(density=0.2), target_modules=["first"], modules_to_save=["third"]
    )
    third = model.base_model.model.third.modules_to_save["default"].weight
    third.data.normal_()
    model.save_pretrained(task)
    language, _ = saved(tmp_path / "language", SparseConfig(density=0.2, seed=1), 1, target_modules=["first"])
    config = compose([task, language], tmp_path / "new")
    assert config.modules_to_save == ["third"]
    found = loaded(tmp_path / "new")
    assert torch.equal(found.base_model.model.third.modules_to_save["default"].weight, third)
    compose([task, task], tmp_path / "twice")  # equal ones are one
    other = loaded(task)
    other.base_model.model.third.modules_to_save["default"].weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"third\.weight: .*task and .*other both have one that was trained whole"):
        compose([task, tmp_path / "other"], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_biases_are_stored_too(tmp_path):
    folder, model = saved(tmp_path / "a", SparseConfig(density=0.2, bias="sparse_peft_delta_only"))
    bias = model.base_model.model.first.base_layer.bias
    bias.data.normal_()
    model.save_pretrained(folder)
    plain, _ = saved(tmp_path / "b", SparseConfig(density=0.2))
    assert compose([folder, plain], tmp_path / "new").bias == "sparse_peft_delta_only"
    assert torch.equal(loaded(tmp_path / "new").base_model.model.first.base_layer.bias, bias)


def test_adapters_of_other_bases(tmp_path):
    for name, base in (("a", "org/one"), ("b", "org/two")):
        folder, _ = saved(tmp_path / name, SparseConfig(density=0.2))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ValueError, match=r"made for 'org/one' and .* for 'org/two'.*ignore_base_names=True"):
        compose(folders, tmp_path / "new")
    assert compose(folders, tmp_path / "new", ignore_base_names=True).base_model_name_or_path == "org/one"
    saved(tmp_path / "c", SparseConfig(density=0.2), base=lambda: nn.ModuleDict({"first": nn.Linear(8, 11)}),
          target_modules=["first"])  # fmt: skip
    with pytest.raises(ValueError, match=r"layer first: .*\[11, 7\] and .*\[11, 8\]; they belong to different"):
        compose([tmp_path / "a", tmp_path / "c"], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_what_does_not_go_together(tmp_path):
    sparse, _ = saved(tmp_path / "a", SparseConfig(density=0.2))
    sora, _ = saved(tmp_path / "b", SoRAConfig(r=2))
    with pytest.raises(ValueError, match="adapters of SoRAConfig, SparseConfig: only sparse deltas"):
        compose([sparse, sora], tmp_path / "new")
    with pytest.raises(
        ValueError, match=r"layer .*combination_type='ties'|combination_type='ties': SoRAModel has linear"
    ):
        compose([sora, sora], tmp_path / "new", combination_type="ties", density=0.5)
    with pytest.raises(ValueError, match="a list of adapters' folders"):
        compose([], tmp_path / "new")
    get_peft_model(three(), LoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"a sparse adapter is expected, this is LORA; .*'cat', which is exact"):
        compose([sparse, tmp_path / "lora"], tmp_path / "new")
    config = SLTrainConfig(r=2, mode="pretrain", density=0.2, target_modules=["first"])
    get_peft_model(nn.ModuleDict({"first": nn.Linear(5, 6)}), config).save_pretrained(tmp_path / "pretrain")
    with pytest.raises(ValueError, match="this SLTrainConfig adapter is the weights themselves"):
        compose([tmp_path / "pretrain"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", METHODS)
def test_reading_needs_no_memory_for_weights(tmp_path, method):
    """A stored adapter is what the model had, of which nothing but names and shapes is made again."""
    folder, model = saved(tmp_path / "a", METHODS[method](0))
    stored = read_stored(folder)
    for layer in model.modules():
        if hasattr(layer, "deltas"):
            for name, parameter in layer.deltas["default"].named_parameters():
                assert torch.equal(stored.states[layer.name].get_parameter(name), parameter)
    assert load_file(folder / "adapter_model.safetensors").keys()
