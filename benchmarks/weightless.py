"""``python -m benchmarks.weightless``: one layer of an SLTrain model from scratch, both ways of computing it, against
the dense layer that it stands for: forward and all gradients of a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from sparse_peft.ops import cheaper_way, sparse_low_rank_linear
from sparse_peft.support import Support

from .measure import LargestTensor, Ratio, interleave, main_clock, paired
from .report import environment, write_json

RESULTS = Path(__file__).parent / "results"
# (out, in): attention's and the feed-forward network's of Llamas of 60 M, 350 M and 1.3 B parameters.
SHAPES = [(512, 512), (1376, 512), (1024, 1024), (2736, 1024), (2048, 2048), (5461, 2048)]
TOKENS = [512, 2048]
WAYS = ("composed", "factored")
# A rank is worth its products where a step has at least so many tokens for each.
TOKENS_A_RANK = 4


@dataclass(frozen=True)
class Case:
    """One layer with one number of tokens; ratios are to the dense layer's time.

    Attributes:
        chosen: the way that ``backend="auto"`` takes.
        largest_temporary: bytes, by way; the weight itself has ``4 * out * in``.
    """

    shape: tuple[int, int]
    tokens: int
    rank: int
    seconds: dict[str, float]
    vs_dense: dict[str, Ratio]
    chosen: str
    largest_temporary: dict[str, int]

    @property
    def goal(self) -> bool | None:
        """Whether a step is at least as fast as the dense one; None where the rank is too large to ask for it."""
        return self.vs_dense[self.chosen].median <= 1 if self.tokens >= TOKENS_A_RANK * self.rank else None


def measure(shape: tuple[int, int], tokens: int, density: float, rounds: int, device: torch.device) -> Case:
    torch.manual_seed(0)
    (rows, cols), rank = shape, max(1, min(shape) // 4)
    support = Support.random(shape, round(density * rows * cols), seed=0, name="weight").to(device)

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).div_(cols**0.5).requires_grad_(True)

    x, grad, weight = leaf(tokens, cols), torch.randn(tokens, rows, device=device), leaf(rows, cols)
    down, up, values = leaf(rank, cols), leaf(rows, rank), leaf(support.nnz)

    def dense() -> None:
        torch.autograd.grad(F.linear(x, weight), (x, weight), grad)

    def step(way: str) -> None:
        out = sparse_low_rank_linear(x, down, up, values, None, support, way=way)
        torch.autograd.grad(out, (x, down, up, values), grad)

    actions: dict[str, Callable[[], object]] = {"dense": dense, **{way: lambda way=way: step(way) for way in WAYS}}
    samples = interleave(actions, rounds, device, warmup=1)
    clock = main_clock(device)
    largest = {}
    for way in WAYS:
        with LargestTensor() as found:
            step(way)
        largest[way] = found.nbytes
    return Case(
        shape,
        tokens,
        rank,
        {name: sorted(sample.on(clock) for sample in samples[name])[rounds // 2] for name in actions},
        {way: paired(samples[way], samples["dense"], clock) for way in WAYS},
        cheaper_way(rank, support, tokens, torch.float32, device),
        largest,
    )


def main(
    density: Annotated[float, typer.Option(help="Of the sparse part.")] = 0.03,
    rounds: Annotated[int, typer.Option(min=1, help="Samples.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's threads.")] = 2,
    device: Annotated[str | None, typer.Option(help="Default cuda where there is one, else cpu.")] = None,
    shapes: Annotated[list[str] | None, typer.Option(help="Such as 1376x512; default three Llamas'.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Default 512 and 2048.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; default in benchmarks/results.")] = None,
    check: Annotated[bool, typer.Option(help="Exit with 1 if a step is slower than the dense one.")] = False,
) -> None:
    """Time and memory of a layer without a weight, at a rank of a quarter of its narrower side."""
    torch.set_num_threads(threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = [tuple(int(n) for n in text.split("x")) for text in shapes or ()] or SHAPES
    cases = [measure(shape, count, density, rounds, where) for shape in wanted for count in tokens or TOKENS]
    drawn = Table(title=f"a layer without a weight, {density:.0%} entries, against the dense layer's step")
    for title in (
        "layer",
        "tokens",
        "rank",
        *(f"{way} / dense" for way in WAYS),
        "auto takes",
        "temporary, MB",
        "goal",
    ):
        drawn.add_column(title, justify="right", no_wrap=True)
    for case in cases:
        ratios = (f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})" for r in case.vs_dense.values())
        size = f"{case.largest_temporary[case.chosen] / 1e6:.1f} of {4e-6 * case.shape[0] * case.shape[1]:.1f}"
        goal = {True: "met", False: "missed", None: "-"}[case.goal]
        row = ("x".join(map(str, case.shape)), str(case.tokens), str(case.rank), *ratios, case.chosen, size, goal)
        drawn.add_row(*row)
    console = Console(width=160)
    console.print(drawn)
    path = output or RESULTS / f"weightless-{where.type}.json"
    options = {"density": density, "rounds": rounds, "threads": threads}
    content = [{**asdict(case), "goal": case.goal} for case in cases]
    write_json(path, {"format": 1, **environment(where), "options": options, "cases": content})
    console.print(f"written: {path}")
    if check and any(case.goal is False for case in cases):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
