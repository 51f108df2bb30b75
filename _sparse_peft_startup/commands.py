"""The commands of ``sparse-peft``, found without importing them."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from .quiet import quieten, quieten_bitsandbytes
from .spelling import did_you_mean

# Each is a function in a module of its name in sparse_peft/cli/.
COMMANDS = (
    "plan",
    "fields",
    "train",
    "run",
    "eval",
    "inspect",
    "compare",
    "merge",
    "export",
    "extract",
    "compose",
    "convert",
    "serve",
    "prune",
    "curve",
    "doctor",
)
RUN_OTHER_PROGRAMS = ("run",)
# Commands without options of another program, so that all of theirs are this one's.
OWN_OPTIONS = tuple(name for name in COMMANDS if name not in ("run", "train"))
USAGE = 2
# typer brings its own copy of click, or not; this is the base of all errors in a command line
CommandLineError: type[Any] = typer.BadParameter.__mro__[1]


def package_folder() -> Path:
    """The folder of sparse_peft, which is not imported."""
    spec = PathFinder.find_spec("sparse_peft")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def summary(command: str) -> str:
    """A command's docstring, from its source."""
    module = ast.parse((package_folder() / "cli" / f"{command}.py").read_text(encoding="utf-8"))
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == command]
    return ast.get_docstring(functions[0]) or ""


def load(command: str) -> Any:
    """A command, imported."""
    function = getattr(import_module(f"sparse_peft.cli.{command}"), command)
    import_module("sparse_peft.cli.output").note_options(function)
    single = typer.Typer(add_completion=False, rich_markup_mode=app.rich_markup_mode)
    single.command(command, context_settings=getattr(function, "context_settings", None))(function)
    return get_command(single)


class Commands(TyperGroup):
    """The commands; with ``--json`` also an error in the command line is one JSON object on stdout."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The name and help of a command, as the list of all commands needs them."""
        return TyperCommand(cmd_name, help=summary(cmd_name)) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            name, _, rest = super().resolve_command(ctx, args)
        except CommandLineError as error:
            error.message = error.message.rstrip(".") + (did_you_mean([args[0]], COMMANDS) or ".")
            raise
        assert name is not None
        if not ctx.params["verbose"]:
            (quieten_bitsandbytes if name in RUN_OTHER_PROGRAMS else quieten)()
        return name, load(name), rest

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
        if "--verbose" in arguments[1:] and arguments[0] in OWN_OPTIONS:
            arguments.remove("--verbose")
            arguments.insert(0, "--verbose")
        try:
            code = super().main(
                arguments, prog_name, complete_var, standalone_mode and not answers_json, windows_expand_args, **extra
            )
        except CommandLineError as error:
            if not answers_json:
                raise
            error.show()
            command = error.ctx.command.name if error.ctx is not None else None
            import_module("sparse_peft.cli.output").print_error(
                command or "sparse-peft", error.format_message(), USAGE
            )
            code = USAGE
        if answers_json:
            sys.exit(code)
        return code


app = typer.Typer(
    cls=Commands,
    name="sparse-peft",
    help="Plan, train and evaluate sparse fine-tuning, and look at, change and pass on its adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(runpy.run_path(str(package_folder() / "version.py"))["__version__"])
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print other packages' notices and progress bars, too.")
    ] = False,
) -> None:
    pass
