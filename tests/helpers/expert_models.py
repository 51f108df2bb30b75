"""Small random mixture-of-experts models, and their dense reference."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from sparse_peft import SparseConfig, SparsityController
from sparse_peft.tuners.base_layer import TunerLayer

if not hasattr(PreTrainedModel, "set_experts_implementation"):
    pytest.skip("transformers before 5 has no fused experts", allow_module_level=True)

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = {
    "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_routed_experts": 5, "moe_intermediate_size": 12,
}  # fmt: skip
CONFIGS = {
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 5, "moe_intermediate_size": 12, "head_dim": 8}),
    "mixtral": (MixtralConfig, {"num_local_experts": 5}),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 5, "head_dim": 8}),
    "olmoe": (OlmoeConfig, {"num_experts": 5}),
    "deepseek_v3": (DeepseekV3Config, DEEPSEEK),
    "glm4_moe": (
        Glm4MoeConfig,
        {"n_routed_experts": 5, "moe_intermediate_size": 12, "head_dim": 8, "first_k_dense_replace": 0, "n_group": 1},
    ),
    "llama4_text": (Llama4TextConfig, {"num_local_experts": 5, "head_dim": 8, "intermediate_size_mlp": 24}),
}
IDS = torch.arange(3, 19).view(2, 8)


def mixture(name="qwen3_moe", implementation="eager", **changes):
    """A random model, the same at each call."""
    kind, settings = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**SMALL, **settings, **changes}))
    if name != "llama4_text":
        model.set_experts_implementation(implementation)
    for parameter in model.parameters():  # biases and zeros of gpt-oss and Llama 4
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def config(**settings):
    """Trained entries in all experts, with random values."""
    return SparseConfig(
        **{
            "density": 0.1, "target_modules": [], "target_experts": True, "init_weights": False, "scale": 1.0,
            "task_type": "CAUSAL_LM", **settings,
        }
    )  # fmt: skip


def adapted(name="qwen3_moe", implementation="eager", dtype=torch.float32, **settings):
    torch.manual_seed(1)
    return get_peft_model(mixture(name, implementation).to(dtype), config(**settings))


def layers(model):
    """``{name: layer}`` of the adapted parameters."""
    return {module.name: module for module in model.modules() if isinstance(module, TunerLayer)}


def reference(name, model, adapter="default"):
    """The float64 model with dense weights, whose experts are computed in a loop."""
    dense = mixture(name).double()
    parameters = dict(dense.named_parameters())
    with torch.no_grad():
        for path, layer in layers(model).items():
            target = parameters.get(path, parameters.get(f"{path}.weight"))
            target += layer.get_delta_weight(adapter).to(target)
    return dense


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def train(model, steps, lr=0.05, total_steps=None):
    """The losses of a run, whose positions change where it knows its number of steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    controller = None if total_steps is None else SparsityController(model, optimizer, total_steps=total_steps)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        if controller is not None:
            controller.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Loop(nn.Module):
    """Experts of ``(out, in)`` weights that multiply one after the other, as transformers' do."""

    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.up = nn.Parameter(torch.randn(3, 5, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x, weights):
        hidden = [F.linear(x, self.up[e]).relu() for e in range(3)]
        return sum(weights[:, e, None] * F.linear(hidden[e], self.down[e]) for e in range(3))


class Stack(Loop):
    """Experts that multiply by functions which are not taken over, and by a list of weights."""

    def forward(self, x, weights):
        hidden = torch.einsum("ti,eoi->teo", x, self.up).relu()
        both = torch.stack([self.down[0], self.down[1], self.down.chunk(3)[2][0]])
        return torch.einsum("teo,eio,te->ti", hidden, both, weights)


class FromTheEnd(Loop):
    """Experts that choose tokens by numbers which count from the end."""

    def forward(self, x, weights):
        order = torch.arange(-len(x), 0)
        hidden = [F.linear(x[order], self.up[e]).relu() for e in range(3)]
        return sum(weights[:, e, None] * F.linear(hidden[e][order], self.down[e]) for e in range(3))


class Holder(nn.Module):
    """A model of nothing but experts, which get the routing weights ``(tokens, experts)`` with the tokens."""

    def __init__(self, experts=Loop):
        super().__init__()
        self.experts = experts()

    def forward(self, x, weights):
        return self.experts(x, weights)
