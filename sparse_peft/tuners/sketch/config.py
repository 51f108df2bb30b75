"""The config of SketchTune."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, cast

from huggingface_hub import hf_hub_download
from peft import PeftConfig

from ...calibrate.codebooks import CODEBOOK_METHODS, Sketch
from ...constraints import Count, OneOf, Pattern
from ...staging import is_waiting
from ...support import matches_layer
from ..base_config import FLOAT_DTYPES, BaseSparseConfig, explains_fields
from .sidecar import SIDECAR, write_sketches

SKETCH_MODES = ("delta", "replace")
BITS = (2, 3, 4)
STORAGES = ("recompute", "sidecar", "embed")
KEEPS = ("drop", "cpu")
# Of float32 tables: the best of short runs is 3e-4 to 1e-3 (docs/sketch.md), the authors take up to 8e-5.
RATE = 1e-4


@explains_fields
@dataclass
class SketchConfig(BaseSparseConfig):
    """SketchTune (https://arxiv.org/abs/2410.06364): weights of a row that share a code share one trained number.

    A row of a weight ``(out, in)`` has ``groups`` parts. Each part has a table of ``2**bits`` entries, and each weight
    a fixed code, the index of its entry. The tables ``(out, groups, 2**bits)`` train. ``mode="delta"`` adds the entry
    to the base weight and starts at zero. ``mode="replace"``, the paper's, replaces the weight by codes and tables.

    Args:
        mode: ``"delta"`` beside the base weight, or ``"replace"`` in its place.
        bits: of a code: 2, 3 or 4.
        groups: tables in a row, one for each part of consecutive inputs (the paper's GPR).
        groups_pattern: ``{layer name or regular expression: groups}`` for layers with a number of their own.
        clustering: method of the first tables: ``"dp"``, ``"lloyd"``, ``"quantile"``, ``"uniform"`` or ``"nf4"``, see
            [`fit_codebooks`][sparse_peft.calibrate.fit_codebooks]. Codes are the nearest entries. For tables and codes
            from data use [`sketch_model`][sparse_peft.sketch_model].
        initial_dtype: dtype of the first tables, before codes are assigned and in files. By default bfloat16 for
            ``"delta"``, which needs them only to recompute codes, and float32 for ``"replace"``.
        index_storage: storage of the codes of a saved adapter. ``"recompute"``: none; they are recomputed from the
            base weight and the first tables, and checked by a checksum. ``"sidecar"``: a separate file, which adapters
            can share. ``"embed"``: the adapter's file. By default ``"recompute"``, and ``"sidecar"`` for codes from
            data, which cannot be recomputed.
        sketch: with ``"sidecar"``: path of the separate file; by default ``sketch.safetensors`` beside each saved
            adapter. An existing file is read and checked, never written.
        keep_base: with ``mode="replace"``: ``"drop"`` the dense weights, or keep them on the ``"cpu"``, for
            ``unload()``.
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; recorded, not to be set.
        base_dtype: the weights' dtype when codes were assigned; likewise.
        sketch_sha256: hash of the side file; likewise.

    Raises:
        ValueError, TypeError: a field that is out of range, or two that contradict each other.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SketchConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SketchConfig(bits=3, target_modules=["0"]))
        >>> {name: tuple(p.shape) for name, p in model.base_model.model[0].deltas["default"].named_parameters()}
        {'codebook': (32, 1, 8)}
    """

    method: ClassVar[str] = "SPARSE_PEFT_SKETCH"
    deciding_fields: ClassVar[frozenset[str]] = frozenset({"mode", "bits", "groups", "groups_pattern", "clustering"})
    resolved_fields: ClassVar[tuple[str, ...]] = ("weight_shapes", "base_dtype", "sketch_sha256")
    # without annotations, and so no fields: the folder that the config was read from, and codes on their way to a file
    folder = cast("str | None", None)
    _codes_to_save = cast("dict[str, Sketch] | None", None)

    mode: Annotated[str, OneOf(SKETCH_MODES)] = field(
        default="delta", metadata={"help": "'delta' beside the weights, 'replace' in their place."}
    )
    bits: Annotated[int, OneOf(BITS)] = field(default=4, metadata={"help": "Of a code."})
    groups: Count = field(default=1, metadata={"help": "Tables in a row, each of a part of it."})
    groups_pattern: dict[Pattern, Count] = field(
        default_factory=dict, metadata={"help": "{layer name or regular expression: groups}."}
    )
    clustering: Annotated[str, OneOf(CODEBOOK_METHODS)] = field(
        default="dp", metadata={"help": "How tables are first made."}
    )
    initial_dtype: Annotated[str, OneOf(FLOAT_DTYPES)] | None = field(
        default=None, metadata={"help": "dtype of the first tables: bfloat16 for 'delta', float32 for 'replace'."}
    )
    index_storage: Annotated[str, OneOf(STORAGES)] | None = field(
        default=None, metadata={"help": "Where a saved adapter has its codes."}
    )
    sketch: str | None = field(default=None, metadata={"help": "Path of the file that codes are in."})
    keep_base: Annotated[str, OneOf(KEEPS)] = field(
        default="drop", metadata={"help": "Dense weights of 'replace': dropped or kept on the CPU."}
    )
    base_dtype: str | None = field(
        default=None, metadata={"help": "dtype of the weights that were sketched; recorded, not to be set."}
    )
    sketch_sha256: str | None = field(
        default=None, metadata={"help": "Hash of the side file; recorded, not to be set."}
    )

    def fill_in(self) -> None:
        super().fill_in()
        if self.initial_dtype is None:
            self.initial_dtype = "bfloat16" if self.mode == "delta" else "float32"

    def check(self) -> None:
        super().check()
        if self.sketch is not None and self.index_storage not in (None, "sidecar"):
            raise ValueError(
                f"sketch={self.sketch!r} with index_storage={self.index_storage!r}: only 'sidecar' has such a file"
            )
        if self.keep_base != "drop" and self.mode != "replace":
            raise ValueError(
                f"keep_base={self.keep_base!r} with mode={self.mode!r}: the base is only dropped by 'replace'"
            )

    def for_temporary_load(self) -> Self:
        config = super().for_temporary_load()
        config.keep_base = "cpu" if self.mode == "replace" else self.keep_base
        return config

    def groups_of(self, layer: str) -> int:
        """Tables in a row of this layer."""
        return next((n for pattern, n in self.groups_pattern.items() if matches_layer(pattern, layer)), self.groups)

    def claimed_sizes(self, layer: str) -> Iterator[tuple[str, int, str]]:
        yield "groups", self.groups_of(layer), "codebook.1"
        yield "2 ** bits", 2**self.bits, "codebook.2"

    def suited_rate(self) -> float:
        return RATE

    @property
    def is_resolved(self) -> bool:
        """Whether an adapter was made with this config: a file may bring its tables, so none are made anew."""
        return self.weight_shapes is not None

    # ------------------------------------------------------------------ the side file

    def sidecar_path(self) -> str:
        """Where the side file of this adapter lies.

        Raises:
            ValueError: it lies beside the adapter's config, which was not read from a folder.
        """
        if self.sketch is not None:
            return self.sketch
        if self.folder is None:
            raise ValueError(
                f"index_storage='sidecar': the codes are in the adapter's {SIDECAR}, whose folder is not known; load "
                "the adapter with PeftModel.from_pretrained, or set the config's `sketch` to the file's path"
            )
        return os.fspath(Path(self.folder, SIDECAR))

    def give_codes_to_save(self, sketches: dict[str, Sketch]) -> None:
        """Note the layers' codes for ``save_pretrained``, which PEFT calls after it took the adapter's tensors."""
        self._codes_to_save = sketches

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, whole or not at all, with the side file where codes have one."""
        sketches, self._codes_to_save = self._codes_to_save, None
        if sketches is not None:
            path = Path(self.sketch or Path(save_directory, SIDECAR))
            if self.sketch is None or not (path.exists() or is_waiting(path)):
                self.sketch_sha256 = write_sketches(path, sketches)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As PEFT's; the config knows the folder that its side file is in, fetched from the Hub if need be."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, cls) and config.index_storage == "sidecar" and config.sketch is None:
            config.folder = cls._folder_of_sidecar(pretrained_model_name_or_path, subfolder, kwargs)
        return config

    @classmethod
    def _folder_of_sidecar(cls, where: str, subfolder: str | None, kwargs: dict[str, Any]) -> str:
        if Path(where).is_dir():
            return os.fspath(Path(where, subfolder or ""))
        hub, _, _ = cls._split_kwargs(kwargs)
        return os.fspath(Path(hf_hub_download(where, SIDECAR, subfolder=subfolder, **hub)).parent)
