"""Federated training: clients train one adapter each on text of their own, and the server averages the adapters.

`python -m examples.federated` needs what `make venv` installs. All clients train the same entries, which their common
seed determines, so that a client sends values without positions, and the average of the adapters is exactly the
average of the models. The average of LoRA's factors is not: the example measures how far it is off. Exits with 1 if a
claim does not hold.
"""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import

import torch
import typer
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from examples.results import report_checks, show_table
from examples.smollm2 import (
    held_out_loss,
    kjv_text,
    load_model,
    load_tokenizer,
    pack_blocks,
    split_paragraphs,
    train_on_blocks,
)
from sparse_peft import SparseConfig
from sparse_peft.adapters import soup
from sparse_peft.tuners.base_model import BaseSparseModel


def parts(paragraphs: list[str], clients: int) -> list[list[str]]:
    """One stretch of the text for each client."""
    size = len(paragraphs) // clients
    return [paragraphs[n * size : (n + 1) * size] for n in range(clients)]


def trained_values(model: PeftModel) -> list[Tensor]:
    """What a client sends: each layer's values."""
    return [layer.deltas["default"].values.detach().clone() for layer in BaseSparseModel.sparse_layers(model)]


def lora_delta(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``{layer: B @ A}``."""
    layers = {name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")}
    return {name: factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"] for name in layers}


def lora_average_error(clients: Sequence[dict[str, Tensor]]) -> float:
    """How far the product of averaged factors is from the average of the products, relative to that."""
    averaged = lora_delta({name: torch.stack([c[name] for c in clients]).mean(0) for name in clients[0]})
    deltas = [lora_delta(client) for client in clients]
    error = total = 0.0
    for name, found in averaged.items():
        exact = torch.stack([delta[name] for delta in deltas]).mean(0)
        error += float((found - exact).square().sum())
        total += float(exact.square().sum())
    return (error / total) ** 0.5


def main(
    clients: Annotated[int, typer.Option(min=2, help="Number of clients.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of local training and averaging.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a client in a round, of 2 blocks.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 64,
    unseen: Annotated[int, typer.Option(min=1, help="Held-out blocks.")] = 8,
    r: Annotated[int, typer.Option(min=1, help="LoRA's rank; both adapters train as many parameters.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-3,
) -> None:
    """Train in rounds, average exactly, and compare with LoRA's average."""
    transformers_logging.disable_progress_bar()
    tokenizer, base = load_tokenizer(), load_model()
    text = kjv_text()
    own = [
        pack_blocks(tokenizer, lines, length, 2 * steps) for lines in parts(split_paragraphs(text, "train"), clients)
    ]
    held_out = pack_blocks(tokenizer, split_paragraphs(text, "heldout"), length, unseen)
    rows = [["base model", f"{held_out_loss(base, held_out):.4f}"]]
    losses = [held_out_loss(base, held_out)]
    config = SparseConfig(r=r, target_modules="all-linear", seed=0, task_type="CAUSAL_LM")

    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder, "shared")
        get_peft_model(copy.deepcopy(base), config).save_pretrained(shared)
        is_exact = True
        for number in range(rounds):
            sent: list[list[Tensor]] = []
            for client, blocks in enumerate(own):
                model = PeftModel.from_pretrained(copy.deepcopy(base), shared, is_trainable=True)
                train_on_blocks(model, blocks, steps, learning_rate)
                model.save_pretrained(Path(folder, str(client)))
                sent.append(trained_values(model))
            soup([Path(folder, str(client)) for client in range(clients)], shared)
            model = PeftModel.from_pretrained(copy.deepcopy(base), shared)
            for layer, values in enumerate(trained_values(model)):
                average = torch.stack([client[layer].double() for client in sent]).mean(0)
                is_exact &= bool(torch.allclose(values.double(), average, rtol=1e-6, atol=0))
            losses.append(held_out_loss(model, held_out))
            rows.append([f"after round {number + 1}", f"{losses[-1]:.4f}"])
        payload = sum(values.nbytes for values in sent[0])

    lora = LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    factors = [_lora_factors(base, lora, blocks, steps, learning_rate) for blocks in own]
    error, lora_payload = lora_average_error(factors), sum(t.nbytes for t in factors[0].values())
    show_table("Held-out loss of the averaged adapter", ["", "loss"], rows)
    show_table(
        "A client's message",
        ["", "sparse", "LoRA"],
        [
            ["MB a round", f"{payload / 1e6:.2f}", f"{lora_payload / 1e6:.2f}"],
            ["error of the average", "0", f"{error:.1%}"],
        ],
    )
    report_checks(
        {
            "the averaged adapter has the average of the clients' values": is_exact,
            "each round lowered the held-out loss": all(b < a for a, b in itertools.pairwise(losses)),
            "a message is no larger than LoRA's": payload <= lora_payload,
        }
    )


def _lora_factors(
    base: nn.Module, config: PeftConfig, blocks: list[list[int]], steps: int, learning_rate: float
) -> dict[str, Tensor]:
    torch.manual_seed(0)  # all clients begin with the same factors, as they would in a round
    model = get_peft_model(copy.deepcopy(base), config)
    train_on_blocks(model, blocks, steps, learning_rate)
    return get_peft_model_state_dict(model)


if __name__ == "__main__":
    typer.run(main)
