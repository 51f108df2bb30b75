"""``python -m benchmarks.sync``: bytes and seconds of sparse weight sync, against sending the whole merged model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load, save
from torch import nn

from sparse_peft import SparseConfig
from sparse_peft.sync import Publication, Publisher, Receiver, from_bytes, to_bytes

from .measure import Ratio, interleave, main_clock, paired
from .report import environment, write_json
from .workloads import random_llama, smollm2

RESULTS = Path(__file__).parent / "results"


@dataclass
class Case:
    """One density. Bytes are of whole messages; seconds cover making, encoding, decoding and applying one.

    Attributes:
        share: of the adapted layers' weights that train.
        first: bytes of a full publication.
        later: bytes after a step that changed all values.
        full: bytes of the merged model.
        seconds: of a later publication.
        full_seconds: of merging, sending the whole model and unmerging.
        vs_full: paired ratio of both.
        equal: whether the engine's weights are the merged model's, bit for bit.
    """

    share: float
    first: int
    later: int
    full: int
    seconds: float
    full_seconds: float
    vs_full: Ratio
    equal: bool


def step(model: nn.Module) -> None:
    """What an optimizer does: every value changes, by about AdamW's step at LoRA's usual rate."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter).sign(), alpha=2e-4)


def sync_once(publisher: Publisher, receiver: Receiver) -> int:
    """A publication's way from the trainer to the engine; its bytes."""
    message = to_bytes(publisher.publish())
    publication: Publication = from_bytes(message)
    receiver.apply_(publication)
    publisher.acknowledge(publication.sequence)
    return len(message)


def merged_weights(model: PeftModel, names: Collection[str]) -> bytes:
    """The merged model as one message, as trainers without sparse sync send it."""
    model.merge_adapter()
    try:
        inner = model.get_base_model()
        state = {n.replace(".base_layer.", "."): p.detach() for n, p in inner.named_parameters()}
        return save({name: state[name].contiguous() for name in names})
    finally:
        model.unmerge_adapter()


@torch.no_grad()
def read_weights(engine: nn.Module, message: bytes) -> None:
    """Take a whole model, as an engine without sparse sync does."""
    weights = dict(engine.named_parameters())
    for name, tensor in load(message).items():
        weights[name].copy_(tensor)


def send_everything(model: PeftModel, engine: nn.Module) -> int:
    """The merged model's way from the trainer to the engine; its bytes."""
    message = merged_weights(model, dict(engine.named_parameters()))
    read_weights(engine, message)
    return len(message)


def measure(base: nn.Module, share: float, rounds: int) -> Case:
    engines = copy.deepcopy(base), copy.deepcopy(base)
    config = SparseConfig(density=share, target_modules="all-linear", init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    publisher, receiver = Publisher(model), Receiver(engines[0])
    step(model)
    first = sync_once(publisher, receiver)
    device = next(model.parameters()).device
    sizes: dict[str, int] = {}

    def ours() -> None:
        step(model)
        sizes["later"] = sync_once(publisher, receiver)

    def full() -> None:
        step(model)
        sizes["full"] = send_everything(model, engines[1])

    actions: dict[str, Callable[[], object]] = {"ours": ours, "full": full}
    samples, clock = interleave(actions, rounds, device, warmup=1), main_clock(device)
    step(model)
    sync_once(publisher, receiver)
    send_everything(model, engines[1])
    pairs = zip(engines[0].parameters(), engines[1].parameters(), strict=True)
    middle = {name: sorted(s.on(clock) for s in found)[rounds // 2] for name, found in samples.items()}
    return Case(
        share,
        first,
        sizes["later"],
        sizes["full"],
        middle["ours"],
        middle["full"],
        paired(samples["ours"], samples["full"], clock),
        all(torch.equal(a, b) for a, b in pairs),
    )


def lora_bytes(base: nn.Module, rank: int) -> int:
    """Bytes of a LoRA's factors, which a server of LoRA adapters is sent instead."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, target_modules="all-linear"))
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def main(
    shares: Annotated[list[float] | None, typer.Option(help="Densities; default 0.001 and 0.01.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's threads.")] = 1,
    small: Annotated[bool, typer.Option(help="A small random Llama instead of SmolLM2-135M.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default in benchmarks/results.")] = None,
) -> None:
    """Bytes and seconds of a weight sync in bfloat16, without a network."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    if small:
        base, name = random_llama(64, 2, 32, device, torch.bfloat16, False).base, "llama"
    else:
        base, name = smollm2(512, device, torch.bfloat16, False).base, "smollm2"
    cases = [measure(base, share, rounds) for share in shares or (0.001, 0.01)]
    table = Table(title=f"weight sync, {name} in bfloat16")
    for title in ("density", "first, MB", "later, MB", "of the model", "seconds", "full, s", "/ full", "equal"):
        table.add_column(title, justify="right")
    for case in cases:
        ratio = f"{case.vs_full.median:.3f} ({case.vs_full.low:.3f}-{case.vs_full.high:.3f})"
        sizes = (f"{case.first / 1e6:.2f}", f"{case.later / 1e6:.2f}", f"{case.later / case.full:.2%}")
        times = (f"{case.seconds:.3f}", f"{case.full_seconds:.3f}", ratio)
        table.add_row(f"{case.share:.1%}", *sizes, *times, str(case.equal))
    console = Console(width=140)
    console.print(table)
    path = output or RESULTS / f"sync-{name}-cpu.json"
    options = {"rounds": rounds, "lora_r16_bytes": lora_bytes(base, 16)}
    write_json(path, {"format": 1, **environment(device), "options": options, "cases": [asdict(c) for c in cases]})
    console.print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
