"""Half of a model's weights become zero, and a sparse adapter recovers some of what that costs, keeping the zeros.

`python -m examples.prune_and_tune` needs what `make venv` installs. Wanda prunes SmolLM2-135M-Instruct block by block;
`SparseConfig(selection="nonzero")` then trains weights that are left, and is merged. Exits with 1 if the loss did not
fall, if a zero of the merged model is none, or if the masks of the file are not those of the model.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import

import torch
import typer
from peft import get_peft_model
from transformers.utils import logging as transformers_logging

from examples.results import report_checks, show_table
from examples.smollm2 import held_out_loss, kjv_blocks, load_model, load_tokenizer, train_on_blocks
from sparse_peft import SparseConfig
from sparse_peft.sparsify import Masks, prune


def main(
    pattern: Annotated[str, typer.Option(help="n:m, n weights kept of m.")] = "2:4",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 2 blocks.")] = 20,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 64,
    unseen: Annotated[int, typer.Option(min=1, help="Held-out blocks.")] = 8,
    density: Annotated[float, typer.Option(help="Share of the weights that trains.")] = 0.05,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 2e-4,
) -> None:
    """Prune SmolLM2-135M-Instruct and train it on the King James Bible."""
    transformers_logging.disable_progress_bar()
    tokenizer, model = load_tokenizer(), load_model()
    train = kjv_blocks(tokenizer, length, "train", 2 * steps)
    held_out = kjv_blocks(tokenizer, length, "heldout", unseen)
    dense = held_out_loss(model, held_out)
    batches = [{"input_ids": torch.tensor([block]), "use_cache": False} for block in train]
    masks = prune(model, pattern, "wanda", calibration=batches, progress=False)
    before = held_out_loss(model, held_out)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "masks.safetensors")
        masks.save(file)
        size, read = file.stat().st_size, Masks.load(file)
    config = SparseConfig(selection="nonzero", density=density, target_modules=list(masks.layers))
    adapted = get_peft_model(model, config)
    train_on_blocks(adapted, train, steps, learning_rate)
    merged = adapted.merge_and_unload()
    after = held_out_loss(merged, held_out)
    rows = [
        ["dense", "100 %", f"{dense:.4f}"],
        [f"{pattern}, Wanda", f"{masks.density:.0%}", f"{before:.4f}"],
        [f"{pattern}, {steps} steps of a sparse adapter, merged", f"{masks.density:.0%}", f"{after:.4f}"],
    ]
    show_table("SmolLM2-135M-Instruct on the King James Bible", ["model", "weights", "held-out loss"], rows)
    report_checks(
        {
            "training lowered the loss of the pruned model": after < before,
            "the merged model has all zeros of the pruned one": not masks.broken(merged),
            f"the masks in a file of {size / 1e6:.2f} MB are the model's": not read.broken(merged)
            and all(torch.equal(mask.bits, masks.layers[name].bits) for name, mask in read.layers.items()),
        }
    )


if __name__ == "__main__":
    typer.run(main)
