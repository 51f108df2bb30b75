"""Files that are replaced whole: each once it is complete, or those of one adapter together."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import peft.peft_model
from peft import PeftModel
from torch import Tensor

from .wrapped import wrap_once


class _Waiting:
    """Staging folders whose files are complete, the folders that they belong to, and what follows."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.moves: list[tuple[Path, Path]] = []
        self.actions: list[Callable[[], None]] = []


_waiting: ContextVar[_Waiting | None] = ContextVar("waiting", default=None)


@contextmanager
def staging_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into, whose files move to ``folder`` once all of them are complete.

    Within ``replaced_together`` they wait for the others. After an exception nothing is left of them.

    Args:
        folder: made if need be; its files of the same names are replaced.
    """
    target, waiting = Path(folder), _waiting.get()
    target.mkdir(parents=True, exist_ok=True)
    with ExitStack() as own:
        stack = own if waiting is None else waiting.stack
        staging = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=target, prefix=".saving-")))
        yield staging
        if waiting is None:
            _move(staging, target)
        else:
            waiting.moves.append((staging, target))


def _move(staging: Path, target: Path) -> None:
    for path in sorted(staging.iterdir()):
        path.replace(target / path.name)


def write_compactly(file: Path) -> None:
    """Write a JSON object anew with one line for each of its fields: sizes of layers would take hundreds."""
    content = json.loads(file.read_text(encoding="utf-8"))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    file.write_text(f"{{\n{lines}\n}}", encoding="utf-8")


@contextmanager
def replaced_together() -> Iterator[None]:
    """Files of the staging folders inside take their places at the end, all of them or none."""
    with ExitStack() as stack:
        waiting = _Waiting(stack)
        token = _waiting.set(waiting)
        try:
            yield
        finally:
            _waiting.reset(token)
        for staging, target in waiting.moves:
            _move(staging, target)
    for action in waiting.actions:
        action()


def when_saved(action: Callable[[], None]) -> None:
    """Run an action once all files are in their places: now, or at the end of ``replaced_together``."""
    waiting = _waiting.get()
    if waiting is None:
        action()
    else:
        waiting.actions.append(action)


def is_waiting(path: str | os.PathLike) -> bool:
    """Whether a file is complete and will take this place."""
    waiting, wanted = _waiting.get(), Path(path)
    moves = [] if waiting is None else waiting.moves
    return any(target == wanted.parent and (staging / wanted.name).exists() for staging, target in moves)


def is_sparse(model: PeftModel) -> bool:
    """Whether any adapter of the model is one of this package's methods."""
    types = [getattr(config.peft_type, "value", config.peft_type) for config in model.peft_config.values()]
    return any(str(kind).startswith("SPARSE_PEFT_") for kind in types)


def guard_adapter_writes() -> None:
    """Make ``PeftModel.save_pretrained`` replace an adapter's files only once all of the new ones are complete.

    PEFT writes the weights in place and the config after them, and offers no hook. A full disk, or a config that
    cannot be written, would leave a mixture of the old adapter and the new one. PEFT's writer of weights is replaced
    for every adapter of the process: same bytes, other moment.
    """
    wrap_once(peft.peft_model, "safe_save_file", _write_whole)
    wrap_once(PeftModel, "save_pretrained", _save_together)


def _write_whole(
    write: Callable[..., None],
    tensors: dict[str, Tensor],
    filename: str | os.PathLike,
    metadata: dict[str, str] | None = None,
) -> None:
    """Replace a file of weights once the new one is complete."""
    path = Path(filename)
    with staging_folder(path.parent) as staging:
        write(tensors, staging / path.name, metadata=metadata)


def _save_together(save: Callable[..., None], model: PeftModel, *args: Any, **kwargs: Any) -> None:
    """Replace a sparse adapter's weights and config together."""
    with replaced_together() if is_sparse(model) else nullcontext():
        save(model, *args, **kwargs)
