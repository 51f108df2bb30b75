"""Folders of a base model and of adapters, for commands and plans."""

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_peft import S2FTConfig, SLTrainConfig, SoRAConfig, SparseConfig

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ADAPTERS = {
    "sparse": SparseConfig(density=0.1, target_modules="all-linear"),
    "other": SparseConfig(density=0.05, seed=1, target_modules=["q_proj", "v_proj"]),
    "s2ft": S2FTConfig(ratio=0.2),
    "sora": SoRAConfig(r=3, target_modules="all-linear"),
    "sltrain": SLTrainConfig(r=3, density=0.1, target_modules="all-linear"),
}


def save_base_and_adapters(folder):
    """Save a small Llama as ``base`` and adapters of it, with random values, under their names."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "base")
    (folder / "base" / "tokenizer.json").write_text("{}")
    for name, config in ADAPTERS.items():
        config.init_weights = False
        model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config)
        model.save_pretrained(folder / name)
