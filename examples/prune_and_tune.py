"""Half of a model's weights become zero, in two ways that recover some of what that costs and keep the zeros.

`python -m examples.prune_and_tune` needs what `make venv` installs. First a recipe of `PruneConfig` chooses zeros of
SmolLM2-135M-Instruct while it trains; the dense model teaches it. Then Wanda prunes the model block by block, and
`SparseConfig(selection="nonzero")` trains weights that are left, and is merged. Exits with 1 if training did not lower
the loss, a zero of a merged model is none, the recipe changed the dense model, or a file has other masks.
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
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from examples.results import report_checks, show_table
from examples.smollm2 import held_out_loss, kjv_blocks, load_model, load_tokenizer, train_on_blocks
from sparse_peft import PruneConfig, SparseConfig, SparsityCallback, adapter_masks
from sparse_peft.procedures import DistillationLoss
from sparse_peft.sparsify import Masks, prune


def distilled(
    model: PreTrainedModel, recipe: str, pattern: str, blocks: list[list[int]], steps: int, rate: float
) -> PeftModel:
    """Train low rank while the recipe chooses the mask; the teacher is the same model with its adapter off."""
    every = max(1, steps // 8)
    config = PruneConfig(recipe=recipe, pattern=pattern, r=16, mask_every=every, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    loss_fn = DistillationLoss(adapted, ce=0.33, kl=0.67)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=rate, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        rows = [{"input_ids": block, "labels": block} for block in blocks]
        callbacks = [SparsityCallback()]
        Trainer(adapted, arguments, train_dataset=rows, callbacks=callbacks, compute_loss_func=loss_fn).train()
    loss_fn.close()
    return adapted.eval()


def main(
    pattern: Annotated[str, typer.Option(help="n:m, n weights kept of m.")] = "2:4",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 2 blocks.")] = 20,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 64,
    unseen: Annotated[int, typer.Option(min=1, help="Held-out blocks.")] = 8,
    density: Annotated[float, typer.Option(help="Share of the weights that trains.")] = 0.05,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 2e-4,
    recipe: Annotated[str, typer.Option(help="Of PruneConfig: ast, mdgf, static and others.")] = "ast",
) -> None:
    """Prune SmolLM2-135M-Instruct and train it on the King James Bible."""
    transformers_logging.disable_progress_bar()
    tokenizer, model = load_tokenizer(), load_model()
    train = kjv_blocks(tokenizer, length, "train", 2 * steps)
    held_out = kjv_blocks(tokenizer, length, "heldout", unseen)
    dense, weights = held_out_loss(model, held_out), copy.deepcopy(model.state_dict())
    adapted = distilled(model, recipe, pattern, train, steps, learning_rate)
    chosen = adapter_masks(adapted)
    merged = copy.deepcopy(adapted).merge_and_unload()
    with_recipe, kept = held_out_loss(merged, held_out), not chosen.broken(merged)
    model = adapted.unload()
    is_back = all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
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
        [f"{pattern}, Wanda, {steps} steps of a sparse adapter, merged", f"{masks.density:.0%}", f"{after:.4f}"],
        [
            f"{pattern}, {steps} steps of {recipe} with distillation, merged",
            f"{chosen.density:.0%}",
            f"{with_recipe:.4f}",
        ],
    ]
    show_table("SmolLM2-135M-Instruct on the King James Bible", ["model", "weights", "held-out loss"], rows)
    report_checks(
        {
            "training lowered the loss of the pruned model": after < before,
            "the merged model has all zeros of the pruned one": not masks.broken(merged),
            "the recipe's merged model has all zeros of its mask": kept,
            "the recipe left the dense model as it was": is_back,
            f"the masks in a file of {size / 1e6:.2f} MB are the model's": not read.broken(merged)
            and all(torch.equal(mask.bits, masks.layers[name].bits) for name, mask in read.layers.items()),
        }
    )


if __name__ == "__main__":
    typer.run(main)
