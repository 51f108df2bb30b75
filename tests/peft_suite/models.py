"""Tiny models with random weights, in the place of the ones that upstream's tests take from the Hugging Face hub.

Their ids keep the architecture's name, because upstream's tests look for it ("gpt2" in model_id), and are relative
paths: the tests run with the folder of the models as working directory, so that no absolute path gets into an id.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

# A wide initialisation: with the default of 0.02 the logits of such small models hardly depend on their weights, and
# tests that compare outputs of different adapters would see no difference.
_WIDE = {"initializer_range": 0.2}
_ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    **_WIDE,
}
_LLAMA = {**_ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# id: (config class, its keyword arguments, model class), all of transformers
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "tiny-opt": (
        "OPTConfig",
        {
            "vocab_size": 64,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "init_std": 0.2,
        },
        "OPTForCausalLM",
    ),
    "tiny-gpt2": (
        "GPT2Config",
        {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **_WIDE,
        },
        "GPT2LMHeadModel",
    ),
    "tiny-llama": ("LlamaConfig", _LLAMA, "LlamaForCausalLM"),
    "tiny-qwen2": ("Qwen2Config", _LLAMA, "Qwen2ForCausalLM"),
    # untied: with tied embeddings it repeats its last token, whatever an adapter of the residual stream does
    "tiny-gemma3": (
        "Gemma3TextConfig",
        {**_LLAMA, "head_dim": 8, "sliding_window": 16, "tie_word_embeddings": False},
        "Gemma3ForCausalLM",
    ),
    "tiny-t5": (
        "T5Config",
        {
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "T5ForConditionalGeneration",
    ),
    "tiny-bart": (
        "BartConfig",
        {
            "vocab_size": 64,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 64,
            "forced_eos_token_id": None,
            "init_std": 0.2,
        },
        "BartForConditionalGeneration",
    ),
    "tiny-bert": ("BertConfig", _ENCODER, "BertModel"),
    "tiny-roberta": ("RobertaConfig", _ENCODER, "RobertaModel"),
    "tiny-deberta": ("DebertaConfig", _ENCODER, "DebertaModel"),
    "tiny-deberta-v2": ("DebertaV2Config", _ENCODER, "DebertaV2Model"),
    "tiny-bert-classifier": ("BertConfig", _ENCODER, "BertForSequenceClassification"),
    "tiny-roberta-classifier": ("RobertaConfig", _ENCODER, "RobertaForSequenceClassification"),
    "tiny-llama-classifier": ("LlamaConfig", {**_LLAMA, "num_labels": 1}, "LlamaForSequenceClassification"),
}

BY_FILE: dict[str, list[str]] = {
    "decoder": ["tiny-opt", "tiny-gpt2", "tiny-llama", "tiny-qwen2", "tiny-gemma3"],
    "encdec": ["tiny-t5", "tiny-bart"],
    "feature": ["tiny-bert", "tiny-roberta", "tiny-deberta", "tiny-deberta-v2"],
    "seqcls": ["tiny-bert-classifier", "tiny-roberta-classifier", "tiny-llama-classifier"],
}


def models_folder(cache: Path) -> Path:
    """The folder below ``cache`` with all of ``MODELS`` as saved by the installed transformers; made if need be."""
    digest = hashlib.sha256(json.dumps(MODELS, sort_keys=True).encode()).hexdigest()[:8]
    folder = cache / f"models-{importlib.metadata.version('transformers')}-{digest}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        new = Path(temporary, "new")
        for model_id in MODELS:
            _save(model_id, new / model_id)
        try:
            new.rename(folder)
        except OSError:
            # A run beside this one was faster; the seeds make both copies equal.
            if not folder.is_dir():
                raise
    return folder


def _save(model_id: str, folder: Path) -> None:
    config_name, arguments, model_name = MODELS[model_id]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_name)(getattr(transformers, config_name)(**arguments))
    model.save_pretrained(folder)
