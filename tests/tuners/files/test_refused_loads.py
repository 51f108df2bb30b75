"""A model after a load that was refused: as before, by this package's loader and by PEFT's."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_peft import SketchConfig, SnellaConfig, SoRAConfig, SparseConfig
from sparse_peft.adapters import load_adapter
from tests.helpers.expert_models import config as experts_config
from tests.helpers.expert_models import mixture

METHODS = {
    "sparse": (lambda **k: SparseConfig(density=0.3, **k), "values"),
    "sora": (lambda **k: SoRAConfig(r=2, **k), "gate"),
    "snella": (lambda **k: SnellaConfig(r=2, **k), "B"),
    "sketch": (lambda **k: SketchConfig(bits=2, **k), "codebook"),
}


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7))


def damaged(folder, method, **fields):
    make, name = METHODS[method]
    get_peft_model(base(), make(target_modules=["0"], **fields)).save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    broken = {key: torch.full_like(t, torch.nan) if key.endswith(f".{name}") else t for key, t in tensors.items()}
    save_file(broken, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def everything(model):
    """What a load may change of a model."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": {name: type(module) for name, module in model.named_modules()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "adapters": list(getattr(model, "peft_config", {})),
    }


def same(a, b):
    tensors = a.pop("tensors"), b.pop("tensors")
    assert a == b and tensors[0].keys() == tensors[1].keys()
    torch.testing.assert_close(*tensors, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["1"]}], ids=["", "a module saved whole"])
@pytest.mark.parametrize("method", METHODS)
def test_a_base_model_is_as_before(tmp_path, method, fields):
    model, folder = base(), damaged(tmp_path, method, **fields)
    before = everything(model)
    with pytest.raises(ValueError, match="NaN"):
        load_adapter(model, folder, "b")
    same(everything(model), before)


@pytest.mark.parametrize("first", [None, "experts.down_proj"])
def test_a_model_with_experts_is_as_before(tmp_path, first):
    get_peft_model(mixture(), experts_config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("values"))
    tensors[name][0] = torch.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = mixture()
    if first is not None:
        model = get_peft_model(model, experts_config(target_experts=False, target_parameters=[first]))
    before = everything(model)
    with pytest.raises(ValueError, match="NaN"):
        (load_adapter if first is None else PeftModel.load_adapter)(model, tmp_path, "b")
    same(everything(model), before)


@pytest.mark.parametrize("first", ["0", "1"])
@pytest.mark.parametrize("method", METHODS)
def test_a_peft_model_keeps_its_adapters_alone(tmp_path, method, first):
    model, folder = get_peft_model(base(), METHODS[method][0](target_modules=[first])), damaged(tmp_path, method)
    before = everything(model)
    with pytest.raises(ValueError, match="NaN"):
        model.load_adapter(folder, "b")
    assert model.active_adapters == ["default"]
    same(everything(model), before)
    model.train()
    model(torch.randn(2, 5)).sum().backward()


def test_an_adapter_that_is_loaded_again_stays(tmp_path):
    model, folder = (
        get_peft_model(base(), SparseConfig(density=0.3, target_modules=["0"])),
        damaged(tmp_path, "sparse"),
    )
    before = everything(model)
    with pytest.raises(ValueError, match="NaN"):
        model.load_adapter(folder, "default")
    assert everything(model)["adapters"] == before["adapters"] == ["default"]


def test_other_packages_adapters_load_as_ever(tmp_path):
    get_peft_model(base(), LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"]))
    model.load_adapter(tmp_path, "b")
    assert list(model.peft_config) == ["default", "b"]
