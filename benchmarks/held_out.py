"""SmolLM2-135M's loss on held-out text after one change or another; a run that was stopped goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from examples.smollm2 import held_out_loss, kjv_blocks, load_model, load_tokenizer

from .report import environment, write_json

CPU = torch.device("cpu")
ROUNDING = 1e-4  # of a loss


class Row(Protocol):
    """A dataclass that says what a change costs: its first two fields are the way and its setting."""

    loss: float
    cpu_seconds: float


def as_batches(blocks: list[list[int]], size: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.tensor(blocks[i : i + size]), "use_cache": False} for i in range(0, len(blocks), size)]


def check_ways(only: list[str] | None, ways: Iterable[str]) -> list[str]:
    """The ways to measure, all by default."""
    unknown = set(only or ()) - set(ways)
    if unknown:
        raise typer.BadParameter(f"--only {', '.join(map(repr, unknown))}: some of {', '.join(map(repr, ways))}")
    return only or list(ways)


@dataclass(frozen=True)
class HeldOut:
    """A model, the text that changes see, and the text that the loss is measured on.

    Attributes:
        model: which comes back after each change.
        data: batches of training text.
        unseen: blocks of held-out text.
        options: how many blocks of which length.
        dense_loss: of the model as it is.
    """

    model: nn.Module
    data: list[dict[str, Tensor]]
    unseen: list[list[int]]
    options: dict[str, int]
    dense_loss: float

    def loss(self) -> float:
        """Of the model as it is now."""
        return held_out_loss(self.model, self.unseen)

    @classmethod
    def load(cls, calibration: int, held_out: int, length: int) -> HeldOut:
        """The real model and text, in blocks of ``length`` tokens."""
        tokenizer, model = load_tokenizer(), load_model()
        data = as_batches(kjv_blocks(tokenizer, length, limit=calibration), 8)
        unseen = kjv_blocks(tokenizer, length, "heldout", limit=held_out)
        options = {"calibration_blocks": calibration, "held_out_blocks": held_out, "length": length}
        return cls(model, data, unseen, options, held_out_loss(model, unseen))

    def measure(
        self,
        cells: Iterable[tuple[str, Any]],
        quality: Callable[..., Row],
        row: type[Row],
        out: Path,
        console: Console,
        fresh: bool = False,
        **options: Any,
    ) -> list[Any]:
        """Measure ways with their settings, and write the file after each; what it has already is not repeated.

        Args:
            cells: ``(way, setting)``.
            quality: ``quality(model, way, setting, data, unseen)``.
            row: the dataclass of its results.
            out: the file. One of other options or versions is begun anew.
            console: for one line a cell.
            fresh: begin anew in any case.
            options: of the run, beside the text's.
        """
        head = {
            "format": 1,
            "environment": environment(CPU),
            "options": self.options | options,
            "dense_loss": self.dense_loss,
        }
        found = [] if fresh else [row(**content) for content in _rows_of(out, head)]
        done = {tuple(asdict(known).values())[:2] for known in found}  # type: ignore[call-overload]
        for way, setting in cells:
            if (way, setting) in done:
                continue
            found.append(quality(self.model, way, setting, self.data, self.unseen))
            console.print(f"{way}, {setting}: {found[-1].loss:.4f} in {found[-1].cpu_seconds:.0f} s")
            write_json(out, {**head, "rows": [asdict(known) for known in found]})  # type: ignore[call-overload]
        if self.loss() != self.dense_loss:
            raise RuntimeError(f"the model did not come back: its loss is no longer {self.dense_loss}")
        return found


def _rows_of(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file from the same conditions; the dense loss may be rounded as another processor does."""
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    is_same = all(content.get(key) == head[key] for key in ("format", "environment", "options"))
    is_near = abs(content.get("dense_loss", math.inf) - head["dense_loss"]) < ROUNDING
    return content["rows"] if is_same and is_near else []
