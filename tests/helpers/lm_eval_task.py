"""A tiny task for lm-eval, and what it measures."""

import json
from pathlib import Path

import torch

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{c}}"
doc_to_target: "{{y}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def sums_task(folder: Path) -> int:
    """Write the task "sums" into a folder; returns the number of its questions."""
    rows = [{"q": f"{a} + {b} =", "c": [f" {a + b}", f" {a + b + 1}"], "y": 0} for a in range(3) for b in range(4)]
    data = folder / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "sums.yaml").write_text(TASK.replace("DATA", str(data)))
    return len(rows)


@torch.no_grad()
def log_likelihood(model, tokenizer, question: str, answer: str) -> float:
    """Log-likelihood of an answer's tokens after the question's."""
    start = len(tokenizer(question)["input_ids"])
    tokens = tokenizer(question + answer, return_tensors="pt")["input_ids"]
    scores = model(tokens).logits.double().log_softmax(-1)[0, start - 1 : -1]
    return float(scores.gather(1, tokens[0, start:, None]).sum())
