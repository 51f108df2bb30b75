"""Files of an adapter that are replaced together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft.peft_model
from peft import PeftModel
from torch import Tensor

from ...staging import replaced_together, staging_folder
from .wrapped import wrap_once


def write_compactly(file: Path) -> None:
    """Write a JSON object anew with one line for each of its fields: sizes of layers would take hundreds."""
    content = json.loads(file.read_text(encoding="utf-8"))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    file.write_text(f"{{\n{lines}\n}}", encoding="utf-8")


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
