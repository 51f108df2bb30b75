"""Train the experts of a mixture-of-experts model, made by upcycling SmolLM2's feed-forward blocks.

`python -m examples.experts` needs what `make venv` installs. Every feed-forward block of SmolLM2-135M-Instruct is
copied into several experts of a Mixtral with a small random router (sparse upcycling,
https://arxiv.org/abs/2212.05055). The copies are alike and their weights add up to 1, so that the mixture computes
what the dense model does. Then 1 % of the experts' entries train with TRL on the King James Bible, those of each
expert on the tokens routed to it, and the adapter is saved and loaded again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes out of installed packages; read on import

import torch
import typer
from datasets import Dataset
from peft import PeftModel
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from examples.results import report_checks, show_table
from examples.smollm2 import held_out_loss, kjv_blocks, load_model, load_tokenizer
from sparse_peft import SparseConfig
from sparse_peft.tuners.base_model import BaseSparseModel


@torch.no_grad()
def upcycle(dense: LlamaForCausalLM, experts: int, top_k: int, seed: int = 0) -> MixtralForCausalLM:
    """A Mixtral with the weights of a Llama; every expert is a copy of the feed-forward block.

    Args:
        dense: the Llama; its tensors are copied.
        experts: copies of each feed-forward block.
        top_k: experts of each token.
        seed: of the routers.
    """
    kept = dense.config.to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters",
             "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    fields = {name: kept[name] for name in sizes if kept.get(name) is not None}
    torch.manual_seed(seed)
    # the router stays as it is, and no loss has to balance it
    fields |= {"num_local_experts": experts, "num_experts_per_tok": top_k, "router_aux_loss_coef": 0.0}
    config = MixtralConfig(**fields, sliding_window=None)
    model = MixtralForCausalLM(config)
    state = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(".mlp." not in name for name in missing if name != "lm_head.weight"):
        raise ValueError(f"the dense model has tensors that a Mixtral has not: {unexpected or missing}")
    for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
        gate_up = torch.cat([theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight])
        ours.mlp.experts.gate_up_proj.copy_(gate_up.expand(experts, -1, -1))
        ours.mlp.experts.down_proj.copy_(theirs.mlp.down_proj.weight.expand(experts, -1, -1))
    model.name_or_path = model.config.name_or_path = "upcycled"
    return model.eval()


def train(
    model: MixtralForCausalLM, blocks: list[list[int]], config: SparseConfig, steps: int, rate: float
) -> PeftModel:
    """The model with an adapter, trained with TRL."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=rate,
                max_length=len(blocks[0]), gradient_checkpointing=False, use_cpu=True, bf16=False,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=max(1, steps // 5),
            ),
            train_dataset=Dataset.from_dict({"input_ids": blocks}),
            processing_class=load_tokenizer(),
            peft_config=config,
        )  # fmt: skip
        trainer.train()
        return trainer.model


def experts_with_entries(model: PeftModel) -> list[int]:
    """The number of trained experts in each adapted parameter."""
    found = []
    for layer in BaseSparseModel.sparse_layers(model):
        rows = layer.stored_shape[0] // layer.matrices
        found.append(len((layer.support("default").rows // rows).unique()))
    return found


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps, of 2 blocks.")] = 40,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 96,
    unseen: Annotated[int, typer.Option(min=1, help="Held-out blocks.")] = 12,
    experts: Annotated[int, typer.Option(min=2, help="Copies of each feed-forward block.")] = 4,
    density: Annotated[float, typer.Option(help="Share of the experts' entries that trains.")] = 0.01,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, falling linearly to 0.")] = 2e-4,
) -> None:
    """Upcycle SmolLM2 to a mixture of experts, train entries of its experts, save and load them."""
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer()
    blocks = kjv_blocks(tokenizer, length, "train", 2 * steps)
    held_out = kjv_blocks(tokenizer, length, "heldout", unseen)
    dense = load_model()
    losses = {"dense model": held_out_loss(dense, held_out)}
    mixture = upcycle(dense, experts, top_k=2)
    losses["upcycled model"] = held_out_loss(mixture, held_out)
    config = SparseConfig(density=density, target_modules=[], target_experts=True, task_type="CAUSAL_LM")
    model = train(mixture, blocks, config, steps, learning_rate)
    losses["trained experts"] = held_out_loss(model, held_out)
    trained = experts_with_entries(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        del model, mixture
        again = PeftModel.from_pretrained(upcycle(dense, experts, top_k=2), folder)
    losses["loaded from its file"] = held_out_loss(again, held_out)
    entries = sum(layer.support("default").nnz for layer in BaseSparseModel.sparse_layers(again))
    show_table(
        f"{experts} experts for each feed-forward block; {entries:,} entries, a file of {size / 1e6:.2f} MB",
        ["", "held-out loss"],
        [[name, f"{loss:.4f}"] for name, loss in losses.items()],
    )
    report_checks(
        {
            "the mixture starts as the dense model": abs(losses["upcycled model"] - losses["dense model"]) < 1e-3,
            "the held-out loss fell": losses["trained experts"] < losses["upcycled model"],
            "every expert trains": all(number == experts for number in trained),
            "the file restores the model": losses["loaded from its file"] == losses["trained experts"],
        }
    )


if __name__ == "__main__":
    typer.run(main)
