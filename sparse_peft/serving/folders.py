"""Folders that adapters may come from: those that were named when the server was started."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..tuners.files.checks import shapes_in_file
from .requests import RequestError


class AdapterFolders:
    """Folders below which adapters may be loaded at run time.

    Args:
        roots: folders; they and what is in them are allowed, symbolic links out of them are not.
    """

    def __init__(self, roots: Iterable[str | os.PathLike] = ()):
        self.roots = [Path(root).resolve() for root in roots]

    def find(self, path: str) -> Path:
        """An adapter's folder, absolute or within one of the roots.

        Raises:
            RequestError: it lies outside of them (403), or is no adapter in safetensors (400).
        """
        if "\0" in path:
            raise RequestError("lora_path: a path without NUL characters is expected", param="lora_path")
        for root in self.roots:
            folder = (root / path).resolve()
            if folder.is_relative_to(root) and folder.is_dir():
                return checked_folder(folder)
        raise RequestError(
            "lora_path: no folder within those that this server was started with (--adapter-root, --adapter)",
            403,
            "lora_path",
        )


def checked_folder(folder: str | os.PathLike) -> Path:
    """A folder with an adapter's tensors in safetensors; pickles are not read.

    Raises:
        RequestError: there are none, or the file is damaged.
    """
    try:
        shapes = shapes_in_file(folder)
    except (ValueError, OSError) as error:
        raise RequestError(str(error), param="lora_path") from None
    if not shapes:
        raise RequestError(f"{Path(folder).name}: no adapter_model.safetensors with tensors in it", param="lora_path")
    return Path(folder)
