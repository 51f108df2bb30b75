"""Text files as batches of a language model, and its perplexity on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..constraints import OneOf, validated
from .folders import model_folder
from .output import UsageError, asked

BATCH = 4  # sequences at once
DTYPES = ("auto", "float32", "bfloat16", "float16")

LengthOption = Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")]
DtypeOption = Annotated[str, typer.Option(help=f"Of the model: {', '.join(DTYPES)}.")]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]


def check_place(dtype: str, device: str) -> None:
    """Refuse a type that no model is loaded in, and a device that is none or is not there.

    Raises:
        UsageError: names the option.
    """
    with asked():
        validated("dtype", dtype, Annotated[str, OneOf(DTYPES)])
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device {device}: cpu or cuda is expected, and present here ({reason})") from error


def load_language_model(folder: Path, dtype: str, device: str) -> Any:
    """The language model of a folder, in evaluation mode.

    Raises:
        UsageError: the folder has no model.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(folder), dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def batches_of(text: Path, model: Path, length: int, sequences: int) -> list[dict[str, Any]]:
    """The first sequences of a text, as batches with labels.

    Args:
        text: a UTF-8 file.
        model: the folder that has the tokenizer.
        length: tokens of a sequence.
        sequences: most of them.

    Raises:
        UsageError: no such file, no text, or one too short for a single sequence.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{text}: no text file in UTF-8 ({error})") from error
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokens = tokenizer(content, add_special_tokens=False)["input_ids"]
    count = min(sequences, len(tokens) // length)
    if count < 1:
        raise UsageError(f"{text}: {len(tokens)} tokens, too few for one sequence of --length {length}")
    ids = torch.tensor(tokens[: count * length]).view(count, length)
    return [{"input_ids": part, "labels": part, "use_cache": False} for part in ids.split(BATCH)]


@torch.no_grad()
def perplexity(model: nn.Module, batches: list[dict[str, Any]]) -> float:
    """``exp`` of the mean loss of a next token, over sequences of equal length."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in batches:
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        total += float(model(**moved).loss) * len(batch["input_ids"])
        count += len(batch["input_ids"])
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf
