"""Exact conversion of sparse adapters to plain LoRA, which PEFT loads without this package, and back.

Each method's states give their own factors, see ``sparse_peft.tuners.forms``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from ..ops import ConvProduct, EmbeddingProduct
from ..registry import method_named
from ..tuners.base_config import BaseSparseConfig
from ..tuners.base_layer import TunerLayer
from ..tuners.base_model import BaseSparseModel
from ..tuners.forms import LoraFactors
from .entry_format import named_tensors
from .files import PREFIX, config_of, read_adapter, tensors_of, write_adapter


def check_has_lora(layer: TunerLayer) -> None:
    """Refuse layers that LoRA has no factors for.

    Raises:
        ValueError: a convolution of several groups, or an embedding.
    """
    if isinstance(layer.product, EmbeddingProduct):
        raise ValueError(
            f"layer {layer.name}: an embedding's delta is not converted to LoRA, which has other tensors for "
            "embeddings; use form='merged', or save the adapter as it is"
        )
    if isinstance(layer.product, ConvProduct) and layer.product.groups > 1:
        raise ValueError(f"layer {layer.name}: a convolution of {layer.product.groups} groups has no LoRA form")


def lora_factors(layer: TunerLayer, adapter_name: str) -> LoraFactors | None:
    """One layer's delta as LoRA has it; None if it is zero everywhere.

    Raises:
        ValueError: it has no exact form of that kind.
    """
    check_has_lora(layer)
    return for_layer(layer, layer.settled(adapter_name).lora_factors(layer.product.in_dim))


def for_layer(layer: TunerLayer, factors: LoraFactors) -> LoraFactors | None:
    """The factors in the shapes that PEFT's LoRA has for this layer; None without ranks."""
    if factors.rank == 0:
        return None
    down, up = factors.A, factors.B
    if isinstance(layer.product, ConvProduct):
        kernel = layer.product.kernel
        down = down.reshape(factors.rank, -1, *kernel)
        up = up.reshape(*up.shape, *(1 for _ in kernel))
    return LoraFactors(down.contiguous(), up.contiguous(), factors.scale)


FactorsOf = Callable[[TunerLayer, str], LoraFactors | None]


def to_lora(
    model: nn.Module,
    adapter_name: str = "default",
    uniform: bool = False,
    factors_of: FactorsOf = lora_factors,
    max_bytes: int | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter as plain LoRA: its config, and its tensors under the names that they have in a file.

    Layers whose delta is zero are left out.

    Args:
        model: the model that has the adapter.
        adapter_name: which.
        uniform: give all layers the largest layer's rank, filled up with zeros, for servers that know one rank only;
            otherwise every layer has its own, in ``rank_pattern`` and ``alpha_pattern``.
        factors_of: gives a layer's delta as LoRA has it; exactly, or an approximation.
        max_bytes: of all factors together; None for no limit.

    Raises:
        ValueError: no such adapter, one without trained entries or ranks, one that has no exact LoRA form, or a LoRA
            larger than ``max_bytes``.
    """
    config = config_of(model, adapter_name)
    layers = [layer for layer in BaseSparseModel.sparse_layers(model) if adapter_name in layer.deltas]
    factors = _factors(layers, adapter_name, uniform, factors_of, max_bytes)
    tensors = {}
    for name, factor in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = factor.A, factor.B
    # trained beside the layers: modules saved whole, biases
    prefix = f".{layers[0].delta_container}"
    rest = {name: tensor for name, tensor in tensors_of(model, adapter_name).items() if prefix not in name}
    lora = LoraConfig(
        **_ranks(factors),
        target_modules=sorted(factors),
        fan_in_fan_out=any(layer.product.in_dim == 0 for layer in layers),
        bias="lora_only" if config.bias.endswith("_only") else config.bias,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    return lora, {**tensors, **rest}


def _factors(
    layers: list[TunerLayer], adapter_name: str, uniform: bool, factors_of: FactorsOf, max_bytes: int | None
) -> dict[str, LoraFactors]:
    """``{layer name: its LoRA}`` of the layers whose delta is not zero."""
    factors: dict[str, LoraFactors] = {}
    for layer in layers:
        found = factors_of(layer, adapter_name)
        if found is not None:
            factors[layer.name] = found
            _check_bytes(factors, uniform, max_bytes)  # before more of it is made
    if not factors:
        raise ValueError(f"adapter {adapter_name!r} has no layer with trained entries or ranks: nothing to save")
    most = max(factor.rank for factor in factors.values())
    return {name: factor.padded(most) for name, factor in factors.items()} if uniform else factors


def _check_bytes(factors: dict[str, LoraFactors], uniform: bool, max_bytes: int | None) -> None:
    """Refuse a LoRA that is too large."""
    name, rank = max(((name, factor.rank) for name, factor in factors.items()), key=lambda found: found[1])
    taken = sum(factor.bytes * (rank if uniform else factor.rank) // factor.rank for factor in factors.values())
    if max_bytes is not None and taken > max_bytes:
        raise ValueError(
            f"form='lora': the exact LoRA takes more than the merged model, whose weights have {max_bytes:,} bytes "
            f"(rank {rank} in layer {name}): use form='merged', or form='low_rank' with a rank for the best "
            "approximation; sparse_peft.adapters.save_as_lora writes a LoRA of any size"
        )


def _ranks(factors: dict[str, LoraFactors]) -> dict[str, Any]:
    """The fields of a ``LoraConfig`` for each layer's rank and scale."""
    ranks = {name: factor.rank for name, factor in factors.items()}
    # PEFT divides alpha by the rank; this keeps the scale of the training
    alphas = {name: factor.scale * factor.rank for name, factor in factors.items()}
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    usual_alpha = next(alphas[name] for name, rank in ranks.items() if rank == usual)
    return {
        "r": usual,
        "lora_alpha": usual_alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != usual_alpha},
    }


def save_as_lora(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default", uniform: bool = False
) -> LoraConfig:
    """Save an adapter as plain LoRA with the same outputs, up to float rounding, of any size.

    S2FT's rank is its number of trained rows or columns, which is large: for servers that know LoRA only. SoRA's is
    its number of remaining ranks.

    Args:
        model: the model that has the adapter.
        folder: made if need be.
        adapter_name: which.
        uniform: see ``to_lora``.

    Returns:
        The LoRA's config.

    Raises:
        ValueError: see ``to_lora``.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import S2FTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, S2FTConfig(k=4, init_weights=False, target_modules=["0"]))
        >>> from sparse_peft.adapters import save_as_lora
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = save_as_lora(model, folder)
        >>> config.r, config.peft_type.value
        (4, 'LORA')
    """
    config, tensors = to_lora(model, adapter_name, uniform)
    write_exact_lora(folder, config, tensors)
    return config


def write_exact_lora(folder: str | os.PathLike, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Write an exact LoRA of ``to_lora``."""
    write_adapter(folder, config, tensors, "Plain LoRA, made exactly of a sparse adapter with `sparse_peft`.")


def save_lora_as_s2ft(lora_folder: str | os.PathLike, folder: str | os.PathLike) -> BaseSparseConfig:
    """Turn a LoRA adapter whose ``A`` or ``B`` selects channels, such as
    [`save_as_lora`][sparse_peft.adapters.save_as_lora] wrote, into S2FT.

    Args:
        lora_folder: of the LoRA adapter.
        folder: where the S2FT adapter is written.

    Returns:
        The S2FT adapter's config.

    Raises:
        ValueError: no LoRA adapter, or a layer whose factors select no channels.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import S2FTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, S2FTConfig(k=4, init_weights=False, target_modules=["0"]))
        >>> from sparse_peft.adapters import save_as_lora, save_lora_as_s2ft
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_as_lora(model, f"{folder}/lora")
        ...     config = save_lora_as_s2ft(f"{folder}/lora", f"{folder}/s2ft")
        >>> config.num_channels
        {'0': 4}
    """
    lora, tensors = read_adapter(lora_folder)
    if not isinstance(lora, LoraConfig):
        raise ValueError(f"{lora_folder}: a LoRA adapter is expected, this is {lora.peft_type}")
    factors = _factors_of_file(lora, tensors)
    method = method_named("s2ft")
    fields, layers = method.model_class.from_lora(factors, lora.fan_in_fan_out)
    config = method.config_class(
        target_modules=list(factors),
        bias=f"{method.peft_type.lower()}_only" if lora.bias == "lora_only" else lora.bias,
        modules_to_save=lora.modules_to_save,
        task_type=lora.task_type,
        base_model_name_or_path=lora.base_model_name_or_path,
        **fields,
    )
    found = {**named_tensors(method.model_class, layers), **tensors}
    write_adapter(folder, config, found, "S2FT, made exactly of a LoRA adapter with `sparse_peft`.")
    return config


def _factors_of_file(lora: LoraConfig, tensors: dict[str, Tensor]) -> dict[str, LoraFactors]:
    """``{layer: factors}`` of a LoRA adapter's file, taken out of its tensors."""
    names = [key[len(PREFIX) : -len(".lora_A.weight")] for key in tensors if key.endswith(".lora_A.weight")]
    factors = {}
    for name in names:
        down, up = (tensors.pop(f"{PREFIX}{name}.lora_{part}.weight") for part in "AB")
        rank = (lora.rank_pattern or {}).get(name, lora.r)
        alpha = (lora.alpha_pattern or {}).get(name, lora.lora_alpha)
        factors[name] = LoraFactors(down, up, alpha / (rank**0.5 if lora.use_rslora else rank))
    return factors
