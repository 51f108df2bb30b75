"""Adapters' folders that are damaged or made to do harm: refused before anything is made of what they declare."""

import json
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_peft import S2FTConfig, SoRAConfig, SparseConfig
from sparse_peft.adapters import compose
from sparse_peft.adapters.files import read_adapter
from sparse_peft.adapters.offline_adapter import read_stored
from tests.helpers.trained_adapters import METHODS, saved

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edited(folder, tensors=None, config=None):
    """The folder with some of its tensors (None: gone) and config fields replaced."""
    found = {**load_file(folder / FILE), **(tensors or {})}
    save_file({n: t for n, t in found.items() if t is not None}, folder / FILE, metadata={"format": "pt"})
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **(config or {})}))
    return folder


def refused(folder, message, tmp_path, error=ValueError):
    with pytest.raises(error, match=message):
        compose([folder, folder], tmp_path / "new")
    assert not (tmp_path / "new").exists()


KEY = "base_model.model.first.sparse_peft_delta_adapter"


@pytest.mark.parametrize("tensors, message", [
    ({"cols": None, "row_counts": None, "indices": torch.arange(23).flip(0).int()}, "must increase strictly"),
    ({"cols": None, "row_counts": None, "indices": torch.zeros(23).int()}, "0 occurs twice"),
    ({"cols": None, "row_counts": None, "indices": (torch.arange(23) + 60).int()}, "contain 82, but a 11 x 7"),
    ({"cols": None, "row_counts": None, "indices": (torch.arange(23) - 1).int()}, "contain -1"),
    ({"cols": None, "row_counts": None, "indices": torch.arange(23).float()}, "integers are expected"),
    ({"cols": None, "row_counts": None, "indices": torch.arange(22).int()}, r"\(23,\) values for \(22,\) positions"),
    ({"row_counts": torch.ones(11).to(torch.uint16)}, "add up to 11"),
    ({"row_counts": torch.zeros(3).to(torch.uint16)}, r"\(3,\) row_counts"),
    ({"cols": torch.full((23,), 9).to(torch.uint16)}, "cols contain 9"),
    ({"cols": torch.zeros(23).to(torch.uint16)}, "occurs twice"),
    ({"cols": None, "row_counts": None}, "the adapter file has no positions for layer first"),
    ({"values": torch.full((23,), float("nan"))}, "23 of 23 values are NaN"),
    ({"values": torch.ones(23).int()}, "floats of 16, 32 or 64 bits are expected"),
    ({"values": None}, "layer first: the adapter's file has no values for it"),
    ({"surplus": torch.ones(2)}, "surplus, an unknown tensor of an adapted layer"),
])  # fmt: skip
def test_entries(tmp_path, tensors, message):
    folder, _ = saved(tmp_path / "a", SparseConfig(density=0.3))
    edited(folder, {f"{KEY}.{name}": tensor for name, tensor in tensors.items()})
    refused(folder, message, tmp_path, (ValueError, TypeError))


@pytest.mark.parametrize("shape, message", [
    ([0, 7], r"has the shape \[0, 7\]; \[rows, cols\]"), ([-11, 7], "has the shape"), ([11], "has the shape"),
    ("11", "weight_shapes.*is expected"), ([11.0, 7], "weight_shapes.*is expected"),
    ([True, 7], "weight_shapes.*is expected"), (None, "weight_shapes.*is expected"),
    ([2**40, 2**40], "larger than any weight"), ([11, 3], "a row of the weight has 3 columns"),
])  # fmt: skip
def test_declared_shapes(tmp_path, shape, message):
    folder, _ = saved(tmp_path / "a", SparseConfig(density=0.3))
    shapes = json.loads((folder / CONFIG).read_text())["weight_shapes"]
    edited(folder, config={"weight_shapes": {**shapes, "first": shape}})
    refused(folder, message, tmp_path, (ValueError, TypeError))


class Largest(TorchDispatchMode):
    """Bytes of the largest memory behind any result of an operation."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("shape", [[2**31, 2**15], [11, 2**40], [2**40, 7]], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_made_of_a_size_that_only_the_config_declares(tmp_path, method, shape):
    folder, _ = saved(tmp_path / "a", METHODS[method](0), target_modules=["first"])
    edited(folder, config={"weight_shapes": {"first": shape}})
    # a shape that fits the file is refused only by the base model, or by another adapter of it
    with suppress(ValueError), Largest() as largest:
        read_stored(folder)
    assert largest.bytes < 2**20
    other, _ = saved(tmp_path / "b", METHODS[method](0), target_modules=["first"])
    with pytest.raises(ValueError, match="layer first"):
        compose([folder, other], tmp_path / "new")


def test_factors(tmp_path):
    key = "base_model.model.first.sparse_peft_sora_adapter"
    for change in ({"A": torch.ones(2, 8)}, {"B": torch.ones(11, 3)}, {"gate": torch.ones(5)}):
        folder, _ = saved(tmp_path / "a", SoRAConfig(r=2))
        edited(folder, {f"{key}.{name}": tensor for name, tensor in change.items()})
        refused(folder, "layer first: factors of shapes", tmp_path)


def test_channels(tmp_path):
    key = "base_model.model.first.sparse_peft_s2ft_adapter"
    for change, message in (
        ({"columns": torch.tensor([1, 1]).int()}, "1 occurs twice"),
        ({"columns": torch.tensor([4, 1]).int()}, "must increase strictly"),
        ({"columns": torch.tensor([1, 7]).int()}, "contain 7"),
        ({"columns": torch.tensor([1, 2, 3]).int()}, r"\(3,\) columns and \(22,\) values"),
    ):
        folder, _ = saved(tmp_path / "a", S2FTConfig(k=2, side="in"))
        edited(folder, {f"{key}.{name}": tensor for name, tensor in change.items()})
        refused(folder, message, tmp_path)


def test_layers_that_contradict_the_config(tmp_path):
    folder, _ = saved(tmp_path / "a", SparseConfig(density=0.3))
    edited(folder, {f"{KEY}.{name}": None for name in ("values", "cols", "row_counts")})
    refused(folder, "have different layers, such as first", tmp_path)
    folder, _ = saved(tmp_path / "b", SparseConfig(density=0.3))
    shapes = json.loads((folder / CONFIG).read_text())["weight_shapes"]
    inner = {k.replace(".first.", ".second.first."): v for k, v in load_file(folder / FILE).items() if ".first." in k}
    edited(folder, inner, {"weight_shapes": {**shapes, "second.first": [11, 7]}})
    refused(folder, "lies inside another layer", tmp_path)


def test_files_that_are_cut_off_or_missing(tmp_path):
    folder, _ = saved(tmp_path / "a", SparseConfig(density=0.3))
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:-9])
    refused(folder, "bytes where its header announces", tmp_path)
    (folder / FILE).write_bytes(b"\xff" * 100)
    refused(folder, "safetensors", tmp_path)
    (folder / FILE).unlink()
    torch.save({}, folder / "adapter_model.bin")  # not even looked at
    refused(folder, "no such file; an adapter's folder has adapter_model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"no adapter_config\.json in it"):
        read_adapter(tmp_path / "nowhere")


def test_an_existing_adapter_survives_a_composition_that_fails(tmp_path):
    folder, _ = saved(tmp_path / "a", SparseConfig(density=0.3))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError):
        compose([folder, tmp_path / "nowhere"], folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    compose([folder, folder], folder, weights=[0.5, 0.5])  # into the folder of one of them
    assert {path.name for path in folder.iterdir()} == set(before)
