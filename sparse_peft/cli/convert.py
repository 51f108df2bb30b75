"""``sparse-peft convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..adapters import CONVERSION_TARGETS
from ..adapters import convert as convert_adapter
from ..adapters.modules_to_save import OTHERS
from ..constraints import OneOf, validated
from .folders import model_folder, new_folder
from .output import ForceOption, JsonOption, UsageError, answering, asked, working

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def convert(
    source: Annotated[Path, typer.Argument(help="An adapter's folder, of this or another program.", metavar="SOURCE")],
    out: Annotated[Path, typer.Argument(help="The new adapter's folder.", metavar="OUT")],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(CONVERSION_TARGETS)}.")] = "sparse",
    base: Annotated[Path | None, typer.Option(help="The base model's folder, for other programs' adapters.")] = None,
    others: Annotated[
        str, typer.Option(help="What an LT-SFT or SaRA file changes besides linear layers: refuse, leave_out or save.")
    ] = "refuse",
    threshold: Annotated[float | None, typer.Option(help="SaRA's, for files without it.")] = None,
    pickles: Annotated[
        bool, typer.Option("--pickles", help="Read tensors out of SpIEL's, LT-SFT's and SaRA's pickles, running none.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn SHiRA, Super-Tuning, SpIEL, LT-SFT and SaRA files into sparse deltas, those into SHiRA, Super-Tuning."""
    with answering("convert", as_json) as answer:
        if to not in CONVERSION_TARGETS:
            raise UsageError(f"to={to!r}: one of {', '.join(CONVERSION_TARGETS)} is expected")
        with asked():
            validated("others", others, Annotated[str, OneOf(OTHERS)])
        if not source.exists():
            raise UsageError(f"{source}: no such file or folder")
        if base is not None:
            model_folder(base)
        if is_pickled(source) and not pickles:
            raise UsageError(
                f"{source}: its tensors are in a pickle, which is not read unasked; --pickles reads it with torch's "
                "restricted reader, which builds tensors and runs nothing"
            )
        with new_folder(out, force) as staging, working("converting"):
            config: Any = convert_adapter(source, staging, to, base=base, others=others, threshold=threshold)
        peft_type = getattr(config.peft_type, "value", str(config.peft_type))
        answer.content = {"output": str(out), "peft_type": peft_type, "layers": sorted(config.target_modules or ())}
        answer.show = lambda console: show(console, answer.content)


def is_pickled(source: Path) -> bool:
    """Whether an adapter has pickles and no safetensors."""
    if source.is_file():
        return source.suffix in PICKLES
    return not any(source.glob("*.safetensors")) and any(path.suffix in PICKLES for path in source.iterdir())


def show(console: Console, content: dict) -> None:
    layers = len(content["layers"])
    console.print(f"[bold]{escape(content['output'])}[/]: {content['peft_type']}, {layers} layers", soft_wrap=True)
