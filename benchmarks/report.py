"""A run as a table on the terminal and as a JSON file."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import sparse_peft

from .goals import Verdict
from .measure import Ratio
from .runner import Result, Row

FORMAT = 1
PACKAGES = ("torch", "peft", "transformers", "sparse-peft")
MEGABYTE = 1e6


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def environment(device: torch.device) -> dict[str, str | int | dict[str, str]]:
    """Versions and machine; nothing that tells whose machine it is."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "os": platform.system(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__
    if package == "sparse-peft":  # run from a checkout, the package need not be installed
        return sparse_peft.__version__
    return version(package)


def to_json(results: list[Result], verdicts: list[list[Verdict]], options: dict, machine: dict) -> dict:
    """Everything a run found; samples are ``{"wall": seconds, "cpu": seconds}``, one a round."""
    workloads = [
        result.to_dict() | {"goals": [{**vars(verdict), "passed": verdict.passed} for verdict in judged]}
        for result, judged in zip(results, verdicts, strict=True)
    ]
    return {"format": FORMAT, **machine, "options": options, "workloads": workloads}


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    staged.replace(path)


def _ratio(value: Ratio | float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    if isinstance(value, Ratio):
        return f"{value.median:.{digits}f} ({value.low:.{digits}f}-{value.high:.{digits}f})"
    return f"{value:.{digits}f}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / MEGABYTE:.2f}"


COLUMNS = {
    "method": lambda row: row.method,
    "trained": lambda row: f"{row.entries:,}",
    "step / LoRA": lambda row: _ratio(row.step_vs_lora),
    "/ frozen": lambda row: _ratio(row.step_vs_frozen),
    "/ full": lambda row: _ratio(row.step_vs_full),
    "/ dropout": lambda row: _ratio(row.step_vs_dropout),
    "/ SHiRA": lambda row: _ratio(row.step_vs_shira),
    "peak MB": lambda row: _megabytes(row.peak_extra),
    "x frozen": lambda row: _ratio(row.peak_vs_frozen),
    "x LoRA's": lambda row: _ratio(row.peak_extra_vs_lora),
    "saved MB": lambda row: _megabytes(row.saved),
    "state MB": lambda row: _megabytes(row.state),
    "file MB": lambda row: _megabytes(row.file),
    "B/entry": lambda row: _ratio(row.bytes_per_entry),
    "switch / LoRA": lambda row: _ratio(row.switch_vs_lora, 3),
    "decode / base": lambda row: _ratio(row.decode_vs_base),
}


def table(result: Result) -> Table:
    """One line a method. Ratios: median (lowest-highest) of the rounds' paired ratios."""
    sizes = ", ".join(f"{name} {value}" for name, value in result.sizes.items())
    noise = result.decode_noise
    caption = f"{result.clock} time" + (f"; decode noise, base / base: {_ratio(noise, 3)}" if noise else "")
    drawn = Table(title=f"{result.workload}: {sizes}", caption=caption)
    for index, title in enumerate(COLUMNS):
        drawn.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in result.rows:
        drawn.add_row(*(_cell(row, column) for column in COLUMNS))
    return drawn


def _cell(row: Row, column: str) -> str:
    return COLUMNS[column](row)


def goals_table(result: Result, verdicts: list[Verdict]) -> Table:
    drawn = Table(title=f"{result.workload}: goals")
    for title in ("goal", "method", "bound", "value", ""):
        drawn.add_column(title, no_wrap=True)
    for verdict in verdicts:
        verdict_text = "[green]pass[/green]" if verdict.passed else "[red]miss[/red]"
        drawn.add_row(verdict.goal, verdict.method, f"<= {verdict.bound:.3f}", _ratio(verdict.value, 3), verdict_text)
    return drawn


def show(results: list[Result], verdicts: list[list[Verdict]], console: Console) -> None:
    for result, judged in zip(results, verdicts, strict=True):
        console.print(table(result))
        if judged:
            console.print(goals_table(result, judged))
