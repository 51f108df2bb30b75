"""LT-SFT: the entries that full training moves most are trained again, alone, for two texts; the adapters add up.

`python -m examples.lottery_ticket` needs what `make venv` installs. SmolLM2-135M-Instruct reads the King James Bible
and Python's documentation, each in two phases, and both adapters are composed (https://arxiv.org/abs/2110.07560). It
exits with 1 if the first phase leaves a trace in the model, or if the sum of both does not know both texts better.
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
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
from sparse_peft import SparseConfig, select_support
from sparse_peft.adapters import compose, lottery_ticket


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each phase, of 2 blocks.")] = 20,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 64,
    unseen: Annotated[int, typer.Option(min=1, help="Held-out blocks of each text.")] = 8,
    density: Annotated[float, typer.Option(help="Share of the linear layers' weights that an adapter keeps.")] = 0.02,
    full_rate: Annotated[float, typer.Option(help="AdamW's learning rate in the first phase.")] = 5e-5,
    learning_rate: Annotated[float, typer.Option(help="AdamW's learning rate in the second phase.")] = 1e-3,
) -> None:
    """Train two lottery tickets and compose them."""
    transformers_logging.disable_progress_bar()
    tokenizer, base = load_tokenizer(), load_model()
    base.get_input_embeddings().requires_grad_(False)  # the first phase trains what requires gradients
    before = copy.deepcopy(base.state_dict())
    texts = {"bible": kjv_text(), "python": python_topics()}
    train = {
        t: pack_blocks(tokenizer, split_paragraphs(text, "train"), length, 2 * steps) for t, text in texts.items()
    }
    held = {t: pack_blocks(tokenizer, split_paragraphs(text, "heldout"), length, unseen) for t, text in texts.items()}
    losses, rows = {}, []

    def measure(name: str, model: torch.nn.Module) -> None:
        losses[name] = {text: held_out_loss(model, blocks) for text, blocks in held.items()}
        rows.append([name, *(f"{losses[name][text]:.4f}" for text in texts)])

    measure("base model", base)
    with tempfile.TemporaryDirectory() as folder:
        for text, blocks in train.items():
            found = lottery_ticket(
                base, lambda model, blocks=blocks: train_on_blocks(model, blocks, steps, full_rate), density=density
            )
            config = select_support(base, SparseConfig(selection="given", scale=1.0), supports=found)
            model = get_peft_model(base, config)
            train_on_blocks(model, blocks, steps, learning_rate)
            measure(f"ticket of {text}", model)
            model.save_pretrained(Path(folder, text))
            base = model.unload()
        rewound = all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
        compose([Path(folder, text) for text in texts], Path(folder, "both"))
        measure("both tickets", PeftModel.from_pretrained(base, Path(folder, "both")))
    show_table("Held-out loss", ["", *texts], rows)
    at_first = losses["base model"]
    report_checks(
        {
            "the base model is as it was, bit for bit": rewound,
            "each ticket knows its text better": all(losses[f"ticket of {t}"][t] < at_first[t] for t in texts),
            "the sum knows both texts better": all(losses["both tickets"][t] < at_first[t] for t in texts),
        }
    )


if __name__ == "__main__":
    typer.run(main)
