"""``python -m benchmarks.digits``: procedures, tasks and few data on scikit-learn's digits, in seconds a run.

A residual network of six blocks learns digits that are turned by 90 degrees. Adapters then learn upright ones:

- ``procedures``: with and without each procedure, at the best of three rates, three seeds; also what is left of the
  turned digits.
- ``families``: other forms of adapters with as many trained parameters, likewise.
- ``tasks``: three tasks one after the other, in one adapter, and with an adapter each on entries of its own.
- ``few``: 100 examples; more weight decay, and averages of seeds.

A small network on small pictures: it shows that something works, and not how well it does on a language model.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from sparse_peft import (
    MonarchConfig,
    SLTrainConfig,
    SparseConfig,
    SparseIFTConfig,
    SSTConfig,
)
from sparse_peft.adapters import TaskSupports, soup
from sparse_peft.procedures import (
    FisherAnchor,
    GradientMask,
    ImportanceLearningRate,
    LayerSampling,
    Procedure,
    SplitMerge,
)

from .quality.training import controller_of
from .report import environment, write_json

RESULTS = Path(__file__).parent / "results" / "digits-cpu.json"
TARGETS = ["up", "down"]
SEEDS = (0, 1, 2)
RATES = (1e-3, 3e-3, 1e-2)
Data = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, seed: int = 0, width: int = 64, blocks: int = 6):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return self.head(x)


def digits() -> tuple[Data, Data]:
    """1,200 for training and 597 for the result, in an order that is always the same."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (an optional package)

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def turned(data: Data) -> Data:
    x, y = data
    return x.view(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64), y


def loss_of(model: nn.Module, batch: Data) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module, data: Data, rate: float, seed: int, steps: int = 200, decay: float = 0.0,
    procedures: Sequence[Procedure] = (),
) -> None:  # fmt: skip
    """AdamW with a rate that falls to zero, batches of 32."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=decay)
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    controller = controller_of(model, optimizer, steps, procedures)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, len(data[1]), (32,), generator=generator)
        loss_of(model.train(), (data[0][rows], data[1][rows])).backward()
        optimizer.step()
        if controller is not None:
            controller.step()
        falls.step()
        optimizer.zero_grad()
    if controller is not None:
        controller.close()


@torch.no_grad()
def judge(model: nn.Module, data: Data) -> tuple[float, float]:
    """Accuracy and loss."""
    output = model.eval()(data[0])
    return float((output.argmax(1) == data[1]).float().mean()), float(F.cross_entropy(output, data[1]))


def spread(values: Sequence[float]) -> dict[str, float]:
    found = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(found.mean()), "std": float(found.std()) if len(values) > 1 else 0.0}


# ------------------------------------------------------------------ experiments


CONFIGS: dict[str, Callable[[int], Any]] = {
    "lora": lambda seed: LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "sparse": lambda seed: SparseConfig(r=4, seed=seed, target_modules=TARGETS),
}


# as many trained parameters as LoRA of rank 4, but for SST's singular values
FAMILIES: dict[str, Callable[[int], Any]] = CONFIGS | {
    "monarch": lambda seed: MonarchConfig(nblocks=4, blk_r=4, target_modules=TARGETS),
    "sparse-ift": lambda seed: SparseIFTConfig(
        r=4, sparsity=0.75, reselect_every=20, seed=seed, target_modules=TARGETS
    ),
    "doped": lambda seed: SLTrainConfig(r=4, doped=0.5, seed=seed, target_modules=TARGETS),
    "sst": lambda seed: SSTConfig(r=4, resample_every=20, seed=seed, target_modules=TARGETS),
}


def around(held: Data, old: Data) -> dict[str, list[Procedure]]:
    """Rows of procedures, with rows set aside and rows of the old task."""
    parts = [(old[0][n : n + 32], old[1][n : n + 32]) for n in range(0, 128, 32)]
    return {
        "none": [],
        "LayerSampling ist": [LayerSampling("ist", batches=[held], loss_fn=loss_of)],
        "LayerSampling random": [LayerSampling("random")],
        "SplitMerge": [SplitMerge(4, parameters="lora_B|values")],
        "ImportanceLearningRate": [ImportanceLearningRate(parts, loss_of, every=50)],
        "FisherAnchor": [FisherAnchor(parts, loss_of, weight=1e4)],
        "FisherAnchor, no pull": [FisherAnchor(weight=0.0)],
        "GradientMask": [GradientMask(0.8)],
    }


Rows = dict[str, Callable[[], dict[str, Any]]]


def upright(
    base: nn.Module, data: Data, test: Data, config: Callable[[int], Any], procedures: Sequence[Procedure] = ()
) -> dict[str, Any]:
    """Upright digits from 300 examples: learnt, and kept of the turned ones, at the best of the rates."""
    small, trained = (data[0][:300], data[1][:300]), 0

    def run(rate: float, seed: int) -> tuple[float, float]:
        nonlocal trained
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), config(seed))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        train(model, small, rate, seed, procedures=procedures)
        return judge(model, test)[0], judge(model, turned(test))[0]

    tried = {rate: run(rate, 0) for rate in RATES}
    rate = max(tried, key=lambda one: tried[one][0])
    runs = [tried[rate], *(run(rate, seed) for seed in SEEDS[1:])]
    learnt, kept = (spread(values) for values in zip(*runs, strict=True))
    return {"rate": rate, "trained": trained, "learnt": learnt, "kept": kept}


def procedures(base: nn.Module, data: Data, test: Data) -> Rows:
    """With and without each procedure."""
    known = around((data[0][300:332], data[1][300:332]), turned(data))
    return {
        f"{adapter}, {name}": partial(upright, base, data, test, config, found)
        for adapter, config in CONFIGS.items()
        for name, found in known.items()
    }


def families(base: nn.Module, data: Data, test: Data) -> Rows:
    """Without procedures, with other adapters."""
    return {name: partial(upright, base, data, test, config) for name, config in FAMILIES.items()}


def shuffled(data: Data, task: int) -> Data:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(task))
    return data[0][:, order], data[1]


def tasks(data: Data, test: Data) -> Rows:
    """Three orders of the pixels, one after the other, on a random base whose head trains, too."""

    def config(density: float, seed: int, allocation: str = "numel") -> SparseConfig:
        targets = [*TARGETS, "head"]
        return SparseConfig(density=density, allocation=allocation, seed=seed, scale=1.0, target_modules=targets)

    def apart(density: float, allocation: str, seed: int) -> list[float]:
        supports = TaskSupports(Net(seed), config(density, seed, allocation))
        for task in range(3):
            train(supports.add(f"task {task}"), shuffled(data, task), 5e-3, seed)
        found = []
        for task in range(3):
            supports.activate(f"task {task}")
            found.append(judge(supports.model, shuffled(test, task))[0])
        return found

    def in_one(density: float, seed: int) -> list[float]:
        model = get_peft_model(Net(seed), config(density, seed))
        for task in range(3):
            train(model, shuffled(data, task), 5e-3, seed)
        return [judge(model, shuffled(test, task))[0] for task in range(3)]

    def row(run: Callable[[int], list[float]]) -> dict[str, Any]:
        try:
            means = torch.tensor([run(seed) for seed in SEEDS])
        except ValueError as error:  # a layer is full
            return {"refused": str(error)}
        return {"accuracy": spread(means.mean(1).tolist()), "worst": float(means.mean(0).min())}

    rows = {
        f"{allocation}, {density}": partial(row, partial(apart, density, allocation))
        for density in (0.01, 0.03, 0.1, 0.3)
        for allocation in ("numel", "erk")
    }
    return rows | {"one adapter, 0.1": partial(row, partial(in_one, 0.1))}


def few(base: nn.Module, data: Data, test: Data) -> Rows:
    """100 examples: weight decay, and the average of three seeds on one support."""
    small = data[0][:100], data[1][:100]

    def row(decay: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            singles, folders = [], [f"{folder}/{seed}" for seed in SEEDS]
            for seed, saved in zip(SEEDS, folders, strict=True):
                config = SparseConfig(density=0.2, scale=1.0, target_modules=TARGETS)
                model = get_peft_model(copy.deepcopy(base), config)
                train(model, small, 3e-3, seed, decay=decay)
                singles.append(judge(model, test))
                model.save_pretrained(saved)
            soup(folders, f"{folder}/soup")
            mixed = judge(PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/soup"), test)
        accuracy, loss = (spread(values) for values in zip(*singles, strict=True))
        return {"accuracy": accuracy, "loss": loss, "soup": {"accuracy": mixed[0], "loss": mixed[1]}}

    return {f"decay {decay:g}": partial(row, decay) for decay in (0.0, 0.1, 1.0, 10.0)}


def main(
    experiment: Annotated[
        list[str] | None, typer.Option(help="Of procedures, families, tasks, few; all by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON file; rows that it has are not run again.")] = RESULTS,
) -> None:
    """Train small adapters on digits."""
    data, test = digits()
    base = Net()
    train(base, turned(data), 2e-3, 0, steps=600)
    known = {
        "procedures": procedures(base, data, test),
        "families": families(base, data, test),
        "tasks": tasks(data, test),
        "few": few(base, data, test),
    }
    content: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    content |= {"format": 1, "environment": environment(torch.device("cpu"))}
    content["base"] = {"turned": judge(base, turned(test))[0], "upright": judge(base, test)[0]}
    for name in experiment or known:
        rows = content.setdefault(name, {})
        for key, make in known[name].items():
            if key not in rows:
                rows[key] = make()
                print(name, key, rows[key], flush=True)
                write_json(out, content)


if __name__ == "__main__":
    typer.run(main)
