"""RoSA's masks and adapters, against the dense weights that they stand for."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from sparse_peft import SLTrainConfig, select_support
from sparse_peft.adapters import convert_rosa, rosa_masks
from sparse_peft.tuners.base_layer import TunerLayer
from tests.helpers.two_layers import TwoLayers

PREFIX = "base_model.model."
SHAPES = {"first": (33, 17), "second": (5, 33)}


def masks():
    torch.manual_seed(0)
    return {name: torch.rand(shape) < 0.2 for name, shape in SHAPES.items()}


def test_masks_become_an_sltrain_adapters_positions(tmp_path):
    found = masks()
    torch.save({f"{PREFIX}{name}": mask.to(torch.int8) for name, mask in found.items()}, tmp_path / "masks")
    supports = rosa_masks(tmp_path / "masks")
    model = get_peft_model(
        TwoLayers(), select_support(TwoLayers(), SLTrainConfig(selection="given"), supports=supports)
    )
    for layer in (m for m in model.modules() if isinstance(m, TunerLayer)):
        assert torch.equal(layer.support("default").indices.long(), found[layer.name].flatten().nonzero().squeeze(1))


@pytest.mark.parametrize("content, message", [
    ({}, "a dict of the layers' masks"), ([torch.ones(2, 2)], "a dict of the layers' masks"),
    ({"first": torch.ones(3)}, r"layer first: a matrix is expected, this is \(3,\)"),
    ({"first": "x"}, "layer first: a matrix is expected, this is str"),
    ({"first": torch.zeros(2, 2)}, "layer first: its mask has no entry"),
    ({"first": nn.Linear(2, 2)}, "Files like that can run code"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "masks")
    with pytest.raises(ValueError, match=message):
        rosa_masks(tmp_path / "masks")


def adapter(folder, safe, **changes):
    """A folder as peft-rosa writes it, and ``{layer: dense delta}``."""
    torch.manual_seed(1)
    tensors, deltas = {}, {}
    for name, mask in masks().items():
        rows, cols = mask.shape
        down, up = torch.randn(4, cols), torch.randn(rows, 4)
        dense = torch.where(mask, torch.randn(rows, cols), 0)
        parts = {
            "rosa_A.weight": down, "rosa_B.weight": up, "rosa_spa.values": dense[mask],
            "rosa_spa.row_offs": torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int(),
            "rosa_spa.col_idx": mask.nonzero()[:, 1].to(torch.int16),
            "rosa_spa.row_idx": mask.sum(1).argsort(descending=True).to(torch.int16),
        }  # fmt: skip
        tensors.update({f"{PREFIX}{name}.{part}": tensor for part, tensor in parts.items()})
        deltas[name] = 8 / 4 * up.double() @ down.double() + dense.double()
    tensors.update({name: tensor for name, tensor in changes.items() if isinstance(tensor, torch.Tensor)})
    config = {"peft_type": "ROSA", "r": 4, "lora_alpha": 8, "d": 0.2, "target_modules": ["first", "second"]}
    config.update({name: value for name, value in changes.items() if not isinstance(value, torch.Tensor)})
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if safe:
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    return deltas


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_computes_the_same(tmp_path, safe):
    deltas = adapter(tmp_path / "rosa", safe)
    base = TwoLayers()
    config = convert_rosa(tmp_path / "rosa", tmp_path / "new", base=base)
    assert type(config) is SLTrainConfig and (config.r, config.alpha) == (4, 8)
    model = PeftModel.from_pretrained(base, tmp_path / "new")
    for layer in (m for m in model.modules() if isinstance(m, TunerLayer)):
        assert torch.allclose(layer.get_delta_weight("default").double(), deltas[layer.name], atol=1e-5)


@pytest.mark.parametrize("changes, message", [
    ({"peft_type": "LORA"}, "peft_type='LORA'"), ({"use_rslora": True}, "use_rslora=True"),
    ({"r": 5}, "r=5 in the config"),
    ({f"{PREFIX}first.rosa_A.weight": torch.ones(4, 3)}, "layer first: factors"),
    ({f"{PREFIX}first.rosa_spa.values": torch.ones(3)}, "layer first: 3 values do not fit"),
    ({f"{PREFIX}first.rosa_spa.row_offs": torch.arange(34).flip(0).int()}, "layer first: row_offs"),
    ({f"{PREFIX}second.rosa_B.weight": torch.full((5, 4), float("nan"))}, r"second \(B\)"),
    ({f"{PREFIX}third.rosa_B.weight": torch.ones(5, 4)}, "layer third has no rosa_A.weight"),
])  # fmt: skip
def test_damaged_adapters_are_refused_and_nothing_is_written(tmp_path, changes, message):
    adapter(tmp_path / "rosa", True, **changes)
    with pytest.raises(ValueError, match=message):
        convert_rosa(tmp_path / "rosa", tmp_path / "new", base=TwoLayers())
    assert not (tmp_path / "new").exists()


def test_a_mask_after_a_warm_up_is_that_of_the_warm_model(tmp_path):
    """Squared gradients in float64 at the weights that LoRA has moved."""
    torch.manual_seed(0)
    base, x = TwoLayers(), torch.randn(6, 17)
    warm = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    warm = warm.merge_and_unload()
    config = SLTrainConfig(density=0.1, selection="fisher", target_modules=["first"])
    chosen = select_support(warm, config, [x], loss_fn=lambda model, x: model(x).square().sum())
    twin = warm.double()
    twin.first.weight.requires_grad_(True)
    twin(x.double()).square().sum().backward()
    support = chosen.supports["first"]
    best = twin.first.weight.grad.square().flatten().topk(support.nnz).indices.sort().values
    config = SLTrainConfig(selection="given", target_modules=["first"])
    model = get_peft_model(base, select_support(base, config, supports=chosen.supports))
    layer = model.base_model.model.first
    assert torch.equal(layer.support("default").indices.long(), best)
