"""``python -m benchmarks.experts``: training steps and decoding of mixture-of-experts models, with the experts frozen,
trained whole, with LoRA's ``target_parameters`` and at single entries."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from sparse_peft import SparseConfig

from .measure import Ratio, interleave, main_clock, measure_phases, paired, saved_bytes
from .report import environment, write_json

RESULTS = Path(__file__).parent / "results"
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
HIDDEN, INTERMEDIATE, TOP_K, RANK = 512, 256, 4, 8
NEW_TOKENS = 32  # of a text that is decoded
FROZEN, LORA, FULL = "frozen", f"LoRA r={RANK}", "full"
AT_ONE_PERCENT = "entries 1 %"
# Most time of a step and of a decoded token, and most bytes that a step saves, of a model whose entries train at 1 %.
MOST_OF_FROZEN, MOST_OF_LORA, MOST_SAVED, MOST_DECODE = 1.25, 0.5, 1.05, 1.02


def _lora() -> LoraConfig:
    return LoraConfig(r=RANK, target_modules=[], target_parameters=PARAMETERS)


def _entries(**budget: Any) -> SparseConfig:
    return SparseConfig(target_modules=[], target_parameters=PARAMETERS, **budget)


METHODS: dict[str, Callable[[], Any] | None] = {
    FROZEN: None,
    FULL: None,
    LORA: _lora,
    "entries 0.1 %": lambda: _entries(density=0.001),
    AT_ONE_PERCENT: lambda: _entries(density=0.01),
    "entries as LoRA": lambda: _entries(r=RANK),
}


def base_model(experts: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=experts,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)


class Subject:
    """A model of one method, with its optimizer.

    Args:
        method: one of ``METHODS``.
        base: the frozen base, which is copied.
        tokens: of a training step.
    """

    def __init__(self, method: str, base: nn.Module, tokens: int):
        model = copy.deepcopy(base)
        make = METHODS[method]
        self.config = None if make is None else make()
        if method == FULL:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.endswith(tuple(PARAMETERS)))
        self.model = model if self.config is None else get_peft_model(model, self.config)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3) if self.trained else None
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(1, tokens, HIDDEN, generator=generator).requires_grad_()
        self.token = torch.zeros(1, 1, dtype=torch.long)

    def forward(self) -> Tensor:
        """The loss; the input's gradient is wanted, as where layers below train."""
        return self.model(inputs_embeds=self.x).logits.square().mean()

    def step(self) -> None:
        """Forward, backward and update."""
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.x.grad = None

    def decode(self) -> None:
        """A text as users decode it, greedily and with a cache."""
        length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        found = self.model.generate(input_ids=self.token, do_sample=False, use_cache=True, pad_token_id=0, **length)
        assert found.shape[1] == 1 + NEW_TOKENS

    def call(self) -> None:
        """One token by a call of the model, without gradients."""
        with torch.inference_mode():
            self.model(self.token)

    def file_bytes(self) -> int:
        """Bytes of the adapter's tensors on disk."""
        if self.config is None:
            return 0
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return (Path(folder) / "adapter_model.safetensors").stat().st_size


@dataclass(frozen=True)
class Row:
    """What one method costs. Ratios are of paired rounds; those of bytes are to the frozen model's.

    Attributes:
        parameters: trained ones.
        saved: bytes that autograd keeps for backward.
        peak: bytes above what lived before the step.
        decode_vs_base: of a text by ``generate``, which calls the model inside PEFT's wrapper for each token.
        call_vs_base: of one token by a call of PEFT's wrapper.
    """

    experts: int
    tokens: int
    method: str
    parameters: int
    step_seconds: float
    step_vs_frozen: Ratio
    step_vs_lora: Ratio
    saved: int
    saved_vs_frozen: float
    peak: int
    peak_vs_frozen: float
    decode_vs_base: Ratio
    call_vs_base: Ratio
    file: int

    @property
    def goals(self) -> dict[str, bool]:
        """Which goals are met; none are set but at one percent."""
        if self.method != AT_ONE_PERCENT:
            return {}
        return {
            f"step <= {MOST_OF_FROZEN} frozen": self.step_vs_frozen.median <= MOST_OF_FROZEN,
            f"step <= {MOST_OF_LORA} LoRA": self.step_vs_lora.median <= MOST_OF_LORA,
            f"saved <= {MOST_SAVED} frozen": self.saved_vs_frozen <= MOST_SAVED,
            f"decode <= {MOST_DECODE} base": self.decode_vs_base.median <= MOST_DECODE,
        }


def measure(experts: int, layers: int, tokens: int, rounds: int, implementation: str) -> list[Row]:
    """All methods on a model with this number of experts, interleaved."""
    device = torch.device("cpu")
    clock, base = main_clock(device), base_model(experts, layers)
    base.set_experts_implementation(implementation)
    subjects = {name: Subject(name, base, tokens) for name in METHODS}
    steps = interleave({name: one.step for name, one in subjects.items()}, rounds, device, warmup=2)
    for one in subjects.values():
        one.model.eval()
    decode = _ratios({name: one.decode for name, one in subjects.items()}, 10 * rounds, rounds, device)
    call = _ratios({name: one.call for name, one in subjects.items()}, 40 * rounds, 5 * rounds, device)
    saved = {name: saved_bytes(one.forward, [*one.model.parameters(), one.x]) for name, one in subjects.items()}
    peaks = {}
    for name, one in subjects.items():
        _, phase = measure_phases([one.step, one.step], device)
        peaks[name] = phase.peak - phase.start
    return [
        Row(
            experts=experts,
            tokens=tokens,
            method=name,
            parameters=sum(parameter.numel() for parameter in one.trained),
            step_seconds=median(sample.on(clock) for sample in steps[name]),
            step_vs_frozen=paired(steps[name], steps[FROZEN], clock),
            step_vs_lora=paired(steps[name], steps[LORA], clock),
            saved=saved[name],
            saved_vs_frozen=saved[name] / saved[FROZEN],
            peak=peaks[name],
            peak_vs_frozen=peaks[name] / peaks[FROZEN],
            decode_vs_base=decode[name],
            call_vs_base=call[name],
            file=one.file_bytes(),
        )
        for name, one in subjects.items()
    ]


def _ratios(
    actions: dict[str, Callable[[], None]], rounds: int, of_lora: int, device: torch.device
) -> dict[str, Ratio]:
    """Times over the base's. Ratios near 1 need many rounds, for which LoRA takes too long."""
    clock = main_clock(device)
    slow = interleave({name: actions[name] for name in (FROZEN, LORA)}, of_lora, device, warmup=1)
    fast = {name: act for name, act in actions.items() if name != LORA}
    found = interleave(fast, rounds, device, warmup=3, warm_caches=True)
    ratios = {name: paired(found[name], found[FROZEN], clock) for name in fast}
    return ratios | {LORA: paired(slow[LORA], slow[FROZEN], clock)}


def draw(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    names = (
        "experts",
        "tokens",
        "method",
        "parameters",
        "step / frozen",
        "step / LoRA",
        "saved / frozen",
        "peak / frozen",
    )
    for name in (*names, "decode / base", "call / base", "file, MB", "goals"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        missed = [goal for goal, met in row.goals.items() if not met]
        table.add_row(
            str(row.experts),
            str(row.tokens),
            row.method,
            f"{row.parameters:,}",
            f"{row.step_vs_frozen.median:.2f} ± {row.step_vs_frozen.error:.2f}",
            f"{row.step_vs_lora.median:.2f}",
            f"{row.saved_vs_frozen:.2f}",
            f"{row.peak_vs_frozen:.2f}",
            f"{row.decode_vs_base.median:.3f} ± {row.decode_vs_base.error:.3f}",
            f"{row.call_vs_base.median:.2f} ± {row.call_vs_base.error:.2f}",
            f"{row.file / 1e6:.2f}" if row.file else "-",
            "-" if not row.goals else "missed: " + ", ".join(missed) if missed else "met",
        )
    return table


def main(
    experts: Annotated[
        list[int] | None, typer.Option(min=4, help="Numbers of experts; default 8, 32 and 128.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Of the model.")] = 2,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Of a training step; default 256 and 2048.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's threads.")] = 1,
    implementation: Annotated[str, typer.Option(help="Of the experts: eager, grouped_mm or batched_mm.")] = "eager",
    output: Annotated[Path | None, typer.Option(help="JSON file; default in benchmarks/results.")] = None,
    check: Annotated[bool, typer.Option(help="Exit with 1 if a goal is missed.")] = False,
) -> None:
    """Steps, memory and decoding with experts frozen, trained whole, by LoRA and at single entries."""
    torch.set_num_threads(threads)
    counts = experts or [8, 32, 128]
    steps = tokens or [256, 2048]
    rows = [
        row for count in counts for number in steps for row in measure(count, layers, number, rounds, implementation)
    ]
    console = Console(width=200)
    console.print(draw(rows, f"{layers} layers, {HIDDEN} wide, {implementation}"))
    path = output or RESULTS / f"experts-{implementation}-cpu.json"
    options = {
        "layers": layers,
        "hidden": HIDDEN,
        "intermediate": INTERMEDIATE,
        "top_k": TOP_K,
        "rounds": rounds,
        "implementation": implementation,
    }
    content = [{**asdict(row), "goals": row.goals} for row in rows]
    write_json(path, {"format": 2, **environment(torch.device("cpu")), "options": options, "rows": content})
    console.print(f"written: {path}")
    if check and not all(met for row in rows for met in row.goals.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
