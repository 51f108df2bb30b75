"""A model's tensors under the names that they have without adapters."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .backups import SET_ASIDE
from .expert_layer import ExpertsLayer


def plain_state(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """The state dict of a model with adapters, as the model has it without them.

    Args:
        model: without PEFT's wrapper.
        adapter_name: whose copies of modules that PEFT saves whole stand for the originals; None for the originals.

    Raises:
        ValueError: the adapter trains single tokens.
    """
    renamed: dict[str, str] = {}
    hidden: list[str] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, ExpertsLayer):
            renamed[f"{prefix}base_layer."] = prefix
        elif isinstance(module, BaseTunerLayer):  # PEFT's own as well
            renamed.setdefault(f"{prefix}base_layer.", prefix)  # trained tokens: their wrapper's name
            hidden += [f"{prefix}{part}." for part in (*module.adapter_layer_names, SET_ASIDE)]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            renamed[f"{prefix}{_part(name, module, adapter_name)}."] = prefix
            hidden += [f"{prefix}{part}." for part in ("original_module", "modules_to_save", "token_adapter")]
    state = {}
    for key, tensor in model.state_dict().items():
        old = next((old for old in renamed if key.startswith(old)), None)
        if old is not None:
            state[renamed[old] + key.removeprefix(old)] = tensor
        elif not key.startswith(tuple(hidden)):
            state[key] = tensor
    return state


def _part(name: str, wrapper: AuxiliaryTrainingWrapper, adapter_name: str | None) -> str:
    """Which of a wrapper's modules takes its place: the adapter's copy, or the original.

    Raises:
        ValueError: the adapter trains single tokens of it, which PEFT adds in each pass.
    """
    if adapter_name in getattr(wrapper, "modules_to_save", {}):
        return f"modules_to_save.{adapter_name}"
    if not hasattr(wrapper, "token_adapter"):
        return "original_module"
    if adapter_name is not None:
        raise ValueError(
            f"{name}: an adapter with trainable_token_indices cannot be exported merged while it is attached; call "
            "merge_and_unload() and save_pretrained()"
        )
    return "token_adapter.base_layer"
