"""``sparse-peft export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..adapters import LowRankExport
from ..adapters import export as export_adapter
from .folders import adapter_folder, model_folder, new_folder
from .output import ForceOption, JsonOption, UsageError, answering, share_text, working

FORMS = ("lora", "low_rank")


def export(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.", metavar="ADAPTER")],
    out: Annotated[Path, typer.Argument(help="The LoRA's folder.", metavar="OUT")],
    form: Annotated[
        str, typer.Option(help="lora: exactly the adapter, if it has that form; low_rank: its best LoRA of --rank.")
    ] = "lora",
    base: Annotated[Path | None, typer.Option(help="The base model's folder; by default the adapter's own.")] = None,
    rank: Annotated[int | None, typer.Option(help="With low_rank.")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="With lora: one rank for all layers.")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as plain LoRA, for programs that know only that. For a whole model: merge."""
    with answering("export", as_json) as answer:
        adapter_folder(adapter)
        if form not in FORMS:
            hint = "; sparse-peft merge writes whole models" if form == "merged" else ""
            raise UsageError(f"form={form!r}: one of {', '.join(FORMS)} is expected{hint}")
        if (rank is not None) != (form == "low_rank"):
            raise UsageError(f"form={form!r} with rank={rank}: a rank is given exactly with low_rank")
        if base is not None:
            model_folder(base)
        with new_folder(out, force) as staging, working("loading, writing"):
            made = export_adapter(adapter, staging, form, base=base, rank=rank, uniform=uniform)
        is_approximate = isinstance(made, LowRankExport)
        config = made.config if is_approximate else made
        answer.content = {
            "output": str(out),
            "form": form,
            "ranks": {name: config.rank_pattern.get(name, config.r) for name in sorted(config.target_modules)},
            "error": made.error if is_approximate else 0.0,
            "layer_errors": made.errors if is_approximate else {},
        }
        answer.show = lambda console: show(console, answer.content)


def show(console: Console, content: dict) -> None:
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
