"""Files of an adapter are replaced together, or stay as they are."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import sparse_peft.tuners.base_config as base_config
from sparse_peft import SoRAConfig, SparseConfig
from sparse_peft.tuners.files.writes import guard_adapter_writes
from tests.helpers.two_layers import TwoLayers

WEIGHTS = "adapter_model.safetensors"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "config",
    [
        SparseConfig(target_modules=["first", "second"], density=0.2),
        SoRAConfig(target_modules=["first", "second"], init_weights=False),
    ],
    ids=["sparse", "sora"],
)
def test_weights_and_config_are_saved_together(tmp_path, monkeypatch, config):
    model = get_peft_model(TwoLayers(), copy.deepcopy(config))
    model.add_adapter("other", copy.deepcopy(config))
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(base_config, "write_compactly", fail)
        with pytest.raises(OSError, match="disk full"):
            model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    model.save_pretrained(tmp_path)
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before if name.name == WEIGHTS)
    assert not list(tmp_path.glob(".saving*"))


def test_adapters_of_other_methods_are_saved_as_before(tmp_path):
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert PeftModel.from_pretrained(TwoLayers(), tmp_path).peft_config["default"].r == 2 and len(tensors) == 2


def test_the_guard_is_put_up_once():
    save, write = PeftModel.save_pretrained, peft.peft_model.safe_save_file
    guard_adapter_writes()
    assert PeftModel.save_pretrained is save and peft.peft_model.safe_save_file is write
