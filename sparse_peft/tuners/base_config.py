"""What the configs of all sparse methods share: which layers, and a saved form that explains and protects itself."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

from peft.config import PeftConfig
from peft.utils import PeftType

from ..support import Support
from .experts import CURE
from .files.card import complete_card, update_model_card
from .files.checks import check_adapter_file, read_config_file
from .files.field_types import check_field_types

SAVE_DTYPES = ("float32", "bfloat16", "float16")


def check_number(
    name: str, value: object, least: float, *, above: bool = False, integer: bool = False, below: float | None = None
) -> None:
    """Refuse what is no finite number of at least ``least``, or not above it, or not below ``below``.

    Raises:
        TypeError: no number, or no int where one is wanted.
        ValueError: out of range.
    """
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name}={value!r}: {'an int' if integer else 'a number'} is expected")
    if not math.isfinite(value) or value < least or (above and value == least):
        raise ValueError(f"{name}={value!r}: {'more than' if above else 'at least'} {least} is expected")
    if below is not None and value >= below:
        raise ValueError(f"{name}={value!r}: less than {below} is expected")


def check_steps(name: str, value: object) -> None:
    """Refuse what is neither a number of optimizer steps (int) nor a share of the run (float in [0, 1])."""
    check_number(name, value, 0)
    if isinstance(value, float) and value > 1:
        raise ValueError(
            f"{name}={value!r}: a number of optimizer steps (int), or a share of the run (float in [0, 1]) is expected"
        )


@dataclass
class BaseSparseConfig(PeftConfig):
    """Fields and file handling common to the sparse methods.

    Args:
        target_modules: names, a regular expression, or ``"all-linear"``, as in ``LoraConfig``.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: index or indices of the layers to adapt.
        layers_pattern: name of the layer list where it is not a common one.
        modules_to_save: further modules trained whole and saved with the adapter.
        trainable_token_indices: token indices of the embedding to train, as in ``LoraConfig``.
        target_parameters: not supported; named so that it can be refused with a reason.
        bias: ``"none"``, ``"all"``, or ``"<type>_only"`` with the method's PEFT type in lower case: the biases of the
            adapted layers.
        fan_in_fan_out: accepted for parity with ``LoraConfig``; the layout is read from the layer's type.
        init_weights: ``True`` starts as the base model; ``False`` draws random values, for tests only.
        save_dtype: dtype of the values on disk. Training always keeps float32 values.
    """

    method: ClassVar[str]  # the PEFT type's name
    # Fields that decide what each layer trains: once one is set again, what was resolved from it is void.
    deciding_fields: ClassVar[frozenset[str]] = frozenset()
    resolved_fields: ClassVar[tuple[str, ...]] = ()

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Module names, a regular expression, or 'all-linear'. Default: PEFT's for the architecture."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regular expression of modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the layers to adapt; others are left alone."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, used with layers_to_transform."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules besides the adapted layers that are trained and saved whole."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Indices of the token embeddings to train, as in LoraConfig."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Not supported yet: bare parameters, as of fused mixture-of-experts layers."}
    )
    bias: str = field(default="none", metadata={"help": "Which biases train: 'none', 'all' or '<type>_only'."})
    fan_in_fan_out: bool = field(
        default=False,
        metadata={"help": "Accepted for parity with LoraConfig; the layout is read from the layer's type."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: the adapter starts as the identity. False: random values, for tests."}
    )
    save_dtype: str = field(
        default="float32", metadata={"help": "dtype of the values on disk: 'float32', 'bfloat16' or 'float16'."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType[self.method]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.target_parameters:
            raise ValueError(f"target_parameters={self.target_parameters!r}: {CURE}")
        biases = ("none", "all", f"{self.method.lower()}_only")
        if self.bias not in biases:
            raise ValueError(f"bias={self.bias!r}: choose one of {', '.join(map(repr, biases))}")
        if self.save_dtype not in SAVE_DTYPES:
            raise ValueError(f"save_dtype={self.save_dtype!r}: choose one of {', '.join(map(repr, SAVE_DTYPES))}")

    def __setattr__(self, name, value):
        if name in self.deciding_fields and name in self.__dict__ and value != self.__dict__[name]:
            for resolved in self.resolved_fields:
                self.__dict__[resolved] = None
        super().__setattr__(name, value)

    # Positions chosen beforehand, {layer name: support}; no field, because a file has them with the values.
    supports = cast("Mapping[str, Support]", MappingProxyType({}))

    @classmethod
    def prefix(cls) -> str:
        """What the names of the method's parameters start with."""
        return f"{cls.method.lower()}_"

    @property
    def changes_in_training(self) -> bool:
        """Whether training needs a controller: something else happens than that the optimizer steps the values."""
        return False

    @property
    def attendance_needed_for(self) -> str:
        """What the controller does, for the warning that there is none."""
        return "reselects its positions"

    @property
    def selection_needs(self) -> str:
        """What positions are chosen from: ``"none"``, ``"weight"``, ``"activation"`` or ``"gradient"``."""
        return "none"

    def for_a_visit(self) -> Self:
        """A copy to load an adapter with whose base is to be had back by ``unload()``."""
        return copy.copy(self)

    def to_dict(self) -> dict:
        """As PEFT's, with sets sorted, so that saving twice gives the same file."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As PEFT's, whole or not at all, and the model card beside it says what to install and import."""
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".saving-") as staging:
            super().save_pretrained(staging, **kwargs)
            for name in os.listdir(staging):
                os.replace(os.path.join(staging, name), os.path.join(save_directory, name))
        update_model_card(save_directory)

    def _upload_modified_files(self, working_dir: str, *args, **kwargs):
        # push_to_hub of a config alone: transformers has put its own card beside it
        complete_card(working_dir, set(), self.base_model_name_or_path)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """As PEFT's; a local adapter file is checked for truncation before anything is built from it.

        Raises:
            ValueError: the adapter's weight file is truncated or not a safetensors file.
        """
        check_adapter_file(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs):
        """As PEFT's; a file that is damaged, or written to do damage, is refused and names itself.

        Raises:
            ValueError: the file is no JSON object.
            TypeError: a field of another type.
        """
        content = read_config_file(path_json_file)
        check_field_types(cls, content, os.fspath(path_json_file))
        return super().from_json_file(path_json_file, **kwargs)


def changed_fields(config: BaseSparseConfig, everything: bool = False) -> dict[str, Any]:
    """The fields of a method's own that are set by hand and are not the defaults; with ``everything`` those too.

    What was resolved from them when the adapter was made is left out.
    """
    found = {}
    for field_ in fields(config):
        if field_.name in PeftConfig.__dataclass_fields__ or field_.name in config.resolved_fields:
            continue
        value = getattr(config, field_.name)
        usual = field_.default if field_.default_factory is MISSING else field_.default_factory()
        if everything or value != usual:
            found[field_.name] = sorted(value) if isinstance(value, set) else value
    return found
