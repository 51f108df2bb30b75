"""The file that an adapter is loaded from: its tensors' shapes bound the sizes in its config."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from .checks import read_config_file, shapes_in_file

if TYPE_CHECKING:
    from ..base_config import BaseSparseConfig

HUB_ARGUMENTS = frozenset(inspect.signature(hf_hub_download).parameters)


@dataclass(frozen=True)
class AdapterFile:
    """Where an adapter's tensors come from.

    Attributes:
        source: a folder or a Hub id.
        options: keyword arguments of the load; those of ``hf_hub_download`` are used.
        tensors: a state dict in place of the file.
    """

    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] | None = None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """``{tensor name: shape}``; of a safetensors file only the header is read.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        if self.tensors is not None:
            return _shapes(self.tensors)
        if (path := self._find(SAFETENSORS_WEIGHTS_NAME)) is not None:
            return shapes_in_file(path.parent)
        if (path := self._find(WEIGHTS_NAME)) is not None:
            return _shapes(torch.load(path, map_location="meta", weights_only=True))
        raise ValueError(f"{self.source}: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME} is there")

    @cached_property
    def config_fields(self) -> dict[str, Any] | None:
        """What the config beside the tensors says; None without one."""
        path = None if self.tensors is not None else self._find(CONFIG_NAME)
        return None if path is None else read_config_file(path)

    def _find(self, name: str) -> Path | None:
        """The path of a file, downloaded where the source is no folder; None if there is none."""
        folder = Path(self.source, self.options.get("subfolder") or "")
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        arguments = {key: value for key, value in self.options.items() if key in HUB_ARGUMENTS and value is not None}
        try:
            return Path(hf_hub_download(self.source, name, **arguments))
        except EntryNotFoundError:
            return None


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


_loaded: ContextVar[AdapterFile | None] = ContextVar("_loaded", default=None)


@contextmanager
def reading(file: AdapterFile) -> Iterator[None]:
    """Inside, an adapter's tensors come from this file, not from a program that sets a state dict of its own."""
    token = _loaded.set(file)
    try:
        yield
    finally:
        _loaded.reset(token)


def is_reading() -> bool:
    """Whether an adapter is loaded from a file now."""
    return _loaded.get() is not None


def loaded_config_fields() -> dict[str, Any] | None:
    """The config's fields beside the file that an adapter is loaded from now; None without a file or a config."""
    file = _loaded.get()
    return None if file is None else file.config_fields


def check_claimed_sizes(config: BaseSparseConfig, layers: Iterable[str]) -> None:
    """Refuse sizes in a config that are larger than in the file that its adapter is loaded from, if there is one.

    Args:
        config: of the new adapter.
        layers: names of the layers that it adapts.

    Raises:
        ValueError: names the field, the layer and both sizes.
    """
    file = _loaded.get()
    if file is not None:
        config.check_sizes(file.shapes, file.source, layers)
