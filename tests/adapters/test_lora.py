"""S2FT as plain LoRA, loaded by a PEFT that has never heard of this package, and back."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_peft import S2FTConfig, SLTrainConfig, SoRAConfig, SoRALinear, SparseConfig
from sparse_peft.adapters import save_as_lora, save_lora_as_s2ft
from tests.helpers.language_models import small_llama
from tests.helpers.processes import run_code

EVERY = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).eval()


@pytest.mark.parametrize("make, config", [
    (small_llama, S2FTConfig(k=3)),
    (small_llama, S2FTConfig(ratio=0.1, target_modules=EVERY)),
    (small_llama, S2FTConfig(ratio=0.03, allocation="global")),
    (small_llama, S2FTConfig(k=2, modules_to_save=["lm_head"])),
    (small_llama, SparseConfig(num_params=40, target_modules=["down_proj"])),
    (gpt2, S2FTConfig(k=3, target_modules=["attn.c_proj", "c_fc"])),
], ids=["default", "all roles", "global", "a module saved whole", "single entries", "Conv1D"])  # fmt: skip
def test_lora_of_the_adapter_makes_the_same_of_every_input(tmp_path, make, config):
    config.init_weights = False
    model = get_peft_model(make(), config)
    x = torch.randint(0, 40, (2, 7))
    with torch.no_grad():
        expected = model(x).logits
    lora_config = save_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(make(), tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(lora(x).logits, expected, rtol=1e-4, atol=1e-4)
    layers = [m for m in model.modules() if hasattr(m, "deltas") and m.support("default").nnz]
    assert len(lora_config.target_modules) == len(layers)
    for layer in layers:
        rank = lora_config.rank_pattern.get(layer.name, lora_config.r)
        support = layer.support("default")
        assert rank == (support.count if isinstance(config, S2FTConfig) else min(
            support.rows.unique().numel(), support.cols.unique().numel()))  # fmt: skip
    if not isinstance(config, S2FTConfig):
        return
    save_lora_as_s2ft(tmp_path / "lora", tmp_path / "again")
    again = PeftModel.from_pretrained(make(), tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(x).logits, expected)


CONVOLUTIONS = [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 2), padding=1, stride=2), nn.Conv2d(4, 6, 1)]


@pytest.mark.parametrize("conv", CONVOLUTIONS)
@pytest.mark.parametrize("side", ["in", "out"])
def test_convolutions(tmp_path, conv, side):
    config = S2FTConfig(k=2, side=side, target_modules=["body"], init_weights=False)
    state = {k: v.clone() for k, v in conv.state_dict().items()}

    def base():
        module = nn.ModuleDict({"body": type(conv)(4, 6, conv.kernel_size, conv.stride, conv.padding)})
        module["body"].load_state_dict(state)
        return module

    model = get_peft_model(base(), config)
    x = torch.randn(2, 4, *(7 for _ in conv.kernel_size))
    expected = model.base_model.model["body"](x)
    save_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(base(), tmp_path / "lora")
    torch.testing.assert_close(lora.base_model.model["body"](x), expected, rtol=1e-4, atol=1e-4)
    save_lora_as_s2ft(tmp_path / "lora", tmp_path / "again")
    again = PeftModel.from_pretrained(base(), tmp_path / "again")
    assert torch.equal(again.base_model.model["body"](x), expected)


def test_without_this_package(tmp_path):
    model = small_llama()
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, S2FTConfig(k=3, init_weights=False))
    x = torch.randint(0, 40, (1, 5))
    save_as_lora(tuned, tmp_path / "lora")
    save_file({"x": x, "logits": tuned(x).logits.detach().contiguous()}, tmp_path / "expected.safetensors")
    program = (
        "import sys, torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "from safetensors.torch import load_file\n"
        f"expected = load_file(r'{tmp_path / 'expected.safetensors'}')\n"
        f"base = AutoModelForCausalLM.from_pretrained(r'{tmp_path / 'base'}')\n"
        f"model = PeftModel.from_pretrained(base, r'{tmp_path / 'lora'}')\n"
        "torch.testing.assert_close(model(expected['x']).logits, expected['logits'], rtol=1e-4, atol=1e-4)\n"
        "assert 'sparse_peft' not in sys.modules\n"
    )
    done = run_code(program)
    assert done.returncode == 0, done.stderr


def test_a_lora_of_its_own_kind_cannot_become_s2ft(tmp_path):
    lora = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj: neither lora_A nor lora_B selects"
    ):
        save_lora_as_s2ft(tmp_path / "lora", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    get_peft_model(small_llama(), S2FTConfig(k=2)).save_pretrained(tmp_path / "s2ft")
    with pytest.raises(ValueError, match=r"a LoRA adapter is expected, this is .*S2FT"):
        save_lora_as_s2ft(tmp_path / "s2ft", tmp_path / "again")


def test_scaled_factors_keep_their_scale(tmp_path):
    model = get_peft_model(small_llama(), S2FTConfig(k=3, init_weights=False))
    x = torch.randint(0, 40, (1, 5))
    expected = model(x).logits
    save_as_lora(model, tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["lora_alpha"] *= 2
    path.write_text(json.dumps(content))
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    tensors = {n: t / 2 if n.endswith("lora_B.weight") else t for n, t in tensors.items()}
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
    save_lora_as_s2ft(tmp_path / "lora", tmp_path / "again")
    torch.testing.assert_close(PeftModel.from_pretrained(small_llama(), tmp_path / "again")(x).logits, expected)


def test_unknown_adapters(tmp_path):
    model = get_peft_model(small_llama(), S2FTConfig(k=3))
    with pytest.raises(ValueError, match="adapter_name='other': the model's adapters are 'default'"):
        save_as_lora(model, tmp_path, "other")


# ---------------------------------------------------------------------------------------------------- SoRA


def sora(make=small_llama, shut=((0, 1), (2,)), **config):
    """A SoRA model with some gates shut: of the first layer all, of the next two some."""
    config = {"r": 4, "alpha": 8, "target_modules": EVERY, "init_weights": False, **config}
    model = get_peft_model(make(), SoRAConfig(**config)).eval()
    layers = [m for m in model.modules() if isinstance(m, SoRALinear)]
    layers[0].deltas["default"].gate.data.zero_()
    for layer, ranks in zip(layers[1:], shut, strict=False):
        layer.deltas["default"].gate.data[list(ranks)] = 0
    return model, layers


@pytest.mark.parametrize("uniform", [False, True])
def test_sora_is_lora_of_what_is_left(tmp_path, uniform):
    model, layers = sora()
    x = torch.randint(0, 40, (2, 7))
    with torch.no_grad():
        expected = model(x).logits
    config = save_as_lora(model, tmp_path / "lora", uniform=uniform)
    lora = PeftModel.from_pretrained(small_llama(), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(lora(x).logits, expected, rtol=1e-4, atol=1e-5)
    assert layers[0].name not in config.target_modules and len(config.target_modules) == len(layers) - 1
    assert (config.rank_pattern == {}) == uniform == (config.alpha_pattern == {})
    for layer in layers[1:]:
        other = lora.base_model.model.get_submodule(layer.name)
        assert other.scaling["default"] == layer.deltas["default"].scale == 2.0
        assert other.r["default"] == (4 if uniform else layer.deltas["default"].alive)
        # B diag(g) with the scale, a power of two, multiplied in before or after
        state = layer.deltas["default"]
        alive = other.lora_A["default"].weight.norm(dim=1) > 0
        assert int(alive.sum()) == state.alive
        order = [int((row == state.A).all(1).nonzero()) for row in other.lora_A["default"].weight[alive]]
        strengths = state.gate.abs() * state.A.norm(dim=1) * state.B.norm(dim=0)
        assert bool((strengths[order].diff() <= 0).all())
        assert torch.equal(other.lora_B["default"].weight[:, alive], state.B[:, order] * state.gate[order])
    lora.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(lora(x).logits, expected, rtol=1e-4, atol=1e-5)


def test_sora_as_lora_loads_without_this_package(tmp_path):
    model, _ = sora()
    save_as_lora(model, tmp_path / "lora")
    small_llama().save_pretrained(tmp_path / "base")
    x = torch.arange(7)[None]
    with torch.no_grad():
        save_file({"logits": model(x).logits.contiguous()}, tmp_path / "expected.safetensors")
    script = f"""
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}),
                                  {str(tmp_path / "lora")!r}).eval()
with torch.no_grad():
    logits = model(torch.arange(7)[None]).logits
expected = load_file({str(tmp_path / "expected.safetensors")!r})["logits"]
assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5), (logits - expected).abs().max()
assert not any(name.startswith("sparse_peft") for name in sys.modules)
"""
    done = run_code(script)
    assert done.returncode == 0, done.stderr


def test_sora_of_conv1d_and_convolutions(tmp_path):
    model, _ = sora(gpt2, shut=(), target_modules=["c_fc", "attn.c_proj"])
    x = torch.randint(0, 40, (2, 7))
    save_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(gpt2(), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(lora(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)

    def convolution():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 9), nn.Conv1d(4, 6, 3, padding=1))

    model, _ = sora(convolution, shut=((1,),), target_modules=["0", "1"])
    save_as_lora(model, tmp_path / "conv")
    lora = PeftModel.from_pretrained(convolution(), tmp_path / "conv").eval()
    x = torch.randn(2, 4, 9)
    with torch.no_grad():
        torch.testing.assert_close(lora(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_has_no_lora_form_says_so(tmp_path):
    model, layers = sora()
    for layer in layers:
        layer.deltas["default"].gate.data.zero_()
    with pytest.raises(ValueError, match="no layer with trained entries or ranks"):
        save_as_lora(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    model = get_peft_model(small_llama(), SLTrainConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj.*full rank.*merge_and_unload"):
        save_as_lora(model, tmp_path / "none")
