"""``python -m benchmarks.channels``: S2FT against LoRA with as many trained parameters, in training and in serving.

Training: S2FT's default layers against LoRA on all linear layers and against LoRA on S2FT's own; time of a step, what
is kept for backward above the frozen model, and the highest level of memory. Serving: one batch whose items all use
different adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparse_peft import S2FTConfig

from .measure import Ratio, interleave, main_clock, paired, time_once
from .methods import FROZEN, Method
from .report import environment, table, write_json
from .runner import MOST_REPEATS, SHORTEST_SAMPLE, Result, repeated, run_workload
from .workloads import Workload, linear_stack, random_llama, smollm2

RESULTS = Path(__file__).parent / "results"
PLACES = ["o_proj", "down_proj"]  # S2FT's default in a Llama
LORA, LORA_HERE, S2FT = "lora, all layers", "lora, o and down", "s2ft, o and down"
# The paper's benchmark of many adapters in one batch.
PAPER_WIDTH, PAPER_RANK = 2048, 32
STEP_GOAL, SAVED_GOAL, MIXED_GOAL = 0.85, 0.10, 0.80


class Model(str, Enum):  # noqa: UP042
    llama = "llama"
    smollm2 = "smollm2"


@dataclass(frozen=True)
class Budgets:
    """Equal budgets: the parameters of LoRA on all layers, and the rank that LoRA on S2FT's layers needs for them."""

    parameters: int
    rank_here: int

    @classmethod
    def of(cls, base: nn.Module, targets: list[str], rank: int) -> Budgets:
        sizes = {
            name: module.in_features + module.out_features
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
        }
        here = sum(size for name, size in sizes.items() if name.rpartition(".")[2] in PLACES)
        parameters = rank * sum(sizes.values())
        return cls(parameters, round(parameters / here))


def rows(rank: int, budgets: Budgets) -> list[Method]:
    def lora(rank: int, **places) -> Callable[..., LoraConfig]:
        return lambda seed, **shared: LoraConfig(r=rank, lora_alpha=2 * rank, **{**shared, **places})

    def s2ft(seed: int, **shared) -> S2FTConfig:
        return S2FTConfig(num_params=budgets.parameters, seed=seed, **{**shared, "target_modules": PLACES})

    return [
        Method(FROZEN),
        Method(LORA, lora(rank), fuses=True),
        Method(LORA_HERE, lora(budgets.rank_here, target_modules=PLACES), fuses=True),
        Method(S2FT, s2ft, is_sparse=True),
    ]


# ------------------------------------------------------------------------------------------------------------ serving


@dataclass
class MixedBatch:
    """Time of a mixed batch's forward pass, S2FT's as a ratio to LoRA's and to the base model's.

    ``share`` is what S2FT adds to the base model's time over what LoRA adds.
    """

    model: str
    adapters: int
    tokens: int
    seconds: dict[str, float]
    s2ft_vs_lora: Ratio
    s2ft_vs_base: Ratio
    lora_vs_base: Ratio

    @property
    def share(self) -> float:
        return (self.s2ft_vs_base.median - 1) / (self.lora_vs_base.median - 1)


def with_adapters(workload: Workload, method: Method, adapters: int) -> nn.Module:
    """A model in evaluation with so many adapters of a method, all with values that show."""
    names = [f"adapter{n}" for n in range(adapters)]

    def config(seed: int) -> PeftConfig:
        return method.config(seed, target_modules=workload.target_modules, task_type=workload.task_type)

    model = get_peft_model(workload.copy_of_base(), config(0), adapter_name=names[0])
    for n, name in enumerate(names[1:], 1):
        model.add_adapter(name, config(n))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(adapter in name for adapter in names):
                parameter.normal_(std=1e-2)
    return model.eval()


@torch.no_grad()
def mixed_batch(
    workload: Workload, lora: Method, s2ft: Method, inputs: Tensor, tokens: int, rounds: int
) -> MixedBatch:
    """Both methods on the same layers, with as many parameters; every item of the batch with an adapter of its own."""
    adapters = len(inputs)
    names = [f"adapter{n}" for n in range(adapters)]
    base = workload.copy_of_base().eval()
    actions: dict[str, Callable[[], object]] = {"base": lambda: base(inputs)}
    for name, method in (("lora", lora), ("s2ft", s2ft)):
        model = with_adapters(workload, method, adapters)
        actions[name] = lambda model=model: model(inputs, adapter_names=names)
    actions["base"]()
    once = time_once(actions["base"], inputs.device).wall
    repeats = max(1, round(SHORTEST_SAMPLE / max(once, SHORTEST_SAMPLE / MOST_REPEATS)))
    actions = {name: repeated(action, repeats) for name, action in actions.items()}
    samples = interleave(actions, rounds, inputs.device, warm_caches=True)
    clock = main_clock(inputs.device)
    return MixedBatch(
        workload.name,
        adapters,
        tokens,
        {name: median(sample.on(clock) for sample in found) / repeats for name, found in samples.items()},
        paired(samples["s2ft"], samples["lora"], clock),
        paired(samples["s2ft"], samples["base"], clock),
        paired(samples["lora"], samples["base"], clock),
    )


def one_layer(adapters: int, rounds: int, device: torch.device) -> MixedBatch:
    """The paper's own setting: one layer 2,048 wide, one token of each adapter, LoRA r=32 against 64 channels."""
    workload = linear_stack(PAPER_WIDTH, 1, 1, device, torch.float32)
    lora = Method("lora", lambda seed, **shared: LoraConfig(r=PAPER_RANK, **shared))
    s2ft = Method("s2ft", lambda seed, **shared: S2FTConfig(k=2 * PAPER_RANK, side="in", seed=seed, **shared))
    x = torch.randn(adapters, 1, PAPER_WIDTH, device=device)
    return mixed_batch(workload, lora, s2ft, x, 1, 10 * rounds)


# ------------------------------------------------------------------------------------------------------------ report


def judge(result: Result, mixed: list[MixedBatch]) -> list[dict]:
    """Every goal of this benchmark, with what was found."""
    found = []

    def add(goal: str, value: float, bound: float) -> None:
        found.append({"goal": goal, "bound": bound, "value": value, "passed": value <= bound})

    s2ft, frozen = result.row(S2FT), result.row(FROZEN)
    for name in (LORA, LORA_HERE):
        lora = result.row(name)
        # both were timed with LoRA on all layers, round by round
        step = s2ft.step_vs_lora.median / lora.step_vs_lora.median
        add(f"training step / {name}'s, equal parameters", step, STEP_GOAL)
        saved = (s2ft.saved - frozen.saved) / (lora.saved - frozen.saved)
        add(f"kept for backward above frozen / {name}'s", saved, SAVED_GOAL)
    for batch in mixed:
        goal = f"mixed batch, {batch.model}, {batch.adapters} adapters x {batch.tokens} tokens / LoRA's, same layers"
        add(goal, batch.s2ft_vs_lora.median, MIXED_GOAL)
    return found


def show(result: Result, mixed: list[MixedBatch], goals: list[dict], console: Console) -> None:
    console.print(table(result))
    drawn = Table(title="Mixed batches: forward pass")
    for title in (
        "model",
        "adapters x tokens",
        "base, s",
        "LoRA / base",
        "S2FT / base",
        "S2FT / LoRA",
        "of what it adds",
    ):
        drawn.add_column(title, justify="right")
    for batch in mixed:
        ratios = (f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})" for r in
                  (batch.lora_vs_base, batch.s2ft_vs_base, batch.s2ft_vs_lora))  # fmt: skip
        size = f"{batch.adapters} x {batch.tokens}"
        drawn.add_row(batch.model, size, f"{batch.seconds['base']:.4f}", *ratios, f"{batch.share:.2f}")
    console.print(drawn)
    for goal in goals:
        verdict = "[green]pass[/green]" if goal["passed"] else "[red]miss[/red]"
        console.print(f"{verdict}  {goal['goal']}: {goal['value']:.3f} (<= {goal['bound']})", highlight=False)


def main(
    model: Annotated[Model, typer.Option(help="A random Llama, or SmolLM2-135M.")] = Model.llama,
    d: Annotated[int, typer.Option(help="Hidden size (llama).")] = 1024,
    depth: Annotated[int, typer.Option(min=1, help="Layers (llama).")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a step.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Samples.")] = 9,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA on all layers; sets the budget of all.")] = 16,
    adapters: Annotated[int, typer.Option(min=1, help="In a mixed batch.")] = 10,
    mixed_tokens: Annotated[list[int] | None, typer.Option(help="Of an item; default 1 and 32.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's threads.")] = 2,
    device: Annotated[str | None, typer.Option(help="Default cuda where there is one, else cpu.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; default in benchmarks/results.")] = None,
    check: Annotated[bool, typer.Option(help="Exit with 1 if a goal is missed.")] = False,
) -> None:
    """S2FT against LoRA with as many trained parameters."""
    torch.set_num_threads(threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if model is Model.llama:
        workload = random_llama(d, depth, tokens, where, torch.float32, False)
    else:
        workload = smollm2(tokens, where, torch.float32, False)
    console = Console(width=200)
    budgets = Budgets.of(workload.base, workload.target_modules, rank)
    methods = rows(rank, budgets)
    result = run_workload(
        workload, methods, LORA, rounds, where, progress=lambda text: console.print(f"[dim]{text}"), serving=False
    )
    lora, s2ft = (method for method in methods if method.name in (LORA_HERE, S2FT))
    mixed = [one_layer(adapters, rounds, where)]
    for count in mixed_tokens or [1, 32]:
        console.print(f"[dim]mixed batches of {adapters} x {count} tokens")
        ids = torch.randint(0, workload.base.config.vocab_size, (adapters, count), device=where)
        mixed.append(mixed_batch(workload, lora, s2ft, ids, count, rounds))
    goals = judge(result, mixed)
    show(result, mixed, goals, console)
    options = {"model": model.value, "rounds": rounds, "rank": rank, "parameters": budgets.parameters,
               "rank_on_o_and_down": budgets.rank_here}  # fmt: skip
    content = {"format": 1, **environment(where), "options": options, "training": result.to_dict(),
               "mixed": [
{**asdict(batch), "share": batch.share} for batch in mixed], "goals": goals}  # fmt: skip
    path = output or RESULTS / f"channels-{model.value}-{where.type}.json"
    write_json(path, content)
    console.print(f"written: {path}")
    if check and not all(goal["passed"] for goal in goals):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
