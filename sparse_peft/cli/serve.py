"""``sparse-peft serve``."""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from transformers import AutoModelForCausalLM, AutoTokenizer

from _sparse_peft_startup.install import install_advice

from ..serving import AdapterFolders, Engine, HttpServer, RequestError, ServerLimits, build_app
from ..structure import read_model_config
from .folders import adapter_folder
from .output import JsonOption, UsageError, answering, asked, working
from .texts import DeviceOption, DtypeOption, check_place

MIB = 2**20


def serve(
    model: Annotated[str, typer.Argument(help="The base model's folder or name on the hub.", metavar="MODEL")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter's name and folder; repeat it.", metavar="NAME=FOLDER")
    ] = None,
    adapter_root: Annotated[
        list[Path] | None, typer.Option(help="A folder whose adapters may be loaded at run time; repeat it.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the base model in requests; by default MODEL.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    adapter_memory: Annotated[
        int | None, typer.Option(min=1, help="MiB of loaded adapters; default no limit.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests in a batch; 1 for exact answers.")] = 8,
    batch_wait: Annotated[float, typer.Option(min=0, help="Milliseconds that a batch waits for more.")] = 5.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="KiB of a request.")] = 1024,
    ignore_base_names: Annotated[
        bool, typer.Option("--ignore-base-names", help="Take adapters that name another base.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Serve a model with many adapters over HTTP, with OpenAI's endpoints; each request's model names its adapter."""
    with answering("serve", as_json) as answer:
        missing = [package for package in ("starlette", "uvicorn") if find_spec(package) is None]
        if missing:
            raise UsageError(f"serve needs {' and '.join(missing)}: {install_advice('serve')}")
        folders = _adapters(adapter or [])
        roots = AdapterFolders([*(adapter_root or []), *folders.values()])
        check_place(dtype, device)
        with asked():
            read_model_config(model)
        with working("loading"):
            base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(model)
        engine = Engine(
            base.to(device), tokenizer, name or model, max_batch=max_batch, batch_wait=batch_wait / 1000,
            max_queue=max_queue, max_bytes=None if adapter_memory is None else adapter_memory * MIB,
            check_base_name=not ignore_base_names,
        )  # fmt: skip
        _add(engine, folders)
        server = HttpServer(build_app(engine, roots, ServerLimits(max_body * 1024, max_tokens)), host, port)
        names = [engine.name, *engine.pool.names]
        answer.content = {"url": server.url, "models": names}
        answer.show = lambda console: show(console, server.url, names, host)
    sys.stdout.flush()  # a pipe's reader waits for the address
    # uvicorn raises the signal that ended it once more when all is done
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.run()


def _adapters(given: list[str]) -> dict[str, Path]:
    """``{name: folder}`` of the options.

    Raises:
        UsageError: one that is none, or a name that is given twice.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UsageError(f"--adapter {text}: NAME=FOLDER is expected")
        if name in found:
            raise UsageError(f"--adapter {text}: the name {name!r} is given twice")
        found[name] = adapter_folder(Path(folder))
    return found


def _add(engine: Engine, folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        try:
            engine.add(name, folder)
        except RequestError as error:
            raise ValueError(error.message) from error


def show(console: Console, url: str, names: list[str], host: str) -> None:
    """Where the server is, for people."""
    console.print(f"[bold]{url}[/]  {len(names) - 1} adapters of {escape(names[0])}")
    if not _is_loopback(host):
        console.print(f"[yellow]--host {host}: everybody who reaches it can use it; there are no passwords[/]")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
