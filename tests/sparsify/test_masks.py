"""Masks: bits, files that come back equal, and files that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_peft.sparsify import LayerMask, Masks, prune, restore

FORMAT = "sparse_peft_masks"


def example(cols=13):
    generator = torch.Generator().manual_seed(0)
    masks = {f"layers.{i}": torch.rand(5, cols + i, generator=generator) < 0.4 for i in range(2)}
    return masks, Masks({name: LayerMask.of(mask) for name, mask in masks.items()}, {"score": "wanda"})


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 64])
def test_files_come_back_equal(tmp_path, cols):
    plain, masks = example(cols)
    path = tmp_path / "masks.safetensors"
    path.write_text("replaced")
    masks.save(path)
    read = Masks.load(path)
    assert list(tmp_path.iterdir()) == [path] and read.about == {"score": "wanda"}
    for name, mask in plain.items():
        assert torch.equal(read.layers[name].to_bool(), mask) and read.layers[name].kept == int(mask.sum())
    assert masks.kept == read.kept == sum(int(mask.sum()) for mask in plain.values())
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == sum(5 * -(-mask.shape[1] // 8) for mask in plain.values())


def test_masks_of_transposed_weights_are_saved(tmp_path):
    mask = (torch.rand(9, 12) < 0.5).t()
    Masks({"c_attn": LayerMask.of(mask)}).save(tmp_path / "masks")
    assert torch.equal(Masks.load(tmp_path / "masks").layers["c_attn"].to_bool(), mask)


def damaged(path, tensors=None, **changes):
    """An example's file with other tensors or another description."""
    _, masks = example()
    masks.save(path)
    stored = load_file(path)
    content = {"format": 1, "about": masks.about, "cols": {"layers.0": 13, "layers.1": 14}, **changes}
    text = changes.get("text", json.dumps(content))
    save_file({**stored, **(tensors or {})}, path, metadata={FORMAT: text})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": "null"}, "no sparse_peft_masks of format 1"),
        ({"text": "{" * 100000}, "is no JSON"),
        ({"format": 2}, "format 1"),
        ({"about": {"score": 3}}, "`about` is not a list of texts"),
        ({"cols": {"layers.0": 13}}, "other layers are described"),
        ({"cols": []}, "`cols` is not the columns"),
        ({"cols": {"layers.0": 13, "layers.1": -1}}, "layer layers.1: -1 columns"),
        ({"cols": {"layers.0": 13, "layers.1": True}}, "layer layers.1: True columns"),
        ({"cols": {"layers.0": 13, "layers.1": 10**30}}, "columns"),
        ({"cols": {"layers.0": 17, "layers.1": 14}}, r"layer layers.0: bits of torch.uint8 and shape \(5, 2\) for 17"),
        ({"cols": {"layers.0": 9, "layers.1": 14}}, "layer layers.0: bits behind column 9"),
        ({"tensors": {"layers.0.mask": torch.zeros(5, 2)}}, "layer layers.0: bits of torch.float32"),
        ({"tensors": {"layers.0.mask": torch.zeros(10, dtype=torch.uint8)}}, "layer layers.0: bits of torch.uint8"),
        ({"tensors": {"other": torch.zeros(1)}}, "other layers are described"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    path = tmp_path / "masks.safetensors"
    damaged(path, **change)
    with pytest.raises(ValueError, match=message):
        Masks.load(path)


def test_what_is_no_file_of_masks_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Masks.load(tmp_path / "none")
    path = tmp_path / "pickle.bin"
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="no valid safetensors file"):
        Masks.load(path)
    example()[1].save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="no valid safetensors file"):
        Masks.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="no sparse_peft_masks of format 1"):
        Masks.load(path)


def test_masks_of_another_model_are_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    masks = prune(model, 0.5, progress=False)
    smaller = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    before = smaller[0].weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"layer 1: a mask for a weight of \(4, 4\), and Sequential has one of \(3, 4\)"
    ):
        masks.apply(smaller)
    assert torch.equal(smaller[0].weight, before)
    with pytest.raises(ValueError, match=r"layer 1: .*has no such weight"):
        masks.apply(nn.Sequential(nn.Linear(8, 4)))


def test_broken_zeros_are_counted():
    model = nn.Sequential(nn.Linear(8, 4))
    masks = prune(model, "2:4", progress=False)
    assert masks.broken(model) == {}
    with torch.no_grad():
        model[0].weight.add_(1)
    assert masks.broken(model) == {"0": 16}


def test_only_what_was_kept_can_be_restored():
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ValueError, match="Sequential has no masks"):
        restore(model)
    prune(model, 0.5, progress=False)
    with pytest.raises(ValueError, match="restorable=True"):
        restore(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_trained_after_pruning_stay_and_the_removed_ones_come_back(dtype):
    model = nn.Sequential(nn.Linear(8, 4)).to(dtype)
    before = model[0].weight.detach().clone()
    mask = prune(model, 0.5, restorable=True, progress=False).layers["0"].to_bool()
    with torch.no_grad():
        model[0].weight[mask] += 1
    restore(model)
    assert torch.equal(model[0].weight[~mask], before[~mask]) and torch.equal(model[0].weight[mask], before[mask] + 1)
