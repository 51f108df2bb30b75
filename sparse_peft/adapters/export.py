"""Adapters for programs that do not know this package: merged models, plain LoRA, approximations of low rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..tuners.base_layer import SET_ASIDE, TunerLayer
from ..tuners.base_model import BaseSparseModel
from ..tuners.files.writes import staging_folder
from .files import config_of
from .lora import save_as_lora
from .lora_approximation import LowRankExport, save_low_rank
from .offline_adapter import read_sparse
from .weight_reader import structure_of

FORMS = ("merged", "lora", "low_rank")


def export(
    source: nn.Module | str | os.PathLike,
    output: str | os.PathLike,
    form: str = "merged",
    *,
    base: nn.Module | str | os.PathLike | None = None,
    adapter_name: str = "default",
    rank: int | None = None,
    uniform: bool = False,
) -> LoraConfig | LowRankExport | None:
    """Write an adapter in a form that other programs read.

    Args:
        source: a model that has the adapter, or the adapter's folder.
        output: folder; made if need be.
        form: ``"merged"``: the whole model with the adapter in its weights; ``"lora"``: plain LoRA that is exactly the
            adapter (S2FT, SoRA, and sparse deltas with few rows or columns; large ranks), see
            [`save_as_lora`][sparse_peft.adapters.save_as_lora]; ``"low_rank"``: the best LoRA of ``rank``, with its
            error.
        base: with a folder: the base model, loaded (it is as before afterwards) or its folder.
        adapter_name: with a model: which adapter.
        rank: with ``"low_rank"``.
        uniform: with ``"lora"``: give all layers the largest layer's rank.

    Returns:
        The LoRA's config with ``"lora"``, a [`LowRankExport`][sparse_peft.adapters.LowRankExport] with ``"low_rank"``.

    Raises:
        ValueError: a form that the adapter does not have, or arguments that do not fit it; nothing is written then.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}: one of {', '.join(FORMS)} is expected")
    if (rank is not None) != (form == "low_rank"):
        raise ValueError(f"form={form!r} with rank={rank!r}: a rank is given exactly with 'low_rank'")
    if uniform and form != "lora":
        raise ValueError(f"form={form!r} with uniform=True: that is for 'lora'")
    if isinstance(source, nn.Module):
        if base is not None:
            raise ValueError("base: the given model has its base; a base is for an adapter's folder")
        return _export(source, output, form, adapter_name, rank, uniform)
    with _with_adapter(source, base) as model:
        return _export(model, output, form, "default", rank, uniform)


def _export(model: nn.Module, output, form: str, adapter_name: str, rank: int | None, uniform: bool):
    if form == "merged":
        return save_merged(model, output, adapter_name)
    if form == "lora":
        return save_as_lora(model, output, adapter_name, uniform)
    return save_low_rank(model, output, rank, adapter_name)


@contextmanager
def _with_adapter(folder: str | os.PathLike, base: nn.Module | str | os.PathLike | None) -> Iterator[nn.Module]:
    """A model that has the folder's adapter; a loaded base gets its layers back."""
    config, _ = read_sparse(folder)  # refuses what is no sparse adapter before a model is loaded for it
    base = config.base_model_name_or_path if base is None else base
    if base is None:
        raise ValueError(
            f"{os.fspath(folder)}: its config names no base model; pass base=, a loaded model or a folder"
        )
    loaded = isinstance(base, nn.Module)
    if not loaded:
        if not Path(base).is_dir():
            raise ValueError(f"base={os.fspath(base)!r}: no such folder; pass the loaded model, or its local folder")
        structure = structure_of(base)
        base = getattr(transformers, type(structure).__name__).from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(base, os.fspath(folder), config=config.for_temporary_load())
    try:
        yield model
    finally:
        if loaded:
            model.unload()


def save_merged(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Save a model with one adapter merged into its weights; it needs neither PEFT nor this package any more.

    The model is as before afterwards, bit for bit. A tokenizer is saved by its own ``save_pretrained``.

    Args:
        model: the model that has the adapter, with or without PEFT's wrapper.
        folder: made if need be.
        adapter_name: which.

    Raises:
        ValueError: no such adapter, adapters that are merged already, or values that are not finite.
    """
    config_of(model, adapter_name)
    layers = list(BaseSparseModel.sparse_layers(model))
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(f"adapters {', '.join(merged)} are merged; call unmerge_adapter() first")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        for layer in layers:
            if adapter_name in layer.deltas:
                layer.merge(safe_merge=True, adapter_names=[adapter_name])
        _write_model(inner, _plain_state(inner, adapter_name), folder)
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()


def _plain_state(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The model's tensors under the names that they have without adapters."""
    renamed: dict[str, str] = {}
    hidden: list[str] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, TunerLayer):
            hidden += [f"{prefix}{module.delta_container}.", f"{prefix}{SET_ASIDE}."]
            renamed[f"{prefix}base_layer."] = prefix
        elif isinstance(module, AuxiliaryTrainingWrapper):
            chosen = getattr(module, "modules_to_save", {})
            if adapter_name in chosen:
                hidden.append(f"{prefix}original_module.")
                renamed[f"{prefix}modules_to_save.{adapter_name}."] = prefix
            elif hasattr(module, "token_adapter"):
                raise ValueError(
                    f"{name}: an adapter with trainable_token_indices cannot be exported merged while it is attached; "
                    "call merge_and_unload() and save_pretrained()"
                )
            else:
                renamed[f"{prefix}original_module."] = prefix
            hidden.append(f"{prefix}modules_to_save.")
    state = {}
    for key, tensor in model.state_dict().items():
        for old, new in renamed.items():
            if key.startswith(old):
                state[new + key.removeprefix(old)] = tensor
                break
        else:
            if not key.startswith(tuple(hidden)):
                state[key] = tensor
    return state


def _write_model(model: nn.Module, state: dict[str, Tensor], folder: str | os.PathLike) -> None:
    with staging_folder(folder) as staging:
        if isinstance(model, PreTrainedModel):
            attached = model.__dict__.pop("_hf_peft_config_loaded", None)  # or it would save the adapter alone
            try:
                model.save_pretrained(staging, state_dict=state)
            finally:
                if attached is not None:
                    model._hf_peft_config_loaded = attached
        else:
            save_torch_state_dict(state, os.fspath(staging))
            if hasattr(model, "save_config"):  # diffusers
                model.save_config(staging)
