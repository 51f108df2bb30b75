"""The base config of all sparse methods: which layers, checked fields, and a saved form that protects itself."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar, cast

from packaging.version import InvalidVersion, Version
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from _sparse_peft_startup.install import install_advice

from ..constraints import Names, OneOf, Pattern, Positive, field_hints, validated
from ..staging import staging_folder
from ..support import Support
from ..version import __version__
from .experts import CURE
from .files.card import complete_card, name_source
from .files.checks import DAMAGED, read_config_file, shapes_in_file
from .files.writes import write_compactly
from .unknown_fields import VERSION_FIELD, settable_fields, unknown_fields_error

if TYPE_CHECKING:
    from .base_state import TrainedState

FLOAT_DTYPES = ("float32", "bfloat16", "float16")

Config = TypeVar("Config")
Value = TypeVar("Value")


def explains_fields(cls: type[Config]) -> type[Config]:
    """Make the constructor of a dataclass explain keyword arguments that it does not have.

    Those of a config that a newer version of this package wrote are ignored with a warning, as PEFT ignores those of a
    newer PEFT.
    """
    cls.__init__ = _explaining(cls.__init__)  # type: ignore[method-assign]
    return cls


def _explaining(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        values = {**self.fields_of_earlier_versions(values), **values}
        newer = newer_version(values.get(VERSION_FIELD))
        unknown = [name for name in values if name not in field_hints(type(self))]
        if unknown and newer is None:
            raise unknown_fields_error(type(self), unknown)
        if unknown:
            warnings.warn(f"{', '.join(map(repr, unknown))} of the adapter's config ignored: {newer}", stacklevel=2)
        try:
            init(self, *args, **{name: value for name, value in values.items() if name not in unknown})
        except (TypeError, ValueError) as error:
            if newer is None:
                raise
            raise _with_advice(error, f"{error}: {newer}") from error

    return __init__


def _with_advice(error: TypeError | ValueError, message: str) -> TypeError | ValueError:
    return TypeError(message) if isinstance(error, TypeError) else ValueError(message)


def newer_version(written_by: object) -> str | None:
    """Advice for a config that a newer version of this package wrote; None for any other config."""
    try:
        if not isinstance(written_by, str) or Version(written_by) <= Version(__version__):
            return None
    except InvalidVersion:
        return None
    return (
        f"the config was written by sparse_peft {written_by}, and this is {__version__}; upgrade with "
        f"{install_advice()}"
    )


def _sizes_by_layer(
    shapes: Mapping[str, tuple[int, ...]], marker: str
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """``{layer: {"tensor.dimension": size}}`` of the tensors whose names have the marker, and the largest of all."""
    layers: dict[str, dict[str, int]] = {}
    largest: dict[str, int] = {}
    for name, shape in shapes.items():
        layer, is_of_layer, tensor = name.removeprefix("base_model.model.").rpartition(marker)
        for dimension, size in enumerate(shape if is_of_layer else ()):
            key = f"{tensor}.{dimension}"
            layers.setdefault(layer, {})[key] = size
            largest[key] = max(size, largest.get(key, 0))
    return layers, largest


def required(value: Value | None, name: str) -> Value:
    """The value of a config field that is filled in when an adapter is made, or by the constructor.

    Raises:
        ValueError: it is not filled in yet.
    """
    if value is None:
        raise ValueError(f"{name}=None: it is filled in when an adapter is made from the config; make one first")
    return value


@explains_fields
@dataclass
class BaseSparseConfig(PeftConfig):
    """Fields and file handling common to the sparse methods.

    Every field is compared with its annotation whenever it is set.

    Args:
        task_type: the task, such as ``"CAUSAL_LM"``; it decides the class of PEFT's wrapper.
        target_modules: names, a regular expression, or ``"all-linear"``, as in ``LoraConfig``.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: index or indices of the layers to adapt.
        layers_pattern: name of the layer list where it is not a common one.
        modules_to_save: further modules trained whole and saved with the adapter.
        trainable_token_indices: token indices of the embedding to train, as in ``LoraConfig``.
        target_parameters: names or suffixes of fused experts' parameters, such as ``"experts.gate_up_proj"``, as in
            ``LoraConfig``.
        target_experts: train the parameters of all fused experts, as if each was named in ``target_parameters``.
        bias: ``"none"``, ``"all"``, or ``"<type>_only"`` with the method's PEFT type in lower case: the biases of the
            adapted layers.
        fan_in_fan_out: accepted for parity with ``LoraConfig``; the layout is read from the layer's type.
        init_weights: ``True`` starts as the base model; ``False`` draws random values, for tests only.
        save_dtype: dtype of the values on disk. Training always keeps float32 values.
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; filled in when the adapter is made.
        recommended_rate: learning rate that suits the adapter, with AdamW; filled in when it is made.
        sparse_peft_version: version of this package that the config is of; always the installed one.
    """

    method: ClassVar[str]  # the PEFT type's name
    fixed_tensors: ClassVar[frozenset[str]] = frozenset()  # of floats in a layer's file that never train
    # Fields that decide what each layer trains: once one is set again, what was resolved from it is void.
    deciding_fields: ClassVar[frozenset[str]] = frozenset()
    resolved_fields: ClassVar[tuple[str, ...]] = ("weight_shapes",)
    # Why the method trains no fused experts; None if it does.
    why_no_experts: ClassVar[str | None] = "the method has factors of one matrix, and fused experts are many matrices"
    # Positions chosen beforehand, {layer name: support}; no field, because a file has them with the values.
    supports = cast("Mapping[str, Support]", MappingProxyType({}))

    task_type: str | None = field(
        default=None, metadata={"help": "The task, which decides the class of PEFT's wrapper."}
    )
    target_modules: Names | Pattern | None = field(
        default=None,
        metadata={
            "help": "Module names, a regular expression, or 'all-linear'. Default: PEFT's for the architecture."
        },
    )
    exclude_modules: Names | Pattern | None = field(
        default=None, metadata={"help": "Module names or a regular expression of modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the layers to adapt; others are left alone."}
    )
    layers_pattern: list[Pattern] | Pattern | None = field(
        default=None, metadata={"help": "Name of the list of layers, used with layers_to_transform."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules besides the adapted layers that are trained and saved whole."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Indices of the token embeddings to train, as in LoraConfig."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters of fused experts, such as 'experts.gate_up_proj'."}
    )
    target_experts: bool = field(
        default=False, metadata={"help": "Whether the parameters of all fused experts train."}
    )
    bias: str = field(default="none", metadata={"help": "Which biases train: 'none', 'all' or '<type>_only'."})
    fan_in_fan_out: bool = field(
        default=False,
        metadata={"help": "Accepted for parity with LoraConfig; the layout is read from the layer's type."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: the adapter starts as the identity. False: random values, for tests."}
    )
    save_dtype: Annotated[str, OneOf(FLOAT_DTYPES)] = field(
        default="float32", metadata={"help": "dtype of the values on disk."}
    )
    weight_shapes: dict[str, list[int]] | None = field(
        default=None,
        repr=False,
        metadata={"help": "Resolved [rows, cols] of the layers' weights; filled in, not set by hand."},
    )
    recommended_rate: Positive | None = field(
        default=None, metadata={"help": "Learning rate, with AdamW, that suits it; filled in, not set by hand."}
    )
    sparse_peft_version: str | None = field(
        default=None, metadata={"help": "The version of sparse_peft, filled in, not set by hand."}
    )

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:  # programs match PEFT's message, which does not name the field
            raise ValueError(f"task_type={self.task_type!r}: {error}") from error
        self.peft_type = PeftType[self.method]
        self.fill_in()
        self.check()
        self.sparse_peft_version = __version__

    def fill_in(self) -> None:
        """Set defaults that depend on other fields; called before the fields are compared with each other.

        ``sparse_peft_version`` is that of the file that the config is read from; None for a new one.
        """

    def check(self) -> None:
        """Compare the fields with each other; ``__setattr__`` has compared each with its annotation.

        Raises:
            ValueError: fields that contradict each other.
        """
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.names_experts and self.why_no_experts is not None:
            given = (
                f"target_parameters={self.target_parameters!r}" if self.target_parameters else "target_experts=True"
            )
            raise ValueError(f"{given}: {self.why_no_experts}; {CURE}")
        validated("bias", self.bias, Annotated[str, OneOf(("none", "all", f"{self.method.lower()}_only"))])

    @property
    def names_experts(self) -> bool:
        """Whether parameters of fused experts are to train."""
        return bool(self.target_parameters) or self.target_experts

    def __setattr__(self, name: str, value: Any) -> None:
        hint = field_hints(type(self)).get(name)
        if hint is not None:
            value = validated(name, self._default_of(name) if value is None else value, hint)
        if name in self.deciding_fields and name in self.__dict__ and value != self.__dict__[name]:
            self.forget_resolved()
        super().__setattr__(name, value)

    def equip(self, state: TrainedState) -> None:
        """Give a new adapter's state in one layer what it computes with besides its tensors."""

    def forget_resolved(self) -> None:
        """Void what was resolved from fields that are set again."""
        for resolved in self.resolved_fields:
            self.__dict__[resolved] = None

    def _default_of(self, name: str) -> Any:
        """What None stands for: an empty dict where that is the default."""
        factory = self.__dataclass_fields__[name].default_factory
        return None if factory is MISSING else factory()

    @classmethod
    def fields_of_earlier_versions(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What adapters of earlier versions mean by fields that their configs lack, where it is no default.

        Args:
            values: the constructor's keyword arguments.
        """
        return {}

    @classmethod
    def prefix(cls) -> str:
        """What the names of the method's parameters start with."""
        return f"{cls.method.lower()}_"

    @property
    def changes_in_training(self) -> bool:
        """Whether training needs a controller, which does more than the optimizer's steps."""
        return False

    @property
    def controller_role(self) -> str:
        """What the controller does, for the warning that there is none."""
        return "reselects its positions"

    def unreached_events(self, total_steps: int | None) -> Iterator[str]:
        """Changes that the config asks for and that a run of this many optimizer steps is too short for.

        Args:
            total_steps: None if unknown; then only what no run reaches.
        """
        yield from ()

    def suited_rate(self) -> float | None:
        """The learning rate, with AdamW, that suits an adapter made from the config; None if it is not known."""
        return None

    def follow_file(self, saved: Mapping[str, Any], states: Iterable[TrainedState]) -> None:
        """Take over what gives an adapter's tensors in a file their meaning, where this config says something else.

        For methods to override.

        Args:
            saved: the config's fields beside the file.
            states: the layers' trained states, which get the file's tensors.
        """

    @property
    def selection_needs(self) -> str:
        """What positions are chosen from: ``"none"``, ``"weight"``, ``"activation"`` or ``"gradient"``."""
        return "none"

    def countable(self) -> tuple[Self, list[str]]:
        """A copy whose sizes need neither weights nor data, for plans.

        Returns:
            The copy, and in sentences what it leaves open.

        Raises:
            ValueError: the weights decide how much trains.
        """
        return copy.copy(self), []

    def for_temporary_load(self) -> Self:
        """A copy to load an adapter with whose base model ``unload()`` can restore."""
        return copy.copy(self)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets sorted, so that saving twice gives the same file."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, whole or not at all."""
        with staging_folder(save_directory) as staging:
            super().save_pretrained(os.fspath(staging), **kwargs)
            write_compactly(staging / CONFIG_NAME)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # push_to_hub of a config alone: transformers has put its own card beside it
        complete_card(working_dir, set(), self.base_model_name_or_path)
        name_source(Path(working_dir), repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As PEFT's; a local adapter file is checked before anything of the config's sizes is built.

        Raises:
            ValueError: the adapter's weight file is truncated or not a safetensors file, or the config has larger
                sizes than the file's tensors.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        shapes = shapes_in_file(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if shapes and isinstance(config, cls):
            config.check_sizes(shapes, folder)
        return config

    def check_sizes(
        self, shapes: Mapping[str, tuple[int, ...]], source: str | os.PathLike, layers: Iterable[str] = ()
    ) -> None:
        """Refuse sizes that are larger than those of the adapter's tensors, before memory is taken for them.

        Args:
            shapes: ``{tensor name: shape}`` of the adapter's file.
            source: its folder or Hub id, for the error.
            layers: layers of the adapter, besides those of the file and of ``weight_shapes``.

        Raises:
            ValueError: names the field, the layer and both sizes.
        """
        sizes, largest = _sizes_by_layer(shapes, f".{self.prefix()}adapter.")
        for layer in dict.fromkeys((*sizes, *(self.weight_shapes or {}), *layers)):
            for name, size, dimension in self.claimed_sizes(layer):
                options = dimension.split(" or ")
                found = next((sizes[layer][key] for key in options if key in sizes.get(layer, {})), None)
                # a tensor that the file lacks is reported on loading; until then it may be as large as any layer's
                if size > (max(largest.get(key, 0) for key in options) if found is None else found):
                    names = " or ".join(key.partition(".")[0] for key in options)
                    in_file = f"no {names}" if found is None else found
                    raise ValueError(
                        f"{os.fspath(source)}: {name}: {size} for layer {layer}, of which the adapter's file has "
                        f"{in_file}; {DAMAGED}"
                    )

    def claimed_sizes(self, layer: str) -> Iterator[tuple[str, int, str]]:
        """``(field, size, "tensor.dimension")`` of what the config says of a layer's tensors in a file.

        For methods to override: every size that memory is allocated by. ``"a.0 or b.0"`` where the file has one of two
        tensors.
        """
        yield from ()

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's; a file that is damaged, or written to do damage, is refused and names itself.

        Raises:
            ValueError: the file is no JSON object, or a field is out of range.
            TypeError: a field of another type.
        """
        content = read_config_file(path_json_file)
        hints = field_hints(cls)
        try:
            for name, value in content.items():
                validated(name, value, hints.get(name, Any))
        except (TypeError, ValueError) as error:
            cure = newer_version(content.get(VERSION_FIELD)) or DAMAGED
            raise _with_advice(error, f"{os.fspath(path_json_file)}: {error}; {cure}") from error
        return super().from_json_file(path_json_file, **kwargs)


def allocation_note(used: str) -> str:
    """For plans: the layers' shares of a budget are not known without weights."""
    return (
        f"allocation='global' is decided by the weights: layers are shown with allocation={used!r}; the total is the "
        "same"
    )


def selection_note(selection: str, needs: str) -> str:
    """For plans: the positions are not known without weights or data."""
    source = "the weights" if needs == "weight" else "data"
    return (
        f"selection={selection!r} chooses positions from {source}: the plan counts them, and training has to choose "
        "them"
    )


def changed_fields(config: BaseSparseConfig, everything: bool = False) -> dict[str, Any]:
    """The fields of a method's own that are set by hand and are not the defaults; with ``everything`` those too.

    What was resolved from them when the adapter was made is left out.
    """
    settable, found = settable_fields(type(config)), {}
    for field_ in fields(config):
        if field_.name not in settable:
            continue
        value = getattr(config, field_.name)
        usual = field_.default if field_.default_factory is MISSING else field_.default_factory()
        if everything or value != usual:
            found[field_.name] = sorted(value) if isinstance(value, set) else value
    return found
