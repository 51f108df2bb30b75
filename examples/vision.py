"""A small vision transformer that knows the digits 0 to 4 learns 5 to 9 with a sparse adapter, in a minute on a CPU.

    pip install scikit-learn
    python -m examples.vision

The images are scikit-learn's 1,797 handwritten digits. Each method trains a share of the encoder and the classifier
whole; what is compared is the classifier alone. Exits with 1 if an adapter brings nothing, or if the known digits are
not there any more, bit for bit, once it is disabled.
"""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from peft import get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from examples.results import report_checks, show_table
from sparse_peft import S2FTConfig, SparseConfig

KNOWN = 5


def digits() -> tuple[Tensor, Tensor]:
    """``(1797, 1, 8, 8)`` pixels in [-1, 1] and their labels, in an order that says nothing."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  (an optional package)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            "scikit-learn, whose digits these are, is missing: pip install scikit-learn"
        ) from error

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    return pixels[order], torch.from_numpy(data.target).long()[order]


def vision_transformer() -> ViTForImageClassification:
    sizes = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=KNOWN, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return ViTForImageClassification(config)


def train(model: nn.Module, pixels: Tensor, labels: Tensor, epochs: int, learning_rate: float, seed: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=order).split(64):
            F.cross_entropy(model(pixels[chosen]).logits, labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    return (model(pixels).logits.argmax(1) == labels).float().mean().item()


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Of pretraining on 0 to 4, and of each adapter on 5 to 9.")] = 15,
    learning_rate: Annotated[float, typer.Option(help="Of the adapters.")] = 1e-2,
    seed: Annotated[int, typer.Option(help="Of the first weights, and of the data's order.")] = 0,
) -> None:
    """Teach a small vision transformer new digits."""
    torch.manual_seed(seed)
    pixels, labels = digits()
    tasks = [
        (pixels[labels < KNOWN], labels[labels < KNOWN]),
        (pixels[labels >= KNOWN], labels[labels >= KNOWN] - KNOWN),
    ]
    parts = [
        [part[: 2 * len(part) // 3] for part in task] + [part[2 * len(part) // 3 :] for part in task] for task in tasks
    ]
    (x, y, x_known, y_known), (x_new, y_new, unseen, unseen_labels) = parts
    base = vision_transformer()
    train(base, x, y, epochs, 1e-3, seed)
    known, own = accuracy(base, x_known, y_known), base(x_known).logits.detach()

    head = copy.deepcopy(base).requires_grad_(False)
    head.classifier.requires_grad_(True)
    train(head, x_new, y_new, epochs, learning_rate, seed)
    rows = [["classifier alone", f"{sum(p.numel() for p in head.classifier.parameters()):,}"]]
    found = {"classifier alone": accuracy(head, unseen, unseen_labels)}
    checks = {"the base knows the digits 0 to 4": known > 0.9}
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "classifier"]
    whole = {"target_modules": linear, "modules_to_save": ["classifier"]}
    for name, config in {
        "sparse delta, 5 %": SparseConfig(density=0.05, scale=1.0, **whole),
        "S²FT, 10 %": S2FTConfig(ratio=0.1, side="in", scale=1.0, **whole),
    }.items():
        model = get_peft_model(copy.deepcopy(base), config)
        train(model, x_new, y_new, epochs, learning_rate, seed)
        found[name] = accuracy(model, unseen, unseen_labels)
        rows.append([name, f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"])
        with torch.no_grad(), model.disable_adapter():
            restored = torch.equal(model(x_known).logits, own)
        checks[f"{name}: more of the new digits than the classifier alone"] = found[name] > found["classifier alone"]
        checks[f"{name}, disabled: the base's logits, bit for bit"] = restored
    for row in rows:
        row.append(f"{found[row[0]]:.1%}")
    show_table(f"{len(unseen)} unseen images of 5 to 9 (0 to 4: {known:.1%})", ["", "trained", "accuracy"], rows)
    report_checks(checks)


if __name__ == "__main__":
    typer.run(main)
