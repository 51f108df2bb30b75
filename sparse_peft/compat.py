"""What older versions of PEFT lack; each part says which version made it needless.

With a newer PEFT the names here are PEFT's own, and nothing is replaced.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import peft.tuners.tuners_utils
import peft.utils.save_and_load
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

Entries = dict[str, Tensor]
FSDP = "_fsdp_wrapped_module."  # before all module names of a wrapped model, and in no state dict
IN_FILES = "base_model.model."  # before all names in a file, and in the state dict of a PeftModel

try:
    from peft import SupertuningConfig
except ImportError:  # before PEFT 0.21
    SupertuningConfig = None  # type: ignore[assignment, misc]

# ---------------------------------------------------------------------- quantised layers, needless from PEFT 0.20 on

try:
    from peft.utils.quantization_utils import (
        QuantizationBackend,
        get_quantization_kwargs,
        quantization_extra_repr,
        resolve_quantization_backend,
    )
except ImportError:
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from peft.utils.integrations import dequantize_bnb_weight

    class QuantizationBackend:  # type: ignore[no-redef]  # PEFT's own from 0.20 on
        """How the weight of bitsandbytes' layers is read and written."""

        supports_merge = True

        def __init__(self, bits: int) -> None:
            self.bits = bits
            self.backend_name = f"bnb {bits}bit"

        def get_base_weight(self, base_layer: Any) -> Tensor:
            weight = base_layer.weight
            state = base_layer.state if self.bits == 8 else weight.quant_state
            if self.bits == 8 and state.SCB is None:
                state.SCB = weight.SCB
            unpacked: Tensor = dequantize_bnb_weight(weight, state=state)
            return unpacked

        def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
            base = peft_layer.get_base_layer()
            old = base.weight
            names = ("has_fp16_weights",) if self.bits == 8 else BNB_4BIT_OPTIONS
            options = {name: getattr(old, name) for name in names}
            base.weight = type(old)(weight_data.cpu(), requires_grad=False, **options).to(old.device)
            if self.bits == 8:
                base.state.reset_grads()

        def maybe_clone_base_result(self, x: Tensor) -> Tensor:
            return x.clone() if self.bits == 4 else x  # views of 4-bit layers' outputs have failed in backward

    BNB_4BIT_OPTIONS = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")

    def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
        return {}

    def quantization_extra_repr(module: nn.Module) -> str:
        backend = getattr(module, "quantization_backend", None)
        return f"quantization_backend={backend.backend_name!r}" if backend else ""

    def resolve_quantization_backend(base_layer: nn.Module, **_: Any) -> QuantizationBackend | None:
        """The backend of bitsandbytes' layers; None for others, which are refused where their weight is packed.

        Raises:
            TypeError: the weight is one of torchao's, which look like ordinary floats.
        """
        if is_bnb_4bit_available() or is_bnb_available():
            import bitsandbytes as bnb  # noqa: PLC0415  (an optional package)

            for kind, bits in ((bnb.nn.Linear8bitLt, 8), (bnb.nn.Linear4bit, 4)):
                if isinstance(base_layer, kind):
                    return QuantizationBackend(bits)  # type: ignore[call-arg]
        weight = getattr(base_layer, "weight", None)
        if type(weight).__module__.partition(".")[0] == "torchao":
            raise TypeError(f"a layer with a weight of torchao's {type(weight).__name__} needs peft>=0.20")
        return None


# ---------------------------------------------------------------------- tensors in files, needless from PEFT 0.21 on

HAS_FILE_HOOKS = hasattr(peft.tuners.tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load")


class FileHooks:
    """What tuners decide about an adapter's file: which tensors it has, and what they are called there."""

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Entries, unwanted_adapter_names: list[str]
    ) -> Entries:
        own = tuple(_prefixes(model))
        entries = {name: tensor for name, tensor in state_dict.items() if name.startswith(own)}
        return {**entries, **cls._get_learnable_bias_state_dict(model, state_dict, config)}

    @classmethod
    def _get_learnable_bias_state_dict(cls, model: nn.Module, state_dict: Entries, config: Any) -> Entries:
        bias = getattr(config, "bias", "none")
        if bias == "none":
            return {}
        trained = {f"{name}.base_layer.bias".removeprefix(".") for name, _ in _layers(model)}
        return {
            name: tensor
            for name, tensor in state_dict.items()
            if (name.rpartition(".")[2] == "bias" if bias == "all" else name in trained)
        }

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        owner, _, last = key.rpartition(".")
        if last == adapter_name and owner:
            return owner
        return f"{owner.removesuffix(f'.{adapter_name}')}.{last}" if owner else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Entries
    ) -> Entries:
        own = tuple(f"{prefix}{adapter_name}." for prefix in _prefixes(model))
        in_model: dict[str, str] = {}
        for name in model.state_dict():
            if name.startswith(own):
                in_file = cls._remove_adapter_name_from_key(name, adapter_name)
                in_model |= {in_file: name, IN_FILES + in_file.removeprefix(IN_FILES): name}
        return {in_model.get(name, name): tensor for name, tensor in state_dict.items()}


def _layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The layers with adapters, by name; not those that PEFT's own wrappers of modules consist of."""
    wrappers: list[str] = []
    for name, module in model.named_modules():
        name = name.removeprefix(FSDP)
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrappers.append(f"{name}.")
        elif isinstance(module, BaseTunerLayer) and not name.startswith(tuple(wrappers)):
            yield name, module


def _prefixes(model: nn.Module) -> Iterator[str]:
    """What the names of all adapters' tensors start with, up to the adapter's name."""
    for name, layer in _layers(model):
        for container in (*layer.adapter_layer_names, *layer.other_param_names):
            yield f"{name}.{container}.".removeprefix(".")


if TYPE_CHECKING or HAS_FILE_HOOKS:
    from peft.tuners.tuners_utils import BaseTuner
else:

    class BaseTuner(FileHooks, peft.tuners.tuners_utils.BaseTuner):
        """PEFT's tuner with the hooks, and with adapters that stay as trainable as they are when another is added."""

        def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            parameters = [parameter for _, layer in _layers(model) for parameter in layer.parameters()]
            trained = [(parameter, parameter.requires_grad) for parameter in parameters]
            try:
                super().inject_adapter(model, *args, **kwargs)
            finally:
                for parameter, requires_grad in trained:
                    parameter.requires_grad_(requires_grad)


def call_file_hooks() -> None:
    """Make PEFT's functions for adapters' state dicts ask the tuners that have these hooks, if PEFT does not.

    Programs may have imported both functions by name already, so they are replaced in every module.
    """
    if HAS_FILE_HOOKS or hasattr(peft.utils.save_and_load.set_peft_model_state_dict, "__wrapped__"):
        return
    module = peft.utils.save_and_load
    module._insert_adapter_name_into_state_dict = functools.partial(
        _renamed, module._insert_adapter_name_into_state_dict
    )
    for original, wrapper in (
        (module.get_peft_model_state_dict, _state_dict_of_an_adapter),
        (module.set_peft_model_state_dict, _set_state_dict),
    ):
        _replace_everywhere(original, functools.wraps(original)(functools.partial(wrapper, original)))


def _replace_everywhere(original: Any, replacement: Any) -> None:
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                setattr(module, name, replacement)


def _tuner_of(config: Any) -> Any:
    """The tuner class of an adapter; None if it has no hooks."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    return tuner if tuner is not None and issubclass(tuner, FileHooks) else None


def _state_dict_of_an_adapter(
    get: Callable[..., Entries],
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Entries:
    """PEFT's ``get_peft_model_state_dict``, which selects by the method's prefix and asks no tuner."""
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    config = model.peft_config[adapter_name]
    tuner = _tuner_of(config)
    if tuner is None:
        return get(model, state_dict, adapter_name, unwrap_compiled, *args, **kwargs)
    everything = model.state_dict() if state_dict is None else state_dict
    unwanted = [name for name in model.peft_config if name != adapter_name]
    wanted = {name: tensor for name, tensor in everything.items() if not _is_of(name, unwanted)}
    own = tuner._get_adapter_state_dict(model, config, adapter_name, wanted, unwanted)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    rest = {name: tensor for name, tensor in wanted.items() if prefix not in name}
    others = get(model, rest, adapter_name, unwrap_compiled, *args, **kwargs)
    return {**others, **{tuner._remove_adapter_name_from_key(name, adapter_name): own[name] for name in own}}


def _is_of(name: str, adapters: list[str]) -> bool:
    return any(f".{adapter}." in f"{name}." for adapter in adapters)


_renaming: ContextVar[Callable[[Entries], Entries] | None] = ContextVar("_renaming", default=None)


def _set_state_dict(
    set_: Callable[..., Any],
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> Any:
    """PEFT's ``set_peft_model_state_dict``, which derives the names in the model from those in the file alone."""
    config = model.peft_config[adapter_name]
    tuner = _tuner_of(config)
    if tuner is None:
        return set_(model, peft_model_state_dict, adapter_name, *args, **kwargs)

    def rename(entries: Entries) -> Entries:
        found = tuner._remap_adapter_state_dict_for_load(model, config, adapter_name, entries)
        if any(name.startswith(IN_FILES) for name, _ in model.named_parameters()):
            return dict(found)
        return {name.removeprefix(IN_FILES): tensor for name, tensor in found.items()}

    token = _renaming.set(rename)
    try:
        return set_(model, dict(peft_model_state_dict), adapter_name, *args, **kwargs)
    finally:
        _renaming.reset(token)


def _renamed(insert: Callable[..., Entries], state_dict: Entries, *args: Any, **kwargs: Any) -> Entries:
    """PEFT's step of both names, within ``set_peft_model_state_dict``."""
    rename = _renaming.get()
    return insert(state_dict, *args, **kwargs) if rename is None else rename(state_dict)
