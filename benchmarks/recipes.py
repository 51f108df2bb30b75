"""``python -m benchmarks.recipes``: each recipe of ``PruneConfig`` on a real model, with and without distillation.

Three quarters of the weights in SmolLM2-135M's upper blocks become zero while these blocks train for some steps. The
lower blocks do not change, so their outputs are computed once. Loss is that of held-out text after merging.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparse_peft import PruneConfig, adapter_masks, release_masks
from sparse_peft.procedures import DistillationLoss

from .held_out import HeldOut, check_ways
from .quality.training import controller_of

RESULTS = Path(__file__).parent / "results" / "recipes-smollm2-cpu.json"
ALONE, DISTILLED = "alone", "distilled"
# of AdamW: a delta of all weights, and factors
WEIGHTS_RATE, FACTORS_RATE = 3e-4, 1e-3
CE, KL = 0.33, 0.67  # AST's for a model of this size
HALF = 0.5


@dataclass(frozen=True)
class Way:
    """A recipe with the fields that a run of some dozen steps needs.

    Attributes:
        fields: of the config; the pattern is 2:8 where it is not another.
        rate: of AdamW.
        releases: half of the run is for weights that were zero.
    """

    fields: dict[str, Any]
    rate: float = WEIGHTS_RATE
    releases: bool = False


def _weights(recipe: str, **fields: Any) -> Way:
    return Way({"recipe": recipe, "trains": "weights", **fields})


WAYS: dict[str, Way] = {
    "static": _weights("static"),
    "static, released": Way({"recipe": "static", "trains": "weights"}, releases=True),
    "gradual": _weights("gradual", pattern=0.75),
    "ast": _weights("ast"),
    "ast, slorb": _weights("ast", slorb=16),
    # the pull is so strong that a short run still brings masked weights to zero
    "cast": _weights("cast", pull=40.0),
    "mdgf": _weights("mdgf"),
    "sdgf": _weights("sdgf"),
    "bdwp": _weights("bdwp"),
    "l1": _weights("l1"),
    "static, low rank": Way({"recipe": "static"}, FACTORS_RATE),
    "pst": Way({"recipe": "pst"}, FACTORS_RATE),
    "dsee": Way({"recipe": "dsee"}, FACTORS_RATE),
}


@dataclass(frozen=True)
class Quality:
    """One run.

    Attributes:
        way: a key of ``WAYS``.
        setting: whether a teacher helps, and the seed.
        loss, perplexity: on held-out text, of the merged model.
        zeros: share of the weights that are zero after merging.
        wanted: share that the mask has.
        filled: masked weights that are not zero after merging.
        merge_error: largest difference between the logits of the merged and the adapted model, of the largest logit.
        cpu_seconds: of the whole run.
    """

    way: str
    setting: str
    loss: float
    perplexity: float
    zeros: float
    wanted: float
    filled: int
    merge_error: float
    cpu_seconds: float


@dataclass(frozen=True)
class Upper(HeldOut):
    """The blocks that change: ``data`` and ``states`` are what the lower ones make of the text."""

    states: list[Tensor] = field(default_factory=list)

    def loss(self) -> float:
        return held_out_loss(self.model, self.states, self.unseen)

    @classmethod
    def above(cls, whole: HeldOut, blocks: int) -> Upper:
        """The model without its lower blocks, in place."""
        inner = whole.model.model
        layers, norm = inner.layers, inner.norm
        inner.layers, inner.norm = layers[: len(layers) - blocks], nn.Identity()
        ids = [batch["input_ids"] for batch in whole.data]
        tests = list(torch.tensor(whole.unseen).split(8))
        with torch.no_grad():
            below = [[inner(part, use_cache=False).last_hidden_state for part in parts] for parts in (ids, tests)]
        inner.layers, inner.norm = layers[len(layers) - blocks :], norm
        data = [
            {"inputs_embeds": states, "labels": labels}
            for whole_states, whole_labels in zip(below[0], ids, strict=True)
            for states, labels in zip(whole_states.split(1), whole_labels.split(1), strict=True)
        ]
        options = whole.options | {"blocks": blocks}
        dense = held_out_loss(whole.model, below[1], whole.unseen)
        return cls(whole.model, data, whole.unseen, options, dense, below[1])


@torch.no_grad()
def held_out_loss(model: nn.Module, states: list[Tensor], unseen: list[list[int]]) -> float:
    """Mean loss over blocks of which the lower layers' outputs are given."""
    total = 0.0
    for part, labels in zip(states, torch.tensor(unseen).split(8), strict=True):
        logits = model(inputs_embeds=part, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item() * len(labels)
    return total / len(unseen)


@dataclass(frozen=True)
class Trial:
    """What all runs share."""

    states: list[Tensor]
    steps: int

    def __call__(
        self, model: nn.Module, name: str, setting: str, data: list[dict[str, Tensor]], unseen: list[list[int]]
    ) -> Quality:
        """Train a copy, merge it, and judge."""
        began, seed = time.process_time(), int(setting.rpartition(" ")[2])
        way = WAYS[name]
        torch.manual_seed(seed)
        fields = {"pattern": "2:8", "mask_every": max(1, self.steps // 8), "seed": seed} | way.fields
        adapted = get_peft_model(copy.deepcopy(model), PruneConfig(target_modules=r".*_proj", **fields))
        self.train(adapted, way, setting.startswith(DISTILLED), data, seed)
        adapted.eval()
        masks, sample = adapter_masks(adapted), self.states[0][:2]
        with torch.no_grad():
            before = adapted(inputs_embeds=sample, use_cache=False).logits
            merged = adapted.merge_and_unload()
            after = merged(inputs_embeds=sample, use_cache=False).logits
        loss = held_out_loss(merged, self.states, unseen)
        weights = [merged.get_submodule(layer).weight for layer in masks.layers]
        zeros, numel = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
        return Quality(
            name, setting, loss, math.exp(loss), zeros / numel, 1 - masks.density, sum(masks.broken(merged).values()),
            float((after - before).abs().max() / before.abs().max()), time.process_time() - began,
        )  # fmt: skip

    def train(
        self, adapted: nn.Module, way: Way, is_distilled: bool, data: list[dict[str, Tensor]], seed: int
    ) -> None:
        """AdamW without weight decay, at a rate that falls to zero."""
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], way.rate, weight_decay=0)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        controller = controller_of(adapted, optimizer, self.steps)
        loss_fn = DistillationLoss(adapted, **({"ce": CE, "kl": KL} if is_distilled else {"ce": 1.0, "kl": 0.0}))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
        adapted.train()
        for step in range(self.steps):
            if way.releases and step == round(HALF * self.steps):
                release_masks(adapted, optimizer=optimizer)
            batch = data[order[step % len(data)]]
            loss_fn(adapted(inputs_embeds=batch["inputs_embeds"], use_cache=False), batch["labels"]).backward()
            optimizer.step()
            if controller is not None:
                controller.step()
            decay.step()
            optimizer.zero_grad()
        if controller is not None:
            controller.close()
        loss_fn.close()


def show(console: Console, dense: float, rows: list[Quality]) -> None:
    table = Table(title=f"perplexity on held-out text; of the dense model {math.exp(dense):.2f}")
    for name in ("recipe", ALONE, DISTILLED, "zeros", "masked and not zero", "CPU s"):
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=True)
    for way in dict.fromkeys(row.way for row in rows):
        own = [row for row in rows if row.way == way]
        cells = [
            " ".join(f"{row.perplexity:.1f}" for row in own if row.setting.startswith(kind)) or "-"
            for kind in (ALONE, DISTILLED)
        ]
        zeros, filled, seconds = (max(getattr(row, n) for row in own) for n in ("zeros", "filled", "cpu_seconds"))
        table.add_row(way, *cells, f"{zeros:.4f}", f"{filled:,}", f"{seconds:.0f}")
    console.print(table)


def main(
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps of one block of text.")] = 24,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Ways to measure.")] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Upper blocks that are pruned.")] = 4,
    train: Annotated[int, typer.Option(min=1, help="Blocks of training text.")] = 32,
    held_out: Annotated[int, typer.Option(min=1, help="Blocks of held-out text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 64,
    out: Annotated[Path, typer.Option(help="Where the figures go, after each of them.")] = RESULTS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the file has.")] = False,
) -> None:
    """The loss of SmolLM2-135M on held-out text after each recipe; the first seed of all comes first."""
    ways, console = check_ways(only, WAYS), Console()
    test = Upper.above(HeldOut.load(train, held_out, length), blocks)
    cells = [(way, f"{kind}, seed {seed}") for seed in range(seeds) for way in ways for kind in (ALONE, DISTILLED)]
    rates = {"weights_rate": WEIGHTS_RATE, "factors_rate": FACTORS_RATE, "ce": CE, "kl": KL}
    trial = Trial(test.states, steps)
    show(console, test.dense_loss, test.measure(cells, trial, Quality, out, console, fresh, steps=steps, **rates))


if __name__ == "__main__":
    typer.run(main)
