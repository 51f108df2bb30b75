"""``sparse-peft merge``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..adapters import export
from .folders import adapter_folder, model_folder, new_folder
from .output import ForceOption, JsonOption, answering, bytes_text, working

# what a tokenizer or processor consists of; it is the base model's
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*processor_config.json",
)


def merge(
    base: Annotated[Path, typer.Argument(help="The base model's folder.", metavar="BASE")],
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.", metavar="ADAPTER")],
    out: Annotated[Path, typer.Argument(help="The merged model's folder.", metavar="OUT")],
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the base model with the adapter in its weights. Loading it needs neither PEFT nor this package."""
    with answering("merge", as_json) as answer:
        model_folder(base), adapter_folder(adapter)
        with new_folder(out, force) as staging, working("loading, merging, writing"):
            export(adapter, staging, "merged", base=base)
            copied = copy_companions(base, staging)
        answer.content = {"output": str(out), **files_in(out, copied)}
        answer.show = lambda console: show_model(console, answer.content)


def copy_companions(base: Path, folder: Path) -> list[str]:
    """Copy the base model's tokenizer and processor files; their names."""
    companions = sorted({path for pattern in COMPANIONS for path in base.glob(pattern) if path.is_file()})
    for path in companions:
        shutil.copy2(path, folder / path.name)
    return [path.name for path in companions]


def files_in(folder: Path, copied: list[str]) -> dict[str, Any]:
    """A model's folder for programs."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {
        "bytes": sum(path.stat().st_size for path in files),
        "files": [path.name for path in files],
        "copied": copied,
    }


def show_model(console: Console, content: dict[str, Any]) -> None:
    """A model's folder for people."""
    console.print(f"[bold]{escape(content['output'])}[/]: {bytes_text(content['bytes'])}", soft_wrap=True)
    console.print(escape(", ".join(content["files"])))
