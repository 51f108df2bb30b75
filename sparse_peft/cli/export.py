"""``sparse-peft export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from peft import LoraConfig, PeftConfig
from rich.console import Console
from rich.markup import escape

from ..adapters import EXPORT_FORMS, LowRankExport
from ..adapters import export as export_adapter
from .folders import adapter_folder, model_folder, new_folder
from .merge import copy_companions, files_in, show_model
from .output import ForceOption, JsonOption, UsageError, answering, share_text, working


def export(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.", metavar="ADAPTER")],
    out: Annotated[Path, typer.Argument(help="The new folder.", metavar="OUT")],
    form: Annotated[
        str,
        typer.Option(
            help="merged: the whole model; lora: exactly the adapter, if it has that form and takes no more than the "
            "merged model; low_rank: its best LoRA of --rank."
        ),
    ] = EXPORT_FORMS[0],
    base: Annotated[Path | None, typer.Option(help="The base model's folder; by default the adapter's own.")] = None,
    rank: Annotated[int | None, typer.Option(help="With low_rank.")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="With lora: one rank for all layers.")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter for programs that do not know this package: as a merged model, or as plain LoRA."""
    with answering("export", as_json) as answer:
        adapter_folder(adapter)
        if form not in EXPORT_FORMS:
            raise UsageError(f"form={form!r}: one of {', '.join(EXPORT_FORMS)} is expected")
        if (rank is not None) != (form == "low_rank"):
            raise UsageError(f"form={form!r} with rank={rank}: a rank is given exactly with low_rank")
        if uniform and form != "lora":
            raise UsageError(f"form={form!r} with --uniform: that is for lora")
        if base is not None:
            model_folder(base)
        with new_folder(out, force) as staging, working("loading, writing"):
            made = export_adapter(adapter, staging, form, base=base, rank=rank, uniform=uniform)
            copied = copy_companions(base or _own_base(adapter), staging) if made is None else []
        answer.content = {"output": str(out), "form": form}
        if made is None:
            answer.content |= files_in(out, copied)
            answer.show = lambda console: show_model(console, answer.content)
        else:
            answer.content |= lora_content(made)
            answer.show = lambda console: show(console, answer.content)


def _own_base(adapter: Path) -> Path:
    """The base model's folder that the adapter's config names; its weights were read from there."""
    return Path(str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path))


def lora_content(made: LoraConfig | LowRankExport) -> dict[str, Any]:
    """A LoRA for programs."""
    config = made.config if isinstance(made, LowRankExport) else made
    patterns = config.rank_pattern or {}
    return {
        "ranks": {name: patterns.get(name, config.r) for name in sorted(config.target_modules or ())},
        "error": made.error if isinstance(made, LowRankExport) else 0.0,
        "layer_errors": made.errors if isinstance(made, LowRankExport) else {},
    }


def show(console: Console, content: dict[str, Any]) -> None:
    """A LoRA for people."""
    ranks, errors = content["ranks"].values(), content["layer_errors"]
    console.print(f"[bold]{escape(content['output'])}[/]: LoRA of {len(ranks)} layers", soft_wrap=True)
    console.print(f"ranks {min(ranks)} to {max(ranks)}")
    if errors:
        worst = max(errors, key=errors.get)
        console.print(
            f"what is missing of the adapter (Frobenius norm): {share_text(content['error'])}, at most "
            f"{share_text(errors[worst])} in {worst}"
        )
    else:
        console.print("exactly the adapter, up to rounding")
