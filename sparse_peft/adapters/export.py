"""Export for other programs: merged models, exact LoRA, approximations of low rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..staging import staging_folder
from ..tuners.base_model import BaseSparseModel
from ..tuners.plain_state import plain_state
from .files import config_of
from .lora import to_lora, write_exact_lora
from .lora_approximation import LowRankExport, save_low_rank
from .offline_adapter import read_sparse
from .weight_reader import structure_of

EXPORT_FORMS = ("merged", "lora", "low_rank")
"""Forms of [`export`][sparse_peft.adapters.export]; the first is the default."""


def export(
    source: nn.Module | str | os.PathLike,
    output: str | os.PathLike,
    form: str = EXPORT_FORMS[0],
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
            adapter (S2FT, SoRA, and sparse deltas with few rows or columns; large ranks), if it takes no more than the
            merged model; [`save_as_lora`][sparse_peft.adapters.save_as_lora] writes it of any size; ``"low_rank"``:
            the best LoRA of ``rank``, with its error.
        base: with a folder: the base model, loaded (it is as before afterwards) or its folder.
        adapter_name: with a model: which adapter.
        rank: with ``"low_rank"``.
        uniform: with ``"lora"``: give all layers the largest layer's rank.

    Returns:
        The LoRA's config with ``"lora"``, a [`LowRankExport`][sparse_peft.adapters.LowRankExport] with ``"low_rank"``.

    Raises:
        ValueError: a form that the adapter does not have, or that takes more than the merged model, or arguments that
            do not fit it; nothing is written then.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import S2FTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, S2FTConfig(k=4, init_weights=False, target_modules=["0"]))
        >>> from sparse_peft.adapters import export
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = export(model, folder, "lora")
        >>> config.r
        4
    """
    if form not in EXPORT_FORMS:
        raise ValueError(f"form={form!r}: one of {', '.join(EXPORT_FORMS)} is expected")
    if (rank is not None) != (form == "low_rank"):
        raise ValueError(f"form={form!r} with rank={rank!r}: a rank is given exactly with 'low_rank'")
    if uniform and form != "lora":
        raise ValueError(f"form={form!r} with uniform=True: that is for 'lora'")
    if isinstance(source, nn.Module):
        if base is not None:
            raise ValueError("base: the given model has its base; a base is for an adapter's folder")
        return _export(source, output, adapter_name, form, rank, uniform)
    with _with_adapter(source, base) as model:
        return _export(model, output, "default", form, rank, uniform)


def _export(
    model: nn.Module, output: str | os.PathLike, adapter_name: str, form: str, rank: int | None, uniform: bool
) -> LoraConfig | LowRankExport | None:
    if rank is not None:
        return save_low_rank(model, output, rank, adapter_name)
    if form == "lora":
        config, tensors = to_lora(model, adapter_name, uniform, max_bytes=_merged_bytes(model))
        write_exact_lora(output, config, tensors)
        return config
    save_merged(model, output, adapter_name)
    return None


def _merged_bytes(model: nn.Module) -> int:
    """Size of the base model's weights, and so of the merged model's."""
    states = [state for layer in BaseSparseModel.sparse_layers(model) for state in layer.deltas.values()]
    trained = {id(parameter) for state in states for parameter in state.parameters()}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in trained)


@contextmanager
def _with_adapter(folder: str | os.PathLike, base: nn.Module | str | os.PathLike | None) -> Iterator[nn.Module]:
    """A model that has the folder's adapter; a loaded base gets its layers back."""
    config, _ = read_sparse(folder)  # refuses other adapters before a model is loaded
    base = config.base_model_name_or_path if base is None else base
    if base is None:
        raise ValueError(
            f"{os.fspath(folder)}: its config names no base model; pass base=, a loaded model or a folder"
        )
    inner = base if isinstance(base, nn.Module) else _load_base(base)
    model = PeftModel.from_pretrained(inner, os.fspath(folder), config=config.for_temporary_load())
    try:
        yield model
    finally:
        if inner is base:
            model.unload()


def _load_base(folder: str | os.PathLike) -> PreTrainedModel:
    if not Path(folder).is_dir():
        raise ValueError(f"base={os.fspath(folder)!r}: no such folder; pass the loaded model, or its local folder")
    kind: type[PreTrainedModel] = getattr(transformers, type(structure_of(folder)).__name__)
    return kind.from_pretrained(folder, dtype="auto")


def save_merged(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Save a model with one adapter merged into its weights; it needs neither PEFT nor this package any more.

    The model is as before afterwards, bit for bit. A tokenizer is saved by its own ``save_pretrained``.

    Args:
        model: the model that has the adapter, with or without PEFT's wrapper.
        folder: made if need be.
        adapter_name: which.

    Raises:
        ValueError: no such adapter, adapters that are merged already, or values that are not finite.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import save_merged
        >>> small = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                     num_attention_heads=2)
        >>> config = SparseConfig(density=0.1, init_weights=False, target_modules="all-linear")
        >>> model = get_peft_model(LlamaForCausalLM(small), config).eval()
        >>> ids = torch.arange(8)[None]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_merged(model, folder)
        ...     merged = LlamaForCausalLM.from_pretrained(folder).eval()
        >>> torch.equal(merged(ids).logits, model(ids).logits)
        True
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
        _write_model(inner, plain_state(inner, adapter_name), folder)
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()


def _write_model(model: Any, state: dict[str, Tensor], folder: str | os.PathLike) -> None:
    with staging_folder(folder) as staging:
        if isinstance(model, PreTrainedModel):
            with _without_its_adapters(model):
                model.save_pretrained(staging, state_dict=state)
        else:
            save_torch_state_dict(state, os.fspath(staging))
            if hasattr(model, "save_config"):  # diffusers
                model.save_config(staging)


@contextmanager
def _without_its_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Inside, transformers saves the model; with a record of adapters it would save the adapter alone."""
    attached = model.__dict__.pop("_hf_peft_config_loaded", None)
    try:
        yield
    finally:
        if attached is not None:
            model._hf_peft_config_loaded = attached
