"""Programs and functions in processes of their own.

A process begins with torch, transformers and PEFT imported, but not sparse_peft: these imports happen once, in a
server that forks itself for every process.
"""

import faulthandler
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch.multiprocessing
from torch import distributed

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "transformers", "peft"])
# seconds after which processes that wait for one another are ended
LIMIT = 300.0
GROUP_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Completed:
    """The exit code of a program and its output."""

    returncode: int
    stdout: str
    stderr: str


def run_code(code: str, env: Mapping[str, str] | None = None) -> Completed:
    """Run ``python -c code``, with ``env`` added to the environment."""
    return _run(_as_code, (code,), env)


def run_module(name: str, *arguments: object, env: Mapping[str, str] | None = None) -> Completed:
    """Run ``python -m name arguments``, with ``env`` added to the environment."""
    return _run(_as_module, (name, *map(str, arguments)), env)


def run_on_two(function: Callable[..., None], *arguments: object, limit: float = LIMIT) -> None:
    """Run ``function(rank, *arguments)`` for ranks 0 and 1 at once."""
    run_on(2, function, *arguments, limit=limit)


def run_on(processes: int, function: Callable[..., None], *arguments: object, limit: float = LIMIT) -> None:
    """Run ``function(rank, *arguments)`` for each rank at once.

    Raises:
        TimeoutError: they did not end within ``limit`` seconds; each has printed where it was.
    """
    started = torch.multiprocessing.start_processes(
        _limited, (limit, function, arguments), nprocs=processes, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + limit + 10
    while not started.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() < deadline:
            continue  # one of them has ended
        for process in started.processes:
            process.kill()
        raise TimeoutError(f"{function.__name__}: processes {started.pids()} did not end within {limit} s")


def _limited(rank: int, limit: float, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    faulthandler.dump_traceback_later(limit, exit=True)
    function(rank, *arguments)


def results_on_two(function: Callable[..., Any], *arguments: object) -> tuple[Any, Any]:
    """What ``function(rank, *arguments)`` returned in both processes; their tracebacks where one raised."""
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        try:
            run_on_two(_keep_result, function, arguments, results)
        except Exception:
            pytest.fail("\n".join(str(value) for value in results.values()))
        return results[0], results[1]


def _keep_result(rank, function, arguments, results) -> None:
    try:
        results[rank] = function(rank, *arguments)
    except BaseException:
        results[rank] = traceback.format_exc()
        raise


def join_group(rank: int, address: object, timeout: timedelta = GROUP_TIMEOUT, size: int = 2) -> None:
    """Become one of ``size`` processes that meet at a file, in the environment that a launcher makes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # not used
    distributed.init_process_group(
        "gloo", init_method=f"file://{address}", rank=rank, world_size=size, timeout=timeout
    )
    torch.set_num_threads(1)


@contextmanager
def process_group(rank: int, address: object, timeout: timedelta = GROUP_TIMEOUT, size: int = 2) -> Iterator[None]:
    """``join_group`` for the block, which the processes leave together."""
    join_group(rank, address, timeout, size)
    yield
    distributed.barrier()
    distributed.destroy_process_group()


def _run(program: Callable[..., None], arguments: tuple[str, ...], env: Mapping[str, str] | None) -> Completed:
    with TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = SERVER.Process(target=_redirected, args=(stdout, stderr, dict(env or {}), program, arguments))
        process.start()
        process.join()
        return Completed(process.exitcode, stdout.read_text(), stderr.read_text())


def _redirected(stdout, stderr, env, program, arguments) -> None:
    os.environ.update(env)
    for file, stream in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    program(*arguments)


def _as_code(code: str) -> None:
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


def _as_module(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
