"""Folders that commands are given: an adapter to read, one to write."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .output import UsageError


def adapter_folder(path: Path) -> Path:
    """The path, if it is an adapter's folder.

    Raises:
        UsageError: it is not; says what it is instead.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such folder; an adapter's is expected{from_the_hub(path)}")
    if not path.is_dir():
        raise UsageError(f"{path}: a file; the folder of an adapter is expected, with adapter_config.json in it")
    if not (path / "adapter_config.json").is_file():
        below = sorted(found.parent.name for found in path.glob("*/adapter_config.json"))
        hint = f"; there are adapters in it: {', '.join(below)}" if below else ""
        model = "; it is a model's folder" if not below and (path / "config.json").is_file() else ""
        raise UsageError(f"{path}: not an adapter, it has no adapter_config.json{hint}{model}")
    if not (path / "adapter_model.safetensors").is_file():
        if (path / "adapter_model.bin").is_file():
            raise UsageError(
                f"{path}: its weights are in adapter_model.bin, a pickle, which can run any code when it is loaded "
                "and is not read here; ask for the adapter as safetensors"
            )
        raise UsageError(f"{path}: not a whole adapter, it has no adapter_model.safetensors")
    return path


def from_the_hub(path: Path) -> str:
    """How to fetch what is not here, if the path may be a name on the Hub."""
    is_name = not path.exists() and not path.is_absolute() and len(path.parts) <= 2 and ".." not in path.parts
    return f". One of the Hub is fetched with `hf download {path} --local-dir FOLDER`" if is_name else ""


def model_folder(path: Path) -> Path:
    """The path, if it is the folder of a model whose weights can be read.

    Raises:
        UsageError: it is not; says what it is instead.
    """
    if not path.is_dir():
        what = "a file" if path.exists() else "no such folder"
        raise UsageError(f"{path}: {what}; the folder of a model is expected{from_the_hub(path)}")
    if not (path / "config.json").is_file():
        what = "an adapter" if (path / "adapter_config.json").is_file() else "not a model, it has no config.json"
        raise UsageError(f"{path}: {what}; the folder of a model is expected")
    if not any(path.glob("*.safetensors")):
        if any(path.glob("*.bin")):
            raise UsageError(
                f"{path}: its weights are pickles (.bin), which can run any code when they are loaded and are not "
                "read here; ask for the model as safetensors"
            )
        raise UsageError(f"{path}: not a whole model, it has no safetensors file")
    return path


def check_output(path: Path, force: bool) -> Path:
    """The path, if something new may be put there.

    Raises:
        UsageError: there is something already, or nothing that it could be put into.
    """
    if path.is_symlink() or (path.exists() and not force):
        raise UsageError(f"{path}: exists already; --force replaces it" + (" (not a link)" * path.is_symlink()))
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: the folder {path.absolute().parent} does not exist")
    return path


@contextmanager
def new_folder(path: Path, force: bool) -> Iterator[Path]:
    """A folder beside ``path`` to write into, which takes its name once everything inside has gone well.

    Raises:
        UsageError: see ``check_output``.
    """
    check_output(path, force)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: a file, which a folder does not replace")
    parent = path.absolute().parent
    staging = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}-"))
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}-old-"))
            path.rename(old / "was")
            try:
                staging.rename(path)
            except OSError:
                (old / "was").rename(path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
