"""Exports: merged models, and approximations whose stated error is the true one."""

import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from sparse_peft import S2FTConfig, SaRAConfig, SLTrainConfig, SoRAConfig, SparseConfig
from sparse_peft.adapters import export, save_merged
from tests.helpers.trained_adapters import FACTORS, METHODS, deltas, llama, saved, three, trained
from tests.helpers.versions import transformers_adapters

TARGETS = ["q_proj", "o_proj", "down_proj"]
CONFIGS = {
    "sparse": lambda **k: SparseConfig(density=0.2, **k),
    "sara": lambda **k: SaRAConfig(density=0.2, **k),
    "s2ft": lambda **k: S2FTConfig(k=2, **k),
    "sora": lambda **k: SoRAConfig(r=3, **k),
    "sltrain": lambda **k: SLTrainConfig(r=3, density=0.1, **k),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_needs_nothing_else_and_leaves_the_model_as_it_was(tmp_path, method, dtype):
    def base():
        return llama(attention_bias=True).to(dtype)

    folder, model = saved(tmp_path / "a", CONFIGS[method](), base=base, target_modules=TARGETS)
    base().save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "live")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    export(folder, tmp_path / "folder", base=tmp_path / "base")
    loaded_base = base()
    export(folder, tmp_path / "loaded", base=loaded_base)
    assert all(torch.equal(t, base().state_dict()[name]) for name, t in loaded_base.state_dict().items())
    expected = {
        name: p.detach().double() + deltas(model).get(name.removesuffix(".weight"), 0)
        for name, p in base().named_parameters()
    }
    near = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for name in ("live", "folder", "loaded"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype)
        assert type(merged) is type(base())
        for parameter, tensor in merged.named_parameters():
            assert torch.equal(tensor.double(), expected[parameter].to(dtype).double()) or method in FACTORS
            torch.testing.assert_close(tensor.double(), expected[parameter], rtol=near, atol=near)
    x = torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(tmp_path / "live", dtype=dtype).eval()(x).logits,
            model(x).logits,
            rtol=1e-5 if dtype == torch.float32 else 5e-2,
            atol=1e-5 if dtype == torch.float32 else 5e-2,
        )


def test_modules_saved_whole_take_their_place(tmp_path):
    model = trained(SparseConfig(density=0.2), base=llama, target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    head.modules_to_save["default"].weight.data.normal_()
    model.add_adapter("plain", SparseConfig(density=0.2, target_modules=["q_proj"], init_weights=False))
    export(model, tmp_path / "with")
    export(model, tmp_path / "without", adapter_name="plain")
    found, other = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert found.keys() == other.keys() == llama().state_dict().keys()
    assert torch.equal(found["lm_head.weight"], head.modules_to_save["default"].weight)
    assert torch.equal(other["lm_head.weight"], llama().lm_head.weight)
    q = "model.layers.0.self_attn.q_proj"
    for tensors, name in ((found, "default"), (other, "plain")):
        expected = dict(llama().named_parameters())[f"{q}.weight"].double() + deltas(model, name)[q]
        assert torch.equal(tensors[f"{q}.weight"], expected.float())


@transformers_adapters
def test_models_that_got_their_adapter_from_transformers(tmp_path):
    model = llama()
    model.add_adapter(SparseConfig(density=0.2, target_modules=["q_proj"], init_weights=False))
    x = torch.randint(0, 40, (2, 5))
    export(model, tmp_path / "merged")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(found(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)
    assert model._hf_peft_config_loaded


def test_models_of_nobody_in_particular(tmp_path):
    model = trained(SparseConfig(density=0.3))
    save_merged(model, tmp_path / "merged")
    merged = three()
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    x = torch.randn(2, 7)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_the_stated_error_of_an_approximation_is_the_true_one_and_the_least(tmp_path, method, rank):
    model = trained(METHODS[method](0))
    result = export(model, tmp_path / "lora", "low_rank", rank=rank)
    lora = PeftModel.from_pretrained(three(), tmp_path / "lora")
    missing = total = 0.0
    for layer, delta in deltas(model).items():
        found = lora.base_model.model.get_submodule(layer)
        product = found.lora_B["default"].weight.double() @ found.lora_A["default"].weight.double()
        dense = delta.t() if layer == "second" else delta  # Conv1D's is stored (in, out)
        singular = torch.linalg.svdvals(dense)
        left = float((dense - product).norm())
        assert result.errors[layer] == pytest.approx(left / float(dense.norm()), abs=1e-6)
        assert left == pytest.approx(float(singular[rank:].norm()), rel=1e-3, abs=1e-5)  # Eckart and Young
        missing, total = missing + left**2, total + float(dense.norm()) ** 2
    assert result.error == pytest.approx((missing / total) ** 0.5, abs=1e-6)
    x = torch.randn(2, 7)
    if rank == 50:
        assert result.error < 1e-6
        torch.testing.assert_close(lora(x), model(x), rtol=1e-4, atol=1e-4)
    assert f"{result.error:.3g} over all layers" in (tmp_path / "lora" / "README.md").read_text()


def test_approximations_of_convolutions(tmp_path):
    def base():
        torch.manual_seed(1)
        return nn.ModuleDict({"c": nn.Conv2d(4, 6, (3, 2))})

    model = trained(SparseConfig(density=0.3), base=base, target_modules=["c"])
    result = export(model, tmp_path / "lora", "low_rank", rank=2)
    lora = PeftModel.from_pretrained(base(), tmp_path / "lora").base_model.model["c"]
    delta, found = deltas(model)["c"], lora.get_delta_weight("default").double()
    assert result.error == pytest.approx(float((delta - found).norm() / delta.norm()), abs=1e-6)


def test_exact_lora_by_the_same_door(tmp_path):
    folder, model = saved(tmp_path / "a", S2FTConfig(k=2), base=llama, target_modules=TARGETS)
    llama().save_pretrained(tmp_path / "base")
    config = export(folder, tmp_path / "lora", "lora", base=tmp_path / "base", uniform=True)
    assert isinstance(config, LoraConfig) and config.rank_pattern == {}
    x = torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        lora = PeftModel.from_pretrained(llama(), tmp_path / "lora")
        torch.testing.assert_close(lora(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)
    model = trained(SLTrainConfig(r=2, density=0.1))
    with pytest.raises(ValueError, match=r"full rank.*approximation of low rank \(sparse_peft\.adapters\.export"):
        export(model, tmp_path / "none", "lora")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("arguments, message", [
    ({"form": "gguf"}, "form='gguf': one of merged, lora, low_rank"),
    ({"form": "low_rank"}, "rank=None: a rank is given exactly"),
    ({"form": "low_rank", "rank": 0}, "rank=0: an int of at least 1"),
    ({"form": "merged", "rank": 2}, "a rank is given exactly with 'low_rank'"),
    ({"form": "merged", "uniform": True}, "that is for 'lora'"),
    ({"base": "somewhere"}, "the given model has its base"),
    ({"adapter_name": "other"}, "the model's adapters are 'default'"),
])  # fmt: skip
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export(trained(SparseConfig(density=0.2)), tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_exported(tmp_path):
    folder, model = saved(tmp_path / "a", SparseConfig(density=0.2))
    with pytest.raises(ValueError, match="names no base model; pass base="):
        export(folder, tmp_path / "new")
    with pytest.raises(ValueError, match="no such folder; pass the loaded model"):
        export(folder, tmp_path / "new", base="org/name")
    get_peft_model(three(), LoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="a sparse adapter is expected, this is LORA"):
        export(tmp_path / "lora", tmp_path / "new", base=three())
    model.base_model.model.first.deltas["default"].values.data[0] = float("nan")
    with pytest.raises(ValueError, match="layer first has values that are not finite"):
        export(model, tmp_path / "new")
    assert not model.base_model.model.second.merged and not (tmp_path / "new").exists()
    model.base_model.model.first.deltas["default"].values.data[0] = 0
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapters default are merged; call unmerge_adapter"):
        export(model, tmp_path / "new")


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    model = trained(SparseConfig(density=0.2))

    def full(*_):
        raise OSError("full")

    monkeypatch.setattr(sys.modules["sparse_peft.adapters.export"], "save_torch_state_dict", full)
    with pytest.raises(OSError, match="full"):
        export(model, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    assert not model.base_model.model.first.merged
