import json
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_peft import S2FTConfig, SLTrainConfig, SoRAConfig, SparseConfig

pytest.importorskip("typer")
from typer.testing import CliRunner

from sparse_peft.cli.app import app

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


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a base model, and adapters of it with random values beside it."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "base")
    (folder / "base" / "tokenizer.json").write_text("{}")
    for name, config in ADAPTERS.items():
        config.init_weights = False
        model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run():
    """Run a command: its exit code, stdout, stderr and, with --json, what it said."""

    def call(*arguments, expect=0):
        done = CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(argument) for argument in arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code == expect, (done.stdout, done.stderr)
        said = json.loads(done.stdout) if "--json" in arguments else None
        return SimpleNamespace(out=done.stdout, err=done.stderr, said=said)

    return call
