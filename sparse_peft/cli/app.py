"""The commands of ``sparse-peft``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .compare import compare
from .compose import compose
from .convert import convert
from .doctor import doctor
from .export import export
from .extract import extract
from .inspect import inspect
from .merge import merge
from .plan import plan

app = typer.Typer(
    name="sparse-peft",
    help="Plan sparse fine-tuning, and look at, change and pass on its adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


for command in (plan, inspect, compare, merge, export, extract, compose, convert, doctor):
    app.command()(command)
