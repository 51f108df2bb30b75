"""Sketches that SketchTune's authors released (LeanModels/SketchTune), as a config with codes and tables."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate.codebooks import Sketch, ascending
from ..ops import pack_codes
from ..registry import method_named
from ..tuners.base_config import BaseSparseConfig
from ..tuners.files.checks import check_values


def sketchtune_config(
    source: str | os.PathLike, tables: str | os.PathLike | None = None, **fields: Any
) -> BaseSparseConfig:
    """A [`SketchConfig`][sparse_peft.SketchConfig] with the codes of a released sketch, for ``get_peft_model``.

    Args:
        source: the base model's sketch, a pickle of ``{layer: (tables, codes)}``. Tensors alone are read from it:
            anything else that it names is refused before it is called.
        tables: trained tables for it, ``sketched_params.pkl``; by default those of the sketch.
        fields: of the config.

    Returns:
        A config of ``mode="replace"``. The base model's weights of these layers are of no use any more: the authors'
        sketches are of models that they compressed themselves.

    Raises:
        ValueError: no such file, one with something else in it, or tables and codes that do not fit each other.

    Example:
        >>> import pickle, tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft.adapters import sketchtune_config
        >>> sketch = {"0": (torch.randn(4, 1, 16), torch.randint(0, 256, (4, 1, 8), dtype=torch.uint8))}
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(pickle.dumps(sketch)), file.flush()
        ...     config = sketchtune_config(file.name)
        >>> get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 4)), config).base_model.model[0].path()
        'decoded'
    """
    stored = _read(Path(source), "layers' tables and codes")
    trained = {} if tables is None else _read(Path(tables), "layers' tables")
    if unknown := set(trained) - set(stored):
        raise ValueError(f"{tables}: layer {min(unknown)} is not in {source}; the tables are for another sketch")
    sketches = {}
    for name, pair in stored.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
            raise ValueError(f"{source}: layer {name}: a pair of tables and codes is expected")
        sketches[str(name)] = _sketch(str(name), trained.get(name, pair[0]), *pair)
    bits = {sketch.bits for sketch in sketches.values()}
    if len(bits) != 1:
        raise ValueError(f"{source}: layers of {sorted(bits)} bits; SketchConfig has one number for all")
    groups = {name: sketch.groups for name, sketch in sketches.items()}
    usual = max(groups.values())
    make_config: Any = method_named("sketch").config_class
    config: BaseSparseConfig = make_config(
        mode="replace",
        bits=bits.pop(),
        groups=usual,
        groups_pattern={name: count for name, count in groups.items() if count != usual},
        target_modules=sorted(sketches),
        **fields,
    )
    config.sketches = sketches  # as sketch_model leaves them
    return config


def _sketch(name: str, tables: Any, first: Tensor, codes: Tensor) -> Sketch:
    """Two codes a byte, that of the even column in the high half, whatever the number of bits."""
    if not isinstance(tables, Tensor) or tables.shape != first.shape:
        raise ValueError(f"layer {name}: tables of another shape than the sketch's; they are for another one")
    if tables.ndim == 2:
        tables, codes = tables[:, None], codes.reshape(codes.shape[0], 1, -1)
    levels = tables.shape[-1]
    if tables.ndim != 3 or codes.ndim != 3 or codes.dtype != torch.uint8 or tables.shape[:2] != codes.shape[:2]:
        raise ValueError(
            f"layer {name}: tables {tuple(tables.shape)} and {codes.dtype} codes {tuple(codes.shape)}; (out, groups, "
            "2**bits) and uint8 (out, groups, in / groups / 2) are expected"
        )
    bits = levels.bit_length() - 1
    if levels != 1 << bits or bits not in (2, 3, 4):
        raise ValueError(f"layer {name}: tables of {levels} entries; 4, 8 or 16 are expected")
    check_values(tables, name, "read")
    flat = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1)
    if int(flat.max()) >= levels:
        raise ValueError(f"layer {name}: code {int(flat.max())} for tables of {levels} entries; the file is damaged")
    books, flat = ascending(tables.float(), flat)
    return Sketch(books, pack_codes(flat, bits), bits, books.shape[1], flat.shape[1])


# ------------------------------------------------------------------ the file


def _storage(content: bytes) -> Any:
    """A tensor's numbers, which torch puts into pickles as a file of its own; its restricted reader reads it."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _parameter(data: Tensor, requires_grad: bool, hooks: Any) -> Tensor:
    return data


# All that the authors' files name; anything else ends the reading.
ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
}


class _Tensors(pickle.Unpickler):
    """Reads containers, numbers and tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return ALLOWED[module, name]


def _read(path: Path, what: str) -> dict[Any, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            content = _Tensors(file).load()
    except Exception as error:  # damaged files raise many kinds
        raise ValueError(
            f"{path}: not read, since it has more in it than tensors and plain containers, or is damaged: {error}. "
            "Files like that can run code. Load it with the program that wrote it, where you trust it, and decode the "
            "weights there: SketchConfig(mode='replace') on the dense model finds tables that equal them"
        ) from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: a dict of the {what} is expected")
    return content
