"""``python -m benchmarks.pretrain``: a small Llama from scratch, as sparse plus low rank, and as its peers train it.

Every method sees the same tokens of the King James Bible in the same order, over several seeds (of the first weights
and of the data's order). Measured are the perplexity on held-out text, the stored bytes by SLTrain's formula, the peak
of a step as PyTorch's allocator has it, and the time of a step against the dense model's, in turns.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from examples.smollm2 import held_out_loss, kjv_text, pack_blocks, split_paragraphs
from sparse_peft import SLTrainConfig, build_for_pretraining
from sparse_peft.tuners.base_model import BaseSparseModel

from .measure import Ratio, bytes_of, interleave, main_clock, measure_phases, paired
from .report import environment, write_json

RESULTS = Path(__file__).parent / "results" / "pretrain-cpu.json"
CPU = torch.device("cpu")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 4096
FULL, LOW_RANK, SLTRAIN, GALORE, RELORA = METHODS = ("full", "low-rank", "sltrain", "galore", "relora")
# AdamW's for all weights; GaLore's, and the scale of its projected steps, are its authors'.
LEARNING_RATE = 3e-3
GALORE_RATE, GALORE_SCALE = 1e-2, 0.25
# ReLoRA: a quarter of the run on all weights, then low rank that is merged and restarted so many times.
WARM_SHARE, RESTARTS = 0.25, 3


@dataclass(frozen=True)
class Run:
    """One training run. Bytes of weights and optimizer are in bfloat16, by the paper's formula."""

    method: str
    seed: int
    loss: float
    perplexity: float
    parameters: int
    formula_bytes: int
    seconds: float
    curve: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Cost:
    """What one step costs, all in float32: bytes that live between steps, and the most a step adds to them."""

    method: str
    state_bytes: int
    peak_extra_bytes: int
    tokens_per_second: float
    step_vs_full: Ratio


def train_tokenizer(paragraphs: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the training text itself."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(paragraphs, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def llama(hidden: int, layers: int, length: int) -> LlamaConfig:
    """A Llama of the proportions of SLTrain's 60M model."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=8 * round(hidden * 8 / 3 / 8),
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=length,
        tie_word_embeddings=False,
        use_cache=False,
    )


class Trainee:
    """One method's model and optimizer."""

    def __init__(self, method: str, config: LlamaConfig, steps: int, rank: int, **sltrain: float):
        self.method, self.rank, self.steps = method, rank, steps
        self.restarts = [round(steps * (WARM_SHARE + (1 - WARM_SHARE) * part / RESTARTS)) for part in range(RESTARTS)]
        if method == SLTRAIN:
            adapter = SLTrainConfig(mode="pretrain", r=rank, target_modules=LINEAR, **sltrain)
            self.model = build_for_pretraining(config, adapter)
            # all of the weight at first is in these few: as large as a dense layer's, as the low rank's below
            bound = config.initializer_range * math.sqrt(3 / adapter.density)
            for layer in BaseSparseModel.sparse_layers(self.model):
                nn.init.uniform_(layer.deltas["default"].values, -bound, bound)
        elif method == LOW_RANK:
            # an entry a layer instead of none, and factors whose product has the size of a dense layer's weight:
            # with B = 0 and no sparse part, attention would begin in a saddle point
            adapter = SLTrainConfig(mode="pretrain", r=rank, alpha=rank, num_params=7 * config.num_hidden_layers,
                                    allocation="uniform", backend="factored", target_modules=LINEAR)  # fmt: skip
            self.model = build_for_pretraining(config, adapter)
            for layer in BaseSparseModel.sparse_layers(self.model):
                factors = layer.deltas["default"]
                nn.init.normal_(factors.B, std=config.initializer_range * math.sqrt(3 * layer.in_features / rank))
                nn.init.zeros_(factors.values)
        else:
            self.model = AutoModelForCausalLM.from_config(config)
        self.rate = 1.0
        self._new_optimizer()

    def _new_optimizer(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.method != GALORE:
            self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, foreach=True)
            return
        from galore_torch import GaLoreAdamW  # noqa: PLC0415  (an optional package)

        projected = [p for n, p in self.model.named_parameters() if any(f".{kind}." in n for kind in LINEAR)]
        ids = set(map(id, projected))
        rest = {"params": [p for p in trained if id(p) not in ids], "lr": GALORE_RATE * GALORE_SCALE}
        low = {"params": projected, "rank": self.rank, "update_proj_gap": 200, "scale": GALORE_SCALE,
               "proj_type": "std", "lr": GALORE_RATE}  # fmt: skip
        self.optimizer = GaLoreAdamW([rest, low], lr=GALORE_RATE, weight_decay=0.0, no_deprecation_warning=True)

    def _restart(self) -> None:
        """ReLoRA: merge what the low rank has learnt and begin another."""
        if hasattr(self.model, "merge_and_unload"):
            self.model = self.model.merge_and_unload()
        self.model = get_peft_model(self.model, LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=LINEAR))
        for name, parameter in self.model.named_parameters():
            if "base_layer" not in name:
                parameter.requires_grad_(True)
        self._new_optimizer()

    def forward_backward(self, batch: Tensor) -> float:
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        return loss.item()

    def update(self) -> None:
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, number: int, batch: Tensor) -> float:
        """Step number ``number``, counted from 0, with a cosine to a tenth after a tenth of warmup."""
        warm_from = 0
        if self.method == RELORA and number in self.restarts:
            self._restart()
        if self.method == RELORA:
            warm_from = max((restart for restart in self.restarts if restart <= number), default=0)
        share = (number + 1) / self.steps
        rising = (number + 1 - warm_from) / max(1, round(self.steps * (0.1 if warm_from == 0 else 0.03)))
        rate = min(1.0, rising) * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)
        for group in self.optimizer.param_groups:
            group.setdefault("first_lr", group["lr"])
            group["lr"] = group["first_lr"] * rate
        loss = self.forward_backward(batch)
        self.update()
        return loss

    def parts(self) -> tuple[int, int, int]:
        """Numbers of trained parameters, of frozen ones, and of sparse entries with positions."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in self.model.parameters() if not p.requires_grad)
        layers = BaseSparseModel.sparse_layers(self.model)
        return trained, frozen, sum(layer.deltas["default"].values.numel() for layer in layers)

    def formula_bytes(self) -> int:
        """SLTrain's estimate: two bytes a weight and two for each of Adam's moments, and the positions.

        Positions count the four bytes that they take here, where the paper's take eight.
        """
        trained, frozen, entries = self.parts()
        if self.method != GALORE:
            return 6 * trained + 2 * frozen + 4 * entries
        moments = 0
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                sides = sorted(parameter.shape)
                moments += sides[-1] * min(self.rank, sides[0]) if "rank" in group else parameter.numel()
        projections = sum(min(p.shape) * self.rank for p in self.optimizer.param_groups[1]["params"])
        return 2 * trained + 2 * (2 * moments + projections)

    def state(self) -> Iterable[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    yield value
                elif hasattr(value, "ortho_matrix") and isinstance(value.ortho_matrix, Tensor):
                    yield value.ortho_matrix


def run_once(
    method: str, seed: int, make: Callable[[str], Trainee], batch_at: Callable[[int], Tensor], steps: int, unseen
) -> Run:
    torch.manual_seed(seed)
    trainee = make(method)
    trainee.model.train()
    curve, began = [], time.perf_counter()
    for number in range(steps):
        curve.append(trainee.step(number, batch_at(number)))
    seconds = time.perf_counter() - began
    loss = held_out_loss(trainee.model, unseen)
    trained, frozen, _ = trainee.parts()
    return Run(method, seed, loss, math.exp(loss), trained + frozen, trainee.formula_bytes(), seconds, curve)


def costs(methods: list[str], make: Callable[[str], Trainee], batch: Tensor, rounds: int) -> list[Cost]:
    """Each method's step, in turns; ReLoRA's is one of its low-rank phase."""
    trainees = {}
    for method in methods:
        torch.manual_seed(0)
        trainees[method] = make(method)
        if method == RELORA:
            trainees[method]._restart()

    def whole_step(trainee: Trainee) -> None:
        trainee.forward_backward(batch)
        trainee.update()

    samples = interleave({m: lambda t=t: whole_step(t) for m, t in trainees.items()}, rounds, CPU)
    clock = main_clock(CPU)
    found = []
    for method, trainee in trainees.items():
        phases = measure_phases([lambda t=trainee: whole_step(t)] * 2, CPU)
        wall = median(sample.wall for sample in samples[method])
        found.append(
            Cost(
                method,
                bytes_of(trainee.state()),
                phases[1].peak - phases[1].start,
                batch.numel() / wall,
                paired(samples[method], samples[FULL], clock),
            )
        )
    return found


def show(console: Console, runs: list[Run], found: list[Cost]) -> None:
    table = Table(title="from scratch on the King James Bible")
    for name in ("method", "perplexity", "parameters", "formula MB", "state MB", "step adds MB", "tokens/s", "/ full"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    by_method = {cost.method: cost for cost in found}
    for method in dict.fromkeys(run.method for run in runs):
        mine, cost = [run for run in runs if run.method == method], by_method[method]
        table.add_row(
            method,
            f"{mean(run.perplexity for run in mine):.2f} ({', '.join(f'{run.perplexity:.2f}' for run in mine)})",
            f"{mine[0].parameters:,}",
            f"{mine[0].formula_bytes / 1e6:.1f}",
            f"{cost.state_bytes / 1e6:.1f}",
            f"{cost.peak_extra_bytes / 1e6:.1f}",
            f"{cost.tokens_per_second:,.0f}",
            f"{cost.step_vs_full.median:.2f}",
        )
    console.print(table)


def main(
    steps: Annotated[int, typer.Option(min=8, help="Optimizer steps of a run.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 2,
    hidden: Annotated[int, typer.Option(min=64)] = 256,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    rank: Annotated[int | None, typer.Option(help="By default a quarter of hidden.")] = None,
    density: Annotated[float, typer.Option(help="Of SLTrain's sparse part.")] = 0.03,
    alpha: Annotated[
        float | None,
        typer.Option(help="SLTrain's low-rank part is scaled by alpha / rank; by default by 1 / 4."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Blocks of a step.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 128,
    held_out: Annotated[int, typer.Option(min=1, help="Blocks of held-out text.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each method.")] = 8,
    only: Annotated[list[str] | None, typer.Option(help="Methods to run; full is needed.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Train small Llamas from scratch and compare perplexity, memory and time."""
    methods = [method for method in METHODS if not only or method in only]
    if only and (set(only) - set(METHODS) or FULL not in only):
        raise typer.BadParameter(f"--only {only}: full and others of {', '.join(METHODS)}")
    console = Console(width=160)
    text = kjv_text()
    paragraphs = split_paragraphs(text, "train")
    tokenizer = train_tokenizer(paragraphs)
    blocks = pack_blocks(tokenizer, paragraphs, length)
    unseen = pack_blocks(tokenizer, split_paragraphs(text, "heldout"), length, held_out)
    config, rank = llama(hidden, layers, length), rank or hidden // 4
    alpha = rank / 4 if alpha is None else alpha

    def make(method: str) -> Trainee:
        return Trainee(method, config, steps, rank, density=density, alpha=alpha)

    runs = []
    for method, seed in track([(m, s) for s in range(seeds) for m in methods], "training", console=console):
        order = [i for epoch in range(-(-steps * batch // len(blocks)))
                 for i in random.Random(1000 * seed + epoch).sample(range(len(blocks)), len(blocks))]  # fmt: skip

        def batch_at(step: int, order: list[int] = order) -> Tensor:
            return torch.tensor([blocks[i] for i in order[step * batch : (step + 1) * batch]])

        runs.append(run_once(method, seed, make, batch_at, steps, unseen))
        last = runs[-1]
        console.print(f"{method}, seed {seed}: perplexity {last.perplexity:.2f} in {last.seconds:.0f} s")
    found = costs(methods, make, torch.tensor(blocks[:batch]), rounds)
    show(console, runs, found)
    write_json(
        out,
        {
            "format": 1,
            "environment": environment(CPU),
            "options": {
                "steps": steps, "hidden": hidden, "layers": layers, "rank": rank, "density": density, "alpha": alpha,
                "batch": batch, "length": length, "held_out_blocks": held_out, "learning_rate": LEARNING_RATE,
                "galore_rate": GALORE_RATE, "tokens": steps * batch * length,
            },
            "runs": [asdict(run) for run in runs],
            "costs": [asdict(cost) for cost in found],
        },
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
