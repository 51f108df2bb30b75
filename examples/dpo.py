"""Preferences with TRL's DPO: verses of the King James Bible are to go on as they do, not as Python's documentation.

`python -m examples.dpo` needs what `make venv` installs. No second model is loaded: the reference is the base model
with the adapter disabled, which gives its weights back bit for bit. Exits with 1 if unseen pairs were not learnt.
"""

from __future__ import annotations

import os
import tempfile
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import

import torch
import typer
from datasets import Dataset
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

from examples.results import console, report_checks, show_table
from examples.smollm2 import kjv_blocks, load_model, load_tokenizer, pack_blocks, python_topics, split_paragraphs
from sparse_peft import SparseConfig, SparsityCallback


def preference_pairs(tokenizer, split: str, count: int, length: int) -> Dataset:
    """So many prompts with the passage's own continuation and, as the rejected one, a piece of the documentation."""
    blocks = kjv_blocks(tokenizer, 2 * length, split, count)
    others = pack_blocks(tokenizer, split_paragraphs(python_topics(), split), length, count)
    columns = {
        "prompt": [block[:length] for block in blocks],
        "chosen": [block[length:] for block in blocks],
        "rejected": others,
    }
    return Dataset.from_dict({name: [tokenizer.decode(ids) for ids in rows] for name, rows in columns.items()})


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Pairs of a step.")] = 4,
    length: Annotated[int, typer.Option(min=4, help="Tokens of a prompt, and of a continuation.")] = 24,
    unseen: Annotated[int, typer.Option(min=1, help="Held-out pairs.")] = 16,
    density: Annotated[float, typer.Option(help="Share of the weights that trains.")] = 0.01,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 2e-4,
) -> None:
    """Train SmolLM2-135M-Instruct on preferences between continuations."""
    transformers_logging.disable_progress_bar()
    model, tokenizer = load_model(), load_tokenizer()
    probe = torch.tensor(kjv_blocks(tokenizer, 16, "heldout", 1))
    with torch.no_grad():
        own = model(probe).logits
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            args=DPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                per_device_eval_batch_size=batch,
                learning_rate=learning_rate,
                max_length=2 * length + 8,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=max(1, steps // 4),
            ),
            train_dataset=preference_pairs(tokenizer, "train", steps * batch, length),
            eval_dataset=preference_pairs(tokenizer, "heldout", unseen, length),
            processing_class=tokenizer,
            peft_config=SparseConfig(density=density, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[SparsityCallback()],
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    kinds = {"loss": "eval_loss", "reward margin": "eval_rewards/margins", "accuracy": "eval_rewards/accuracies"}
    rows = [[kind, f"{before[key]:.4f}", f"{after[key]:.4f}"] for kind, key in kinds.items()]
    show_table(f"DPO, {unseen} unseen pairs", ["", "before", "after"], rows)
    tuned = trainer.model.eval()
    with torch.no_grad(), tuned.disable_adapter():
        restored = torch.equal(tuned(probe).logits, own)
    console.print(f"{density:.1%} of the linear layers' weights trained; no second model")
    report_checks(
        {
            "the loss of unseen pairs fell": after["eval_loss"] < before["eval_loss"],
            "unseen pairs: the preferred continuation gained on the other": after["eval_rewards/margins"] > 0,
            "adapter disabled: the reference's logits, bit for bit": restored,
        }
    )


if __name__ == "__main__":
    typer.run(main)
