"""Programs and functions in processes of their own.

A process begins with torch, transformers and PEFT imported, but not sparse_peft: these imports happen once, in a
server that forks itself for every process.
"""

import faulthandler
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
# DDP's reducer must not be the last to hold a group: its end waits for gloo's threads and keeps Python's lock, and a
# thread that still drops what a hook had saved waits for the lock.
_groups: list[Any] = []


@dataclass(frozen=True)
class Completed:
    """The exit code of a program and its output."""

    returncode: int
    stdout: str
    stderr: str


class Started:
    """A program that runs."""

    def __init__(self, process: Any, output: Path) -> None:
        self._process, self._output = process, output

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return bool(self._process.is_alive())

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self._process.pid, number)

    def completed(self, timeout: float | None = None) -> Completed:
        """Wait for its end; it is killed after ``timeout`` seconds, and its exit code is -9 then."""
        self._process.join(timeout)
        self._process.kill()
        self._process.join()
        return Completed(self._process.exitcode, *((self._output / n).read_text() for n in ("stdout", "stderr")))


def run_code(code: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Completed:
    """Run ``python -c code`` in a folder, with ``env`` added to the environment."""
    with started_code(code, env=env, cwd=cwd) as process:
        return process.completed()


def run_module(name: str, *arguments: object, env: Mapping[str, str] | None = None) -> Completed:
    """Run ``python -m name arguments``, with ``env`` added to the environment."""
    with _started(_as_module, (name, *map(str, arguments)), env, None) as process:
        return process.completed()


def started_code(
    code: str, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> AbstractContextManager[Started]:
    """Start ``python -c code arguments`` for the block, at whose end it is killed."""
    return _started(_as_code, (code, *map(str, arguments)), env, cwd)


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
    _groups.append(distributed.group.WORLD)
    torch.set_num_threads(1)


@contextmanager
def process_group(rank: int, address: object, timeout: timedelta = GROUP_TIMEOUT, size: int = 2) -> Iterator[None]:
    """``join_group`` for the block, which the processes leave together."""
    join_group(rank, address, timeout, size)
    yield
    distributed.barrier()
    distributed.destroy_process_group()


@contextmanager
def _started(
    program: Callable[..., None], arguments: tuple[str, ...], env: Mapping[str, str] | None, cwd: Path | None
) -> Iterator[Started]:
    with TemporaryDirectory() as folder:
        process = SERVER.Process(target=_redirected, args=(Path(folder), dict(env or {}), cwd, program, arguments))
        process.start()
        try:
            yield Started(process, Path(folder))
        finally:
            process.kill()
            process.join()


def _redirected(output, env, cwd, program, arguments) -> None:
    os.environ.update(env)
    for name, stream in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), stream)
    if cwd is not None:
        os.chdir(cwd)
    # a shell lets its background jobs ignore Ctrl-C, and with them the tests and their programs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program(*arguments)


def _as_code(code: str, *arguments: str) -> None:
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


def _as_module(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
