"""``python -m benchmarks.reselection``: what changing the positions costs, at a large model's layer shapes.

One layer at a time: an ordinary step (forward, backward with the input's gradient, optimizer, weight refresh), a step
in which the layer proposes candidates, one in which it follows them, and the reselection itself. The parts are spread
over a period, weighted by how often they occur in it, as shares of an ordinary step.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

from sparse_peft import SparseConfig, SparsityController
from sparse_peft.numerics import panel_bytes
from sparse_peft.ops import PANEL_BYTES_PER_WEIGHT, gradient_panels
from sparse_peft.tuners.sparse.candidates import CandidateWindow

from .measure import LargestTensor
from .report import environment, write_json

RESULTS = Path(__file__).parent / "results" / "reselection-cpu.json"
LLAMA_7B = {"4096 x 4096": (4096, 4096, 4), "11008 x 4096": (11008, 4096, 2), "4096 x 11008": (4096, 11008, 1)}
SHORT = {"accumulated_gradient": "AG", "momentum": "MA"}
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Cost:
    """Seconds of one layer: medians.

    Attributes:
        step: of an ordinary step.
        product: more for the dense gradient's panels, in a step that proposes.
        proposal: more for choosing candidates on them.
        following: more in a step that follows the candidates.
        event: of the reselection, the optimizer's state included.
        largest: bytes of the largest tensor that proposing and reselecting make.
    """

    layer: str
    weight: int
    selection: str
    step: float
    product: float
    proposal: float
    following: float
    event: float
    largest: int

    def shares(self, every: int, window: int) -> dict[str, float]:
        """Each part over a period of ``every`` steps, as a share of that many ordinary steps."""
        gradient = self.product + (window - 1) * self.following
        parts = {"selection": self.proposal + self.event, "gradients": gradient}
        return {name: seconds / (every * self.step) for name, seconds in parts.items()}


def measure(
    layer: str, out: int, inp: int, weight: int, selection: str, density: float, tokens: int, rounds: int
) -> Cost:
    """Train one layer through ``rounds`` periods of four steps, and time each step by its place in the period."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": nn.Linear(inp, out, bias=False)})
    window = 3
    config = SparseConfig(
        selection=selection, density=density, target_modules=["layer"], reselect_every=5, accumulate=window,
        schedule="constant", reselect_stop=10**9, first_replace_rate=0.2,
    )  # fmt: skip
    model = get_peft_model(base, config)
    adapted = model.base_model.model["layer"]
    values = adapted.deltas["default"].values
    optimizer = torch.optim.AdamW([values], lr=1e-4)
    controller = SparsityController(model, optimizer)
    x = torch.randn(tokens, inp).requires_grad_()
    gradient = torch.randn(tokens, out) / tokens
    times: dict[str, list[float]] = {"plain": [], "first": [], "later": [], "event": [], "product": []}
    largest = LargestTensor()
    for step in range(1, window + 5 * rounds + 1):
        begin = time.perf_counter()
        adapted(x).backward(gradient)
        optimizer.step()
        stepped = time.perf_counter()
        place = (step - window) % 5
        with largest if step == window else nullcontext():
            controller.step()
        end = time.perf_counter()
        kind = {3: "first", 4: "later", 0: "later", 1: "plain", 2: "plain"}[place]
        bookkeeping = 0.0 if place == 0 else end - stepped
        if step > window:
            times[kind].append(stepped - begin + bookkeeping)
            if place == 0:
                times["event"].append(end - stepped)
        optimizer.zero_grad()
        x.grad = None
    if selection == "momentum":  # covers are kept in every step: what they cost is in all of them alike
        return Cost(
            layer, weight, selection, median(times["plain"]), 0.0, 0.0, 0.0, median(times["event"]), largest.nbytes
        )
    data, support = x.detach(), adapted.support("default")
    with largest:
        observer = CandidateWindow(support, support.nnz, window)
        observer.support_grad(gradient, data, support)
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in gradient_panels([(gradient, data)], (out, inp), PANEL_BYTES_PER_WEIGHT):
            pass
        times["product"].append(time.perf_counter() - begin)
    plain, product = median(times["plain"]), median(times["product"])
    sampled = plain - _without_values_gradient(adapted, x, gradient, rounds)
    return Cost(
        layer,
        weight,
        selection,
        plain,
        product - sampled,
        max(0.0, median(times["first"]) - plain - (product - sampled)),
        max(0.0, median(times["later"]) - plain),
        median(times["event"]),
        largest.nbytes,
    )


def _without_values_gradient(adapted: nn.Module, x: torch.Tensor, gradient: torch.Tensor, rounds: int) -> float:
    """Seconds of an ordinary step without the values' gradient, which a step that proposes reads off the panels."""
    values = adapted.deltas["default"].values
    values.requires_grad_(False)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        adapted(x).backward(gradient)
        seconds.append(time.perf_counter() - begin)
        x.grad = None
    values.requires_grad_(True)
    return median(seconds)


def main(
    density: Annotated[float, typer.Option(help="Share of the layer that trains.")] = 0.01,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Periods measured.")] = 3,
    every: Annotated[int, typer.Option(min=1, help="Steps from one reselection to the next, for the shares.")] = 20,
    window: Annotated[int, typer.Option(min=1, help="Steps that are observed, for the shares.")] = 5,
    divide: Annotated[int, typer.Option(min=1, help="Divide the shapes by this, for a quick look.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Time the parts of a reselection on layers of Llama-2-7B's shapes."""
    console = Console()
    table = Table(title=f"{density:.1%} of each layer, {tokens} tokens, a reselection every {every} steps")
    for name in ("layer", "step s", "choose s", "event s", "select", "gradient", "MiB"):
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    costs = []
    for selection in ("accumulated_gradient", "momentum"):
        for layer, (rows, cols, weight) in LLAMA_7B.items():
            cost = measure(layer, rows // divide, cols // divide, weight, selection, density, tokens, rounds)
            costs.append(cost)
            shares = cost.shares(every, window)
            table.add_row(
                f"{SHORT[selection]} {layer}", f"{cost.step:.2f}", f"{cost.proposal:.2f}", f"{cost.event:.2f}",
                f"{shares['selection']:.2%}", f"{shares['gradients']:.2%}", f"{cost.largest / MEBIBYTE:.0f}",
            )  # fmt: skip
    console.print(table)
    block = {}
    for selection in ("accumulated_gradient", "momentum"):
        mine = [cost for cost in costs if cost.selection == selection]
        steps = sum(cost.weight * cost.step for cost in mine)
        block[selection] = {
            part: sum(cost.weight * cost.step * cost.shares(every, window)[part] for cost in mine) / steps
            for part in ("selection", "gradients")
        }
        shares = block[selection]
        console.print(
            f"{selection}: over a whole block, selection {shares['selection']:.2%} of the steps, "
            f"gradients at candidates {shares['gradients']:.2%}"
        )
    console.print(f"panel limit {panel_bytes() / MEBIBYTE:.0f} MiB")
    options = {"density": density, "tokens": tokens, "rounds": rounds, "every": every, "window": window}
    write_json(
        out,
        {
            "format": 1,
            "environment": environment(torch.device("cpu")),
            "options": options,
            "layers": [asdict(cost) | {"shares": cost.shares(every, window)} for cost in costs],
            "block": block,
        },
    )


if __name__ == "__main__":
    typer.run(main)
