"""A model's weights, one tensor at a time, from safetensors or a loaded model; and its structure."""

from __future__ import annotations

import copy
import json
import os
from abc import ABC, abstractmethod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..structure import build_on_meta, named_class, read_model_config

INDEX_SUFFIX = ".safetensors.index.json"


class Weights(ABC):
    """The tensors of a model by name, read on request and not kept.

    Attributes:
        source: for error messages.
    """

    source: str

    @abstractmethod
    def names(self) -> set[str]:
        """Of all tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; nothing is read."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""


class ModelWeights(Weights):
    """Those of a loaded model without adapters; shared tensors once, as in a file.

    Attributes:
        tensors: by name.
    """

    def __init__(self, model: nn.Module):
        self.source = f"the given {type(model).__name__}"
        self.tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                self.tensors[name] = tensor

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach().cpu()

    def copied(self) -> ModelWeights:
        """The same with copies of the tensors, on the CPU."""
        made = copy.copy(self)
        made.tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}
        return made


def known_name(stored: str, known: set[str], prefix: str) -> str:
    """A tensor's name in the model; a file of the model's body alone has it without the prefix, or the reverse."""
    if not prefix or stored in known:
        return stored
    other = stored.removeprefix(f"{prefix}.") if stored.startswith(f"{prefix}.") else f"{prefix}.{stored}"
    return other if other in known else stored


class FolderWeights(Weights):
    """Those of a folder that ``save_pretrained`` wrote, in one file or in shards.

    Args:
        folder: local.
        known: the model's names. A file of its body alone has them without the prefix that models with a head put
            before (``base_model_prefix``), and the reverse; both are read under the model's names.
        prefix: that prefix.

    Raises:
        ValueError: no safetensors in the folder, or an index that is damaged or names files outside of it.
    """

    def __init__(self, folder: str | os.PathLike, known: set[str], prefix: str = ""):
        self.source = os.fspath(folder)
        self._places: dict[str, tuple[Path, str]] = {}  # the model's name: where, under which name
        self._handles: dict[Path, safe_open] = {}
        for path in _files_of(Path(folder)):
            names = self._open(path).keys()
            for stored in names:
                name = known_name(stored, known, prefix)
                if name in self._places:
                    raise ValueError(f"{self.source}: {name} is in {self._places[name][0].name} and in {path.name}")
                self._places[name] = path, stored

    def _open(self, path: Path) -> safe_open:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: no valid safetensors file ({error}); copy or download it again") from error
        return self._handles[path]

    def names(self) -> set[str]:
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        path, stored = self._places[name]
        return tuple(self._open(path).get_slice(stored).get_shape())

    def read(self, name: str) -> Tensor:
        path, stored = self._places[name]
        return self._open(path).get_tensor(stored)


def _files_of(folder: Path) -> list[Path]:
    """The safetensors files that a model's folder consists of."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a local one is expected, or a loaded model")
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) == 1:
        return _shards(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1 and not indexes:
        return files
    found = ", ".join(path.name for path in [*indexes, *files]) or "none"
    raise ValueError(
        f"{folder}: one safetensors file, or one index of shards, is expected; found {found}. Other formats are "
        "pickles, which are not read here: load the model and save_pretrained() it, which writes safetensors"
    )


def _shards(index: Path) -> list[Path]:
    try:
        files = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: no valid index of shards ({error}); copy or download it again") from error
    paths = []
    for file in sorted(files, key=str):
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: names the file {file!r}; shards are safetensors files in the same folder")
        if not (index.parent / file).is_file():
            raise ValueError(f"{index}: names the file {file!r}, which is not there; copy or download it")
        paths.append(index.parent / file)
    return paths


def structure_of(base: str | os.PathLike | nn.Module) -> nn.Module:
    """The model whose weights these are, without memory if it is a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder's config names no class of transformers.
    """
    if isinstance(base, nn.Module):
        return base
    config = read_model_config(base)
    if named_class(config) is None:
        kind = next(iter(config.architectures or ()), None)
        raise ValueError(
            f"{base}: config.json has the architecture {kind!r}, which transformers has no class for; pass the loaded "
            "model instead"
        )
    return build_on_meta(config)


def weights_of(source: str | os.PathLike | nn.Module, structure: nn.Module) -> Weights:
    """The weights of a folder or of a loaded model.

    Args:
        source: either.
        structure: the model that they belong to.
    """
    if isinstance(source, nn.Module):
        return ModelWeights(source)
    return FolderWeights(source, set(structure.state_dict()), getattr(structure, "base_model_prefix", ""))


def name_of(source: str | os.PathLike | nn.Module) -> str | None:
    """The base model's name for an adapter's config."""
    if isinstance(source, nn.Module):
        return getattr(source, "name_or_path", None) or None
    return os.fspath(source)
