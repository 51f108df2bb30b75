"""``python -m benchmarks.serving``: many adapters of one resident model, against PEFT's LoRA with as many parameters.

Measured, in turns within one run: a switch from one adapter to another; a token decoded after it; a batch whose rows
all use different adapters, its prefill and one token of its decoding; memory of a loaded adapter and of its file; and
an ``AdapterPool`` that finds an adapter loaded, or has to load it in another one's place.

LoRA is served in both ways that there are: active beside the base weights, or fused into them.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from sparse_peft import SparseConfig
from sparse_peft.adapters import AdapterPool
from sparse_peft.adapters.pool import adapter_bytes

from .channels import S2FT, Budgets, Model, rows, with_adapters
from .measure import Ratio, Sample, bytes_of, interleave, main_clock, paired
from .methods import Method
from .report import environment, write_json
from .workloads import Workload, random_llama, smollm2

RESULTS = Path(__file__).parent / "results"
BASE, SPARSE, LORA, FUSED = "base", "sparse", "lora, active", "lora, fused"


@dataclass(frozen=True)
class Cost:
    """One thing that a server does, done by one method.

    Attributes:
        what: the thing.
        method: who does it.
        seconds: median, on the main clock.
        versus: ratios to others that did the same in the same rounds.
    """

    what: str
    method: str
    seconds: float
    versus: dict[str, Ratio]


@dataclass(frozen=True)
class Size:
    """Bytes of one adapter: in memory once it was used, and of its file."""

    method: str
    parameters: int
    memory: int
    file: int


def served_methods(workload: Workload, rank: int) -> dict[str, Method]:
    """Equal numbers of parameters; S2FT's on its default layers."""
    budgets = Budgets.of(workload.base, workload.target_modules, rank)
    s2ft = next(method for method in rows(rank, budgets) if method.name == S2FT)
    return {
        SPARSE: Method(SPARSE, lambda seed, **shared: SparseConfig(r=rank, seed=seed, **shared), is_sparse=True),
        S2FT: s2ft,
        LORA: Method(LORA, lambda seed, **shared: LoraConfig(r=rank, lora_alpha=2 * rank, **shared), fuses=True),
    }


def costs_of(what: str, samples: dict[str, list[Sample]], clock: str, against: list[str]) -> list[Cost]:
    return [
        Cost(
            what,
            method,
            median(sample.on(clock) for sample in found),
            {other: paired(found, samples[other], clock) for other in against if other != method},
        )
        for method, found in samples.items()
    ]


def activate(model: nn.Module, name: str) -> None:
    """As for a server of one of our methods: the base weights hold the adapter when this returns."""
    model.set_adapter(name, inference_mode=True)
    model.base_model.make_resident()


def fuse(model: nn.Module, name: str) -> None:
    model.unmerge_adapter()
    model.set_adapter(name, inference_mode=True)
    model.merge_adapter()


def taking_turns(switch: Callable[[nn.Module, str], None], model: nn.Module, names: list[str]) -> Callable[[], None]:
    order = itertools.cycle(names)
    return lambda: switch(model, next(order))


def switches(models: dict[str, nn.Module], names: list[str], rounds: int, device: torch.device) -> list[Cost]:
    actions = {method: taking_turns(activate, models[method], names) for method in (SPARSE, S2FT)}
    actions[LORA] = taking_turns(lambda m, name: m.set_adapter(name, inference_mode=True), models[LORA], names)
    actions[FUSED] = taking_turns(fuse, models[FUSED], names)
    models[FUSED].merge_adapter()
    samples = interleave(actions, rounds, device)
    return costs_of("switch", samples, main_clock(device), [LORA, FUSED])


@torch.no_grad()
def passes(
    base: nn.Module, models: dict[str, nn.Module], names: list[str], tokens: int, rounds: int, device: torch.device
) -> list[Cost]:
    """A decoded token of one adapter, and both parts of a mixed batch's generation."""
    clock, vocabulary = main_clock(device), base.config.vocab_size
    one = torch.randint(0, vocabulary, (1, 1), device=device)
    batch = torch.randint(0, vocabulary, (len(names), tokens), device=device)
    inner = {BASE: base, **{method: model.get_base_model() for method, model in models.items()}}
    found = costs_of(
        "token of one adapter",
        interleave(
            {m: lambda model=model: model(one) for m, model in inner.items()}, rounds, device, warm_caches=True
        ),
        clock,
        [BASE, LORA],
    )
    mixed = {method: model for method, model in models.items() if method != FUSED}
    for what, ids in (("mixed batch, prefill", batch), ("mixed batch, one token", batch[:, :1])):
        actions: dict[str, Callable[[], object]] = {BASE: lambda ids=ids: base(ids)}
        for method, model in mixed.items():
            actions[method] = lambda model=model, ids=ids: model(ids, adapter_names=names)
        found += costs_of(what, interleave(actions, rounds, device, warm_caches=True), clock, [BASE, LORA])
    return found


def save_all(models: dict[str, nn.Module], folder: Path) -> None:
    for method, model in models.items():
        model.save_pretrained(folder / method, save_embedding_layers=False)


def lora_tensors(model: nn.Module, name: str) -> list[torch.Tensor]:
    return [parameter for key, parameter in model.named_parameters() if f".{name}." in key]


def sizes(models: dict[str, nn.Module], name: str, folder: Path) -> list[Size]:
    found = []
    for method, model in models.items():
        trained = lora_tensors(model, name)
        memory = bytes_of(trained) if method == LORA else adapter_bytes(model, name)
        file = (folder / method / name / "adapter_model.safetensors").stat().st_size
        found.append(Size(method, sum(tensor.numel() for tensor in trained), memory, file))
    return found


def pools(
    workload: Workload, lora: nn.Module, names: list[str], folder: Path, rounds: int, device: torch.device
) -> list[Cost]:
    """Uses of a pool; LoRA's miss is PEFT's ``load_adapter``, ``set_adapter`` and ``delete_adapter``."""
    actions: dict[str, dict[str, Callable[[], object]]] = {"again": {}, "loaded": {}, "not loaded": {}}

    def use(pool: AdapterPool, order) -> None:
        with pool.use(next(order)):
            pass

    for method in (SPARSE, S2FT):
        for kind in ("loaded", "not loaded"):
            pool = AdapterPool(workload.copy_of_base(), check_base_name=False)
            for name in names[:2]:
                pool.add(name, folder / method / name)
            with pool.use(names[0]):
                pool.max_bytes = pool.statistics.loaded_bytes * (1 if kind == "not loaded" else 3)
            order = itertools.cycle(names[:2])
            actions[kind][method] = lambda pool=pool, order=order: use(pool, order)
            if kind == "loaded":
                actions["again"][method] = lambda pool=pool: use(pool, itertools.repeat(names[0]))
    places = itertools.cycle([("place0", "place1"), ("place1", "place0")])
    lora.load_adapter(folder / LORA / names[0], "place1")

    def reload_lora() -> None:
        new, old = next(places)
        lora.load_adapter(folder / LORA / names[0], new)
        lora.set_adapter(new, inference_mode=True)
        lora.delete_adapter(old)

    actions["not loaded"][LORA] = reload_lora
    found = []
    for kind, each in actions.items():
        samples = interleave(each, rounds, device)
        found += costs_of(f"pool: {kind}", samples, main_clock(device), [LORA] if LORA in each else [])
    return found


def show(console: Console, costs: list[Cost], found: list[Size]) -> None:
    drawn = Table(title="What a server does")
    for title in ("what", "method", "ms", "/ base", "/ lora, active", "/ lora, fused"):
        drawn.add_column(title, justify="left" if title in ("what", "method") else "right")
    for cost in costs:
        ratios = [f"{cost.versus[other].median:.3f}" if other in cost.versus else "" for other in (BASE, LORA, FUSED)]
        drawn.add_row(cost.what, cost.method, f"{1e3 * cost.seconds:.2f}", *ratios)
    console.print(drawn)
    drawn = Table(title="One adapter")
    for title in ("method", "parameters", "MB in memory", "MB on disk"):
        drawn.add_column(title, justify="left" if title == "method" else "right")
    for size in found:
        drawn.add_row(size.method, f"{size.parameters:,}", f"{size.memory / 1e6:.2f}", f"{size.file / 1e6:.2f}")
    console.print(drawn)


def main(
    model: Annotated[Model, typer.Option(help="A random Llama, or SmolLM2-135M.")] = Model.llama,
    d: Annotated[int, typer.Option(help="Hidden size (llama).")] = 192,
    depth: Annotated[int, typer.Option(min=1, help="Layers (llama), of seven adapted ones each.")] = 30,
    adapters: Annotated[int, typer.Option(min=2, help="Loaded, and rows of a mixed batch.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Of each row's prefill.")] = 32,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA; sets the budget of all.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's threads.")] = 1,
    device: Annotated[str | None, typer.Option(help="Default cuda where there is one, else cpu.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; default in benchmarks/results.")] = None,
) -> None:
    """Serve many adapters of one model and compare with LoRA."""
    torch.set_num_threads(threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    console = Console(width=140)
    if model is Model.llama:
        workload = random_llama(d, depth, tokens, where, torch.float32, False)
    else:
        workload = smollm2(tokens, where, torch.float32, False)
    methods = served_methods(workload, rank)
    names = [f"adapter{n}" for n in range(adapters)]
    models = {name: with_adapters(workload, method, adapters) for name, method in methods.items()}
    models[FUSED] = with_adapters(workload, methods[LORA], 2)
    base = workload.copy_of_base().eval()
    with tempfile.TemporaryDirectory() as staging:
        folder = Path(staging)
        console.print("[dim]saving, sizes")
        save_all({name: models[name] for name in methods}, folder)
        console.print("[dim]switches")
        costs = switches(models, names[:2], rounds, where)
        found = sizes({name: models[name] for name in methods}, names[0], folder)
        console.print("[dim]forward passes")
        costs += passes(base, models, names, tokens, rounds, where)
        for name in (SPARSE, S2FT, FUSED):
            del models[name]
        console.print("[dim]pools")
        costs += pools(workload, models[LORA], names, folder, rounds, where)
    show(console, costs, found)
    content = {
        "format": 1,
        "environment": environment(where),
        "options": {
            "model": workload.name, "sizes": workload.sizes, "adapters": adapters, "tokens": tokens, "rank": rank,
            "rounds": rounds, "clock": main_clock(where),
        },
        "costs": [asdict(cost) for cost in costs],
        "sizes": [asdict(size) for size in found],
    }  # fmt: skip
    path = output or RESULTS / f"serving-{model.value}-{where.type}.json"
    write_json(path, content)
    console.print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
