"""The commands of ``sparse-peft``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from .compare import compare
from .compose import compose
from .convert import convert
from .doctor import doctor
from .export import export
from .extract import extract
from .fields import fields
from .inspect import inspect
from .merge import merge
from .output import USAGE, note_options, print_error
from .plan import plan

# typer brings its own copy of click, or not; this is the base of all errors in a command line
CommandLineError: type[Any] = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """The commands; with ``--json`` also an error in the command line is one JSON object on stdout."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        answers_json = standalone_mode and "--json" in arguments
        try:
            code = super().main(
                arguments, prog_name, complete_var, standalone_mode and not answers_json, windows_expand_args, **extra
            )
        except CommandLineError as error:
            if not answers_json:
                raise
            error.show()
            command = error.ctx.command.name if error.ctx is not None else None
            print_error(command or "sparse-peft", error.format_message(), USAGE)
            code = USAGE
        if answers_json:
            sys.exit(code)
        return code


app = typer.Typer(
    cls=Commands,
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


for command in (plan, fields, inspect, compare, merge, export, extract, compose, convert, doctor):
    app.command()(command)
    note_options(command)
