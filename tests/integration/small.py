"""A random language model of a few thousand parameters, its tokenizer and some text."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from sparse_peft import S2FTConfig, SaRAConfig, SketchConfig, SLTrainConfig, SnellaConfig, SoRAConfig, SparseConfig

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away", "from", "it"]


def make_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *dict.fromkeys(WORDS)])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )  # fmt: skip


def _config(**fields):
    return LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=1, **fields,
    )  # fmt: skip


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(_config())


def sequence_classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(_config(num_labels=1))


METHODS = {
    "sparse": (SparseConfig, {"density": 0.1, "target_modules": "all-linear"}),
    "s2ft": (S2FTConfig, {"ratio": 0.2}),
    "sara": (
        SaRAConfig,
        {"density": 0.1, "target_modules": "all-linear", "nuclear_min_size": 8, "nuclear_weight": 1e-4},
    ),
    "sora": (SoRAConfig, {"r": 4, "target_modules": "all-linear", "penalty": 1.0, "report_every": 2}),
    "snella": (SnellaConfig, {"r": 4, "target_modules": "all-linear", "threshold": "hard_ste"}),
    "sltrain": (SLTrainConfig, {"r": 4, "density": 0.1, "target_modules": "all-linear"}),
    "sketch": (SketchConfig, {"bits": 3, "target_modules": "all-linear"}),
}

# What of a method changes during training besides its values, soon and often; the others change nothing.
MOVING = {
    "sparse": {"selection": "accumulated_gradient", "reselect_every": 2, "accumulate": 1, "replace_rate": 0.5},
    "sara": {"progressive": 2},
    "sora": {"penalty": 4.0, "prox_start": 0},
    "snella": {"target_sparsity": 0.5, "allocate_start": 0, "allocate_stop": 6, "allocate_every": 2},
    "sltrain": {"selection": "rigl", "reselect_every": 2, "accumulate": 1},
}

# Where one of each family will do for every run of the tests, the others are slow.
ALWAYS = ("sparse", "sora")
ONE_OF_EACH_FAMILY = [pytest.param(m, marks=() if m in ALWAYS else pytest.mark.slow) for m in METHODS]


def config(method="sparse", **kwargs):
    config_cls, settings = METHODS[method]
    return config_cls(**{**settings, "task_type": "CAUSAL_LM", **kwargs})


def text(n=16):
    return Dataset.from_dict({"text": [" ".join(WORDS[i % 5 :]) for i in range(n)]})


def bnb_optimizers_run():
    """Whether bitsandbytes can step on the CPU, which its older versions cannot."""
    import bitsandbytes

    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer = bitsandbytes.optim.AdamW32bit([parameter])
    try:
        optimizer.step()
    except Exception:
        return False
    return True
