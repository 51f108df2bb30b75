"""The command eval: lm-eval before and after an adapter."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_peft import SparseConfig
from sparse_peft.cli.eval import compared
from tests.helpers.lm_eval_task import log_likelihood, sums_task

RESULT = {
    "results": {
        "sums": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "sums"},
        "text": {"word_perplexity,none": 9.0, "word_perplexity_stderr,none": "N/A", "alias": "text"},
    },
    "higher_is_better": {"sums": {"acc": True}, "text": {"word_perplexity": False}},
}


def test_scores_of_tasks_that_must_not_be_forgotten():
    after = json.loads(json.dumps(RESULT))
    after["results"]["sums"]["acc,none"] = 0.25
    after["results"]["text"]["word_perplexity,none"] = 12.0
    scores = compared(RESULT, after, ["sums", "text"])
    assert [(s.task, s.before, s.after, s.error, s.forgotten) for s in scores] == [
        ("sums", 0.5, 0.25, 0.1, 0.25),
        ("text", 9.0, 12.0, None, 3.0),
    ]
    assert [s.forgotten for s in compared(after, RESULT, ["text"])] == [None, 0.0]


def test_invalid_requests(run, world, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    missing = ["--tasks", "x", "--base", tmp_path / "none", "--json"]
    assert "none: no such" in run("eval", world / "sparse", *missing, expect=2).said["error"]["message"]
    monkeypatch.setattr("sparse_peft.cli.eval.find_spec", lambda name: None)
    assert "lm-eval" in run("eval", world / "sparse", "--tasks", "x", "--json", expect=2).said["error"]["message"]


@pytest.mark.slow
def test_eval_is_what_the_models_compute(run, stand_in, tmp_path):
    pytest.importorskip("lm_eval")
    count = sums_task(tmp_path)
    torch.manual_seed(1)
    config = SparseConfig(density=0.5, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(stand_in), config).save_pretrained(tmp_path / "adapter")
    options = ["--include-path", tmp_path, "--dtype", "float32", "--keep", "sums"]
    said = run("eval", tmp_path / "adapter", "--tasks", "", *options, "--json").said
    (score,) = said["scores"]
    tokenizer = AutoTokenizer.from_pretrained(stand_in)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stand_in), tmp_path / "adapter").eval()
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]

    def accuracy():
        return (
            sum(
                log_likelihood(model, tokenizer, row["q"], row["c"][0])
                > log_likelihood(model, tokenizer, row["q"], row["c"][1])
                for row in rows
            )
            / count
        )

    assert score["after"] == pytest.approx(accuracy())
    with model.disable_adapter():
        assert score["before"] == pytest.approx(accuracy())
    assert score["forgotten"] == max(0, score["before"] - score["after"]) and score["before"] != score["after"]
    assert "forgotten" in run("eval", tmp_path / "adapter", "--tasks", "sums", *options).out
    assert "no task nope" in run("eval", tmp_path / "adapter", "--tasks", "nope", *options, expect=2).err
