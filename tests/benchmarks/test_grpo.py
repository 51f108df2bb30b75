"""GRPO whose answers come from an engine in another process, on a tiny random model."""

from dataclasses import asdict

import pytest
import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from typer.testing import CliRunner

from sparse_peft import SparseConfig
from tests.helpers.language_models import llama, make_tokenizer
from tests.helpers.processes import SERVER

pytest.importorskip("trl")

from benchmarks import grpo
from benchmarks.rollouts import padded, sample, token_log_probabilities

FIELDS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def in_bfloat16():
    return llama().bfloat16()


def long_words(completions, **_):
    return [sum(len(word) > 4 for word in text.split()) / max(1, len(text.split())) for text in completions]


def trained(config, load=llama, steps=6):
    rows = Dataset.from_list([{"prompt": "the quick fox"}, {"prompt": "a lazy"}] * 4)
    task = grpo.Task(rows, rows, long_words)
    plan = grpo.Plan("sparse", learning_rate=1e-2, steps=steps, questions=2, generations=4, length=6)
    return grpo.train(plan, config, load, make_tokenizer(), task, SERVER)


@pytest.mark.distributed
@pytest.mark.parametrize("load", [llama, in_bfloat16])
@pytest.mark.parametrize("selection", ["magnitude_smallest", "random"])
def test_trainer_and_engine_have_equal_log_probabilities_after_each_step(load, selection):
    run = trained(SparseConfig(selection=selection, density=0.05, **FIELDS), load)
    assert [step.equal for step in run.steps] == [True] * 6
    assert all(step.difference == 0 for step in run.steps)
    assert all(0 < step.bytes < run.full_bytes for step in run.steps)
    assert [step.full_seconds is not None for step in run.steps] == [True, *[False] * 4, True]


@pytest.mark.distributed
def test_the_merged_models_of_lora_are_other_models_than_the_trainers():
    run = trained(LoraConfig(r=4, **FIELDS), steps=2)
    assert run.steps[-1].difference > 0
    assert [step.bytes for step in run.steps] == [run.full_bytes] * 2


def test_completions_end_at_the_end_of_text_and_have_their_log_probabilities():
    model, prompts = llama().eval(), [[3, 4, 5], [6]]
    found = sample(model, prompts, 5, seed=0, end=1)
    assert found == sample(model, prompts, 5, seed=0, end=1)
    for prompt, completion, own in zip(prompts, found["completions"], found["log_probabilities"], strict=True):
        assert 1 not in completion[:-1] and len(completion) <= 5
        expected = token_log_probabilities(model, torch.tensor([prompt + completion]))[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(own), expected, rtol=1e-4, atol=1e-5)


def test_rows_are_padded():
    assert padded([[3], [4, 5]], 0).tolist() == [[3, 0], [4, 5]]
    assert padded([[3], [4, 5]], 0, left=True).tolist() == [[0, 3], [4, 5]]


def test_runs_that_a_file_has_are_not_repeated(tmp_path, monkeypatch):
    trained_plans = []

    def train(plan, *_):
        trained_plans.append((plan.method, plan.seed))
        steps = [grpo.Step(10 + n, 0.1, True, 0.0, 1.0 if n == 0 else None, n / 4) for n in range(5)]
        return grpo.Run(asdict(plan), steps, (100, 0.2), 1000, 0.25, 0.5, 60.0)

    for name in ("load_tokenizer", "sums"):
        monkeypatch.setattr(grpo, name, lambda *_: None)
    monkeypatch.setattr(grpo, "train", train)
    app = typer.Typer()
    app.command()(grpo.main)
    command = ["--steps", "5", "--seed", "0", "--seed", "1", "--output", str(tmp_path / "grpo.json")]
    for methods in (["--method", "lora"], ["--method", "lora", "--method", "residual"]):
        result = CliRunner().invoke(app, [*methods, *command])
        assert result.exit_code == 0, result.output
    assert trained_plans == [("lora", 0), ("lora", 1), ("residual", 0), ("residual", 1)]
    *_, run = grpo.read_runs(tmp_path / "grpo.json")
    expected = ["residual", "float32", "6e-05", "1", "0.00 -> 1.00", "0.25 -> 0.50", "0.00", "1.20%", "0.10", "0.10"]
    assert grpo.row(run) == [*expected, "5/5", "0.0e+00", "1.0"]
