"""Facts about a saved adapter, from its config's fields and the header of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..unknown_fields import settable_fields
from .checks import StoredTensor, read_config_file, tensors_in_file

METHOD_PREFIX = "SPARSE_PEFT_"  # of the PEFT types of all methods
FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's files.

    Attributes:
        name: of the adapter.
        folder: with its files.
        config: the fields in ``adapter_config.json``.
        tensors: ``{name: shape and dtype}`` of its weights' file; empty without one.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def config_class(self) -> Any:
        """The class of its config."""
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.config["peft_type"])]

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own fields that are not the defaults."""
        own, usual = settable_fields(self.config_class), _defaults(self.config_class)
        return {name: self.config[name] for name in own if self.config.get(name, usual[name]) != usual[name]}

    @property
    def values(self) -> dict[str, StoredTensor]:
        """The tensors that train in the adapted layers: positions and codes are integers, thresholds are scalars."""
        fixed = self.config_class.fixed_tensors
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if self._is_own(name) and _trains(tensor) and name.rpartition(".")[2] not in fixed
        }

    @property
    def saved_whole(self) -> dict[str, StoredTensor]:
        """Tensors beside the adapted layers, such as a head or biases."""
        return {name: tensor for name, tensor in self.tensors.items() if not self._is_own(name)}

    @property
    def parameters(self) -> int:
        """Trained numbers in the adapted layers."""
        return sum(math.prod(tensor.shape) for tensor in self.values.values())

    @property
    def layers(self) -> Mapping[str, list[int]]:
        """``{layer: [rows, cols] of its weight}``; empty for adapters of version 0.1.0."""
        return self.config.get("weight_shapes") or {}

    @property
    def weights(self) -> int:
        """Numbers in the weights of the adapted layers."""
        return sum(rows * cols for rows, cols in self.layers.values())

    @property
    def entries(self) -> int | None:
        """Weights that train one by one; None where a method has none."""
        entries = self.config.get("num_entries")
        return sum(entries.values()) if isinstance(entries, dict) else None

    @property
    def file_bytes(self) -> int | None:
        """Size of the weights' file; None without one."""
        path = self.folder / SAFETENSORS_WEIGHTS_NAME
        return path.stat().st_size if path.is_file() else None

    def _is_own(self, name: str) -> bool:
        return f".{PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(self.config['peft_type'])]}" in name


def _defaults(config_class: Any) -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config_class)
    }


def _trains(tensor: StoredTensor) -> bool:
    return tensor.dtype in FLOATS and bool(tensor.shape)


def adapters_in(folder: Path) -> list[SavedAdapter]:
    """The sparse adapters that a card is of: the default one beside it, others in folders without a card."""
    below = [path.parent for path in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    places = [folder, *(place for place in below if not (place / "README.md").exists())]
    found = [_read(place, "default" if place == folder else place.name) for place in places]
    return [adapter for adapter in found if adapter is not None]


def _read(folder: Path, name: str) -> SavedAdapter | None:
    """The adapter in a folder; None if there is none, or one of another package."""
    path = folder / CONFIG_NAME
    config = read_config_file(path) if path.is_file() else {}
    if not str(config.get("peft_type")).startswith(METHOD_PREFIX):
        return None
    return SavedAdapter(name, folder, config, tensors_in_file(folder))
