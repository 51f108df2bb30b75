"""Files without zeros: they come back equal, take the bytes that are stated, and are refused when damaged."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_peft.sparsify import (
    LAYOUTS,
    Channels,
    load_sparse,
    masks_of,
    prune,
    save_sparse,
    sparse_sizes,
    zeros_of,
)
from tests.sparsify.models import gpt2, linear_layers, llama

FORMAT = "sparse_peft_weights"


def bits_of(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def content_bytes(path):
    data = path.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def scrambled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "make, dtype, pattern",
    [
        (llama, torch.float32, "2:4"),
        (lambda: llama(tie_word_embeddings=True), torch.bfloat16, 0.97),
        (gpt2, torch.float16, 0.3),
        (gpt2, torch.float32, Channels(0.5, "out")),
    ],
)
def test_models_come_back_bit_for_bit_in_the_stated_size(tmp_path, layout, make, dtype, pattern):
    model, path = make().to(dtype), tmp_path / "new" / "weights.safetensors"
    masks = prune(model, pattern, progress=False)
    first = next(iter(linear_layers(model).values())).weight
    with torch.no_grad():  # numbers that comparisons treat unlike others, where a weight stays and where none does
        kept = next(iter(masks.layers.values())).to_bool()
        for place, value in zip(kept.nonzero(), (math.nan, -0.0, math.inf), strict=False):
            first[tuple(place)] = value
        first[tuple((~kept).nonzero()[0])] = 3.0
    save_sparse(model, path, layout)
    assert content_bytes(path) - sparse_sizes(model)[layout] in range(12)  # one weight more than masks; alignment

    other = scrambled(make().to(dtype))
    read = load_sparse(other, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(bits_of(other.state_dict()[name]), bits_of(tensor)), name
    assert masks_of(other) is read and read.about == masks.about and read.kept == masks.kept + 1
    assert read.layers.keys() == masks.layers.keys()
    assert list(path.parent.iterdir()) == [path]


def test_positions_are_those_of_torchs_compressed_rows(tmp_path):
    model = nn.Sequential(nn.Linear(12, 5))
    prune(model, 0.7, progress=False)
    save_sparse(model, tmp_path / "csr", "csr")
    found, expected = load_file(tmp_path / "csr"), model[0].weight.detach().to_sparse_csr()
    assert found["0.weight.columns"].dtype == torch.uint16
    assert found["0.weight.columns"].tolist() == expected.col_indices().tolist()
    assert found["0.weight.offsets"].tolist() == expected.crow_indices().tolist()
    assert torch.equal(found["0.weight.values"], expected.values())


def test_the_bitmask_is_smaller_above_a_density_of_one_sixteenth():
    for sparsity, smaller in ((0.9, "bitmask"), (0.96, "csr")):
        model = nn.Sequential(nn.Linear(512, 512, bias=False)).to(torch.bfloat16)
        prune(model, sparsity, progress=False)
        sizes = sparse_sizes(model)
        assert min(sizes, key=sizes.get) == smaller and sizes["dense"] == 2 * 512**2
    model = nn.Sequential(nn.Linear(2**16 + 8, 2, bias=False))
    masks = prune(model, 0.5, progress=False)
    assert sparse_sizes(model)["csr"] == 3 * 4 + masks.kept * (4 + 4)


def test_zeros_from_elsewhere_are_found():
    model = llama()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no linear layer with 5% of zeros"):
        zeros_of(model)
    prune(model, 0.5, target_modules=["q_proj"], progress=False)
    expected = masks_of(model)
    del model._sparse_peft_masks
    found = zeros_of(model)
    assert found.layers.keys() == expected.layers.keys() and found.kept == expected.kept
    assert len(zeros_of(model, least=0.5).layers) == 2
    with pytest.raises(ValueError, match="least=0"):
        zeros_of(model, least=0)


def damaged(path, kind, tensors=None, drop=(), **changes):
    """A pruned layer's file with other tensors or another description."""
    model = nn.Sequential(nn.Linear(11, 3))
    prune(model, 0.5, progress=False)
    save_sparse(model, path, kind)
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()[FORMAT])
    stored = {name: tensor for name, tensor in load_file(path).items() if name not in drop} | (tensors or {})
    save_file(stored, path, metadata={FORMAT: json.dumps({**content, **changes})})
    return nn.Sequential(nn.Linear(11, 3))


ROWS = torch.tensor([0, 2, 2, 4], dtype=torch.int32)


def csr(columns, offsets=ROWS, dtype=torch.int32):
    columns = torch.tensor(columns).to(dtype)
    return {"0.weight.offsets": offsets, "0.weight.columns": columns, "0.weight.values": torch.ones(len(columns))}


@pytest.mark.parametrize(
    "layout, change, message",
    [
        ("csr", {"format": 2}, "no sparse_peft_weights of format 1"),
        ("csr", {"about": 3}, "`about`"),
        ("csr", {"layout": "coo"}, "layout 'coo', and bitmask, csr are known"),
        ("csr", {"shapes": [3]}, "layout 'csr'"),
        ("csr", {"shapes": {"0.weight": [3, 2**40]}}, r"0.weight is \[3, 1099511627776\] in the file"),
        ("csr", {"shapes": {"0.bias": [3]}}, r"0.bias is \[3\]"),
        ("csr", {"shapes": {"1.weight": [3, 11]}}, "1.weight is .* not there in the model"),
        ("csr", {"drop": ["0.bias"]}, "no 0.bias in the file, and no - in the model"),
        ("csr", {"tensors": {"more": torch.ones(1)}}, "no - in the file, and no more in the model"),
        ("csr", {"tensors": {"0.bias": torch.ones(4)}}, r"0.bias: numbers of shape \(4,\)"),
        ("csr", {"tensors": {"0.bias": torch.ones(3).half()}}, "0.bias is torch.float16 in the file"),
        ("csr", {"tensors": {"0.weight.values": torch.ones(99)}}, r"0.weight: numbers of shape \(99,\)"),
        ("csr", {"tensors": csr([1, 2, 3, 11])}, "a column outside of 11"),
        ("csr", {"tensors": csr([-1, 2, 3, 4])}, "a column outside of 11"),
        ("csr", {"tensors": csr([2, 2, 3, 4])}, "columns that do not rise within a row"),
        ("csr", {"tensors": csr([1, 2, 4, 3])}, "columns that do not rise within a row"),
        ("csr", {"tensors": csr([1, 2, 3])}, "offsets that do not rise from 0 to 3"),
        ("csr", {"tensors": csr([1] * 4, torch.tensor([0, 5, 2, 4]))}, "offsets that do not rise"),
        ("csr", {"tensors": csr([1] * 4, torch.tensor([1, 2, 3, 4]))}, "offsets that do not rise"),
        ("csr", {"tensors": csr([1] * 4, torch.tensor([0, 4]))}, r"shape \(2,\) for 3 rows"),
        ("csr", {"tensors": csr([1.0] * 4, dtype=torch.float32)}, "columns of torch.float32"),
        ("bitmask", {"tensors": {"0.weight.bits": torch.zeros(2, 2, dtype=torch.uint8)}}, "bits of 2 rows for 3"),
        ("bitmask", {"tensors": {"0.weight.bits": torch.full((3, 2), 255, dtype=torch.uint8)}}, "bits behind"),
        ("bitmask", {"tensors": {"0.weight.bits": torch.zeros(3, 2, dtype=torch.uint8)}}, r"and \(0,\) is"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_before_anything_changes(tmp_path, layout, change, message):
    path = tmp_path / "weights.safetensors"
    model = damaged(path, layout, **change)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_sparse(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert masks_of(model) is None


def test_models_that_cannot_be_stored_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no linear layer"):
        save_sparse(llama(), tmp_path / "a")
    with pytest.raises(ValueError, match="layout='coo'"):
        save_sparse(llama(), tmp_path / "a", "coo")
    model = llama()
    prune(model, 0.5, progress=False)
    with pytest.raises(ValueError, match="has adapters"):
        save_sparse(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="one that save_sparse wrote"):
        load_sparse(llama(), tmp_path / "a")
    assert not list(tmp_path.iterdir())
    damaged(tmp_path / "a", "csr")
    with torch.device("meta"), pytest.raises(ValueError, match="on the meta device"):
        load_sparse(nn.Sequential(nn.Linear(11, 3)), tmp_path / "a")
