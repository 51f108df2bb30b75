"""Two tasks, one after the other: what the second does to the first, with one adapter for both and with one for each.

`python -m examples.continual` needs what `make venv` installs. SmolLM2-135M-Instruct learns the King James Bible, then
Python's documentation. With an adapter for each the second avoids the first's channels (S2FT's `avoid`): both may be
active at once, and either alone is what it was, bit for bit. Exits with 1 if that is not so.
"""

from __future__ import annotations

import copy
import os
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import

import torch
import typer
from peft import PeftModel, get_peft_model
from transformers.utils import logging as transformers_logging

from examples.results import report_checks, show_table
from examples.smollm2 import (
    held_out_loss,
    kjv_text,
    load_model,
    load_tokenizer,
    pack_blocks,
    python_topics,
    split_paragraphs,
    train_on_blocks,
)
from sparse_peft import S2FTConfig
from sparse_peft.tuners.base_model import BaseSparseModel

BIBLE, PYTHON = "bible", "python"


def overlap(model: PeftModel) -> int:
    """Number of entries that both adapters train."""
    layers = BaseSparseModel.sparse_layers(model)
    return sum(layer.support(BIBLE).intersection_size(layer.support(PYTHON)) for layer in layers)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each task, of 2 blocks.")] = 25,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 64,
    unseen: Annotated[int, typer.Option(min=1, help="Held-out blocks of each task.")] = 8,
    ratio: Annotated[float, typer.Option(help="Share of the channels that trains, for each task.")] = 0.03,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 3e-3,
) -> None:
    """Learn two tasks in a row and measure what is left of the first."""
    transformers_logging.disable_progress_bar()
    tokenizer, base = load_tokenizer(), load_model()
    texts = {BIBLE: kjv_text(), PYTHON: python_topics()}
    train = {
        t: pack_blocks(tokenizer, split_paragraphs(text, "train"), length, 2 * steps) for t, text in texts.items()
    }
    held = {t: pack_blocks(tokenizer, split_paragraphs(text, "heldout"), length, unseen) for t, text in texts.items()}
    rows, losses = [], {}

    def measure(name: str, model: torch.nn.Module) -> None:
        losses[name] = {task: held_out_loss(model, blocks) for task, blocks in held.items()}
        rows.append([name, *(f"{losses[name][task]:.4f}" for task in texts)])

    measure("base model", base)
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratio=ratio, scale=1.0), adapter_name=BIBLE)
    train_on_blocks(model, train[BIBLE], steps, learning_rate)
    measure("after the first task", model)

    one = copy.deepcopy(model)
    train_on_blocks(one, train[PYTHON], steps, learning_rate)
    measure("one adapter for both", one)
    del one

    model.add_adapter(PYTHON, S2FTConfig(ratio=ratio, avoid=[BIBLE], scale=1.0))
    model.base_model.set_adapter([BIBLE, PYTHON])
    model.set_requires_grad(BIBLE, False)
    train_on_blocks(model, train[PYTHON], steps, learning_rate)
    measure("two adapters, both active", model)
    shared = overlap(model)
    model.set_adapter(BIBLE)
    measure("two adapters, the first", model)

    first = losses["after the first task"]
    for row in rows:
        forgotten = losses[row[0]][BIBLE] - first[BIBLE]
        row.append("" if row[0] in ("base model", "after the first task") else f"{forgotten:+.4f}")
    show_table("Held-out loss", ["", "first task", "second task", "forgotten of the first"], rows)
    report_checks(
        {
            "the first task was learnt": first[BIBLE] < losses["base model"][BIBLE],
            "the second was learnt beside it": losses["two adapters, both active"][PYTHON] < first[PYTHON],
            "the two train no entry in common": shared == 0,
            "the first adapter alone: its loss to the last bit": losses["two adapters, the first"] == first,
        }
    )


if __name__ == "__main__":
    typer.run(main)
