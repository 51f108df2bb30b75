"""Codes in a file of their own, which adapters refer to by its hash."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...calibrate.codebooks import Sketch
from ...staging import staging_folder

SIDECAR = "sketch.safetensors"
FORMAT = "sparse_peft_sketch"


def file_sha256(path: str | os.PathLike) -> str:
    """The file's SHA-256 in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sketches(path: str | os.PathLike, sketches: dict[str, Sketch]) -> str:
    """Write the layers' codes and first tables, whole or not at all.

    Args:
        path: of the file; its folder is made if need be.
        sketches: ``{layer name: sketch}``.

    Returns:
        The file's SHA-256.
    """
    tensors, sizes = {}, {}
    for name, sketch in sketches.items():
        tensors[f"{name}.codes"] = sketch.codes.contiguous()
        tensors[f"{name}.codebooks"] = sketch.codebooks.contiguous()
        sizes[name] = [sketch.bits, sketch.cols]
    path = Path(path)
    with staging_folder(path.parent) as staging:
        save_file(tensors, staging / path.name, metadata={"format": "pt", FORMAT: json.dumps(sizes)})
        return file_sha256(staging / path.name)


def read_sketches(path: str | os.PathLike, sha256: str | None = None) -> dict[str, Sketch]:
    """Read what ``write_sketches`` wrote.

    Args:
        path: of the file.
        sha256: that it must have; any if None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another hash, or no file of sketches.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the adapter's codes should be in this file, which is not there; copy it beside the adapter, or "
            "set the config's `sketch` to where it lies"
        )
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        raise ValueError(
            f"{path}: SHA-256 {found} where the adapter was trained with {sha256}; it is another sketch or damaged: "
            "use the file that the adapter was saved with"
        )
    try:
        with safe_open(path, "pt") as file:
            sizes = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            if sizes is None:
                raise ValueError(f"{path}: no file of sketches, its metadata has no {FORMAT}")
            sketches = {}
            for name, (bits, cols) in sizes.items():
                codebooks = file.get_tensor(f"{name}.codebooks")
                codes = file.get_tensor(f"{name}.codes")
                sketches[name] = Sketch(codebooks, codes, bits=bits, groups=codebooks.shape[1], cols=cols)
            return sketches
    except SafetensorError as error:
        raise ValueError(f"{path}: no valid safetensors file ({error}); copy or download it again") from error
