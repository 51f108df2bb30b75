"""A random language model of a few thousand parameters, its tokenizer and some text."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away", "from", "it"]


def make_tokenizer():
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


def llama(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(_config(**fields))


def sequence_classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(_config(num_labels=1))


def small_llama(**config):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": "sdpa",
        "tie_word_embeddings": False,
        **config,
    }
    return LlamaForCausalLM(LlamaConfig(**settings))


def text(n=16):
    return Dataset.from_dict({"text": [" ".join(WORDS[i % 5 :]) for i in range(n)]})
