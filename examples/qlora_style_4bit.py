"""A sparse adapter on a base in 4 bits (bitsandbytes NF4, double quantisation), as QLoRA has LoRA on one.

`python -m examples.qlora_style_4bit` needs what `make venv` installs. The entries are set in the buffer that a layer's
weight is dequantised to anyway; the packed weights are only read. Exits with 1 if the loss did not fall, or if a
packed weight changed in a single bit.
"""

from __future__ import annotations

import os
import tempfile
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import

import torch
import typer
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from examples.results import report_checks, show_table
from examples.smollm2 import held_out_loss, kjv_blocks, load_model, load_tokenizer, train_on_blocks
from sparse_peft import SparseConfig


def in_four_bits(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        dtype=torch.float32,
    )


def packed_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The packed weights, by names that are the same with and without an adapter."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    return {name.replace("base_model.model.", "").replace(".base_layer", ""): tensor for name, tensor in kept.items()}


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 2 blocks.")] = 20,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 64,
    unseen: Annotated[int, typer.Option(min=1, help="Held-out blocks.")] = 8,
    density: Annotated[float, typer.Option(help="Share of the weights that trains.")] = 0.01,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 2e-4,
) -> None:
    """Train SmolLM2-135M-Instruct in NF4 on the King James Bible."""
    transformers_logging.disable_progress_bar()
    tokenizer, dense = load_tokenizer(), load_model()
    train = kjv_blocks(tokenizer, length, "train", 2 * steps)
    held_out = kjv_blocks(tokenizer, length, "heldout", unseen)
    dense_bytes, dense_loss = dense.get_memory_footprint(), held_out_loss(dense, held_out)
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        del dense
        base = in_four_bits(folder)
        own, packed_bytes = packed_weights(base), base.get_memory_footprint()
        config = SparseConfig(density=density, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        # not before: at a pass in evaluation mode bitsandbytes may repack a base for its CPU and round its scales
        with model.disable_adapter():
            before = held_out_loss(model, held_out)
        train_on_blocks(model, train, steps, learning_rate)
        after = held_out_loss(model, held_out)
        model.save_pretrained(f"{folder}/adapter", save_embedding_layers=False)
        reloaded = held_out_loss(PeftModel.from_pretrained(in_four_bits(folder), f"{folder}/adapter"), held_out)
        found = packed_weights(model)
    rows = [
        ["dense, float32", f"{dense_bytes / 1e6:.0f}", f"{dense_loss:.4f}"],
        ["NF4", f"{packed_bytes / 1e6:.0f}", f"{before:.4f}"],
        [f"NF4, {density:.1%} trained for {steps} steps", f"{packed_bytes / 1e6:.0f}", f"{after:.4f}"],
    ]
    show_table("SmolLM2-135M-Instruct on the King James Bible", ["base", "MB", "held-out loss"], rows)
    report_checks(
        {
            "the held-out loss fell": after < before,
            "the packed weights are as they were, bit for bit": bool(own)
            and own.keys() == found.keys()
            and all(torch.equal(own[name], found[name]) for name in own),
            "the saved adapter on a fresh 4-bit base: the same loss": abs(reloaded - after) < 1e-5,
        }
    )


if __name__ == "__main__":
    typer.run(main)
