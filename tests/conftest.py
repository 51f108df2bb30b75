import functools
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# what is measured on one machine at one moment must not decide which path a test takes
os.environ.setdefault("SPARSE_PEFT_CALIBRATE", "0")

import jinja2
import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels then run in Python; read when a kernel is defined, so before anything imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.adapter_folders import save_base_and_adapters


def pytest_collection_finish():
    # torch's and transformers' millions of objects stay: no collection of a test has to visit them
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _templates():
    """A model card's template is compiled once, which takes longer than the rest of saving a small adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        yield


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fixed_precision():
    """Arguments of transformers 4 with bfloat16 set a variable, and every later trainer would compute in it."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A folder with a random Llama and a character tokenizer, under which every hub name is found."""
    folder = tmp_path_factory.mktemp("model")
    characters = ["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127))]
    inner = Tokenizer(WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(characters),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a base model, and adapters of it with random values beside it."""
    folder = tmp_path_factory.mktemp("world")
    save_base_and_adapters(folder)
    return folder
