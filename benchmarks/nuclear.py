"""``python -m benchmarks.nuclear``: SaRA's nuclear norm gradient by matrix products, against a singular value
decomposition as the authors take it, and against the training step that it is added to."""

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
from torch import Tensor

from sparse_peft.ops import nuclear_norm
from sparse_peft.support import Support

from .measure import LargestTensor, Ratio, interleave, main_clock, paired
from .report import environment, write_json

RESULTS = Path(__file__).parent / "results"
# (out, in * taps) of a Stable Diffusion UNet's layers: attention, a convolution, feed-forward; and of a Llama's.
SHAPES = [(320, 320), (320, 2880), (1280, 1280), (1280, 5120), (2048, 2048)]
TOKENS = 2048


@dataclass
class Case:
    """One matrix. Times are medians in seconds; ``error`` is relative, of the gradient, against the decomposition."""

    shape: tuple[int, int]
    seconds: float
    vs_svd: Ratio
    vs_layer: Ratio
    error: float
    largest_temporary: int


def svd_gradient(entries: Tensor, support: Support) -> Tensor:
    """The gradient as the authors compute it: by a singular value decomposition of the dense matrix."""
    dense = torch.zeros(support.shape, device=entries.device).view(-1)
    dense = dense.scatter(0, support.indices.long(), entries).view(support.shape)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return (u[:, kept] @ vh[kept]).reshape(-1).index_select(0, support.indices.long())


def measure(shape: tuple[int, int], density: float, rounds: int, device: torch.device) -> Case:
    support = Support.random(shape, round(density * shape[0] * shape[1]), seed=0, name="weight").to(device)
    entries = 1e-3 * torch.randn(support.nnz, device=device)
    weight = torch.randn(shape, device=device)
    x, grad = torch.randn(TOKENS, shape[1], device=device), torch.randn(TOKENS, shape[0], device=device)

    def layer() -> None:  # forward and both gradients, as in full fine-tuning
        F.linear(x, weight)
        torch.mm(grad, weight)
        torch.mm(grad.t(), x)

    actions: dict[str, Callable[[], object]] = {
        "ours": lambda: nuclear_norm(entries, support),
        "svd": lambda: svd_gradient(entries, support),
        "layer": layer,
    }
    samples = interleave(actions, rounds, device, warmup=1)
    clock = main_clock(device)
    with LargestTensor() as largest:
        _, found = nuclear_norm(entries, support)
    wanted = svd_gradient(entries, support)
    return Case(
        shape,
        sorted(sample.on(clock) for sample in samples["ours"])[rounds // 2],
        paired(samples["ours"], samples["svd"], clock),
        paired(samples["ours"], samples["layer"], clock),
        float((found - wanted).norm() / wanted.norm()),
        largest.nbytes,
    )


def main(
    density: Annotated[float, typer.Option(help="Share of the entries that train.")] = 0.05,
    rounds: Annotated[int, typer.Option(min=1, help="Samples.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's threads.")] = 2,
    device: Annotated[str | None, typer.Option(help="Default cuda where there is one, else cpu.")] = None,
    shapes: Annotated[list[str] | None, typer.Option(help="Such as 320x2880; default a UNet's and a Llama's.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; default in benchmarks/results.")] = None,
) -> None:
    """Time, memory and accuracy of the nuclear norm's gradient."""
    torch.set_num_threads(threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = [tuple(int(n) for n in text.split("x")) for text in shapes or ()] or SHAPES
    cases = [measure(shape, density, rounds, where) for shape in wanted]
    drawn = Table(title=f"nuclear norm's gradient, {density:.0%} of the entries")
    for title in ("matrix", "seconds", "/ SVD", f"/ layer, {TOKENS} tokens", "error", "largest temporary, MB"):
        drawn.add_column(title, justify="right")
    for case in cases:
        ratios = (f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})" for r in (case.vs_svd, case.vs_layer))
        size = f"{case.largest_temporary / 1e6:.1f}"
        drawn.add_row("x".join(map(str, case.shape)), f"{case.seconds:.4f}", *ratios, f"{case.error:.1e}", size)
    console = Console(width=160)
    console.print(drawn)
    path = output or RESULTS / f"nuclear-{where.type}.json"
    options = {"density": density, "rounds": rounds, "tokens": TOKENS}
    write_json(path, {"format": 1, **environment(where), "options": options, "cases": [asdict(c) for c in cases]})
    console.print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
