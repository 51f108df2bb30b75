"""The layers that an adapter trains: found by a config's fields, and refused where they cannot be trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import _get_submodules
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from _sparse_peft_startup.spelling import did_you_mean

from ..calibrate import LayerView
from ..calibrate.layer_view import KeptTokens, See
from ..calibrate.weights import base_of
from ..compat import get_quantization_kwargs, resolve_quantization_backend
from ..dynamics.full_tensor import full_tensor
from ..ops import EmbeddingProduct, is_convolution
from .base_config import BaseSparseConfig
from .base_layer import TunerLayer
from .expert_layer import ExpertsLayer
from .expert_watch import watch_experts
from .expert_weights import ExpertWeight, expert_parameters, holds_experts, parametrised_experts
from .experts import BARE_WEIGHTS, QUANTISED, bare_weights, check_target_parameters, is_named
from .four_bit import base_weight
from .parallel import check_not_partitioned, check_undivided
from .traversal import configs_of

Targets = dict[str, nn.Module]  # {layer name: module}

MOST_NAMED = 20  # layers in an error
EMBEDDING_CURE = (
    " SparseConfig and SaRAConfig train embeddings; trainable_token_indices trains whole tokens beside any."
)


def stored_shape(module: nn.Module) -> tuple[int, int]:
    """``(rows, cols)`` of a target's weight as stored.

    Quantised layers count unpacked, ``(out, in)``; a convolution's weight as ``(out, in / groups * taps)``, that of
    fused experts as ``(experts * rows, cols)``.
    """
    base = base_of(module)
    if is_convolution(base):
        return base.weight.shape[0], base.weight[0].numel()
    if isinstance(base, ExpertWeight):
        return base.stored_shape
    if isinstance(base, Conv1D) or not hasattr(base, "out_features"):
        return tuple(base.weight.shape)
    return base.out_features, base.in_features


def in_dim_of(module: nn.Module) -> int:
    """The dimension of a target's stored weight that is the input's."""
    base = base_of(module)
    return base.in_dim if isinstance(base, ExpertWeight) else int(not isinstance(base, (Conv1D, nn.Embedding)))


def experts_of(module: nn.Module) -> int:
    """The number of matrices that a target's stored weight consists of: its experts, one above the other."""
    base = base_of(module)
    return base.experts if isinstance(base, ExpertWeight) else 1


def experts_among(targets: Targets) -> list[str]:
    """The names of the targets that are fused experts."""
    return [name for name, module in targets.items() if isinstance(base_of(module), ExpertWeight)]


def dense_weight(module: nn.Module) -> Tensor:
    """The base weight of a target in floats, as the matrix that is stored; whole, where processes divide it."""
    if isinstance(module, TunerLayer):
        return module.dense_base_weight()
    base = base_of(module)
    backend = resolve_quantization_backend(base)
    return full_tensor(base.weight).reshape(stored_shape(module)) if backend is None else base_weight(base, backend)


def layer_views(targets: Targets, ties: Iterable[Targets] = ()) -> list[LayerView]:
    """The targets as ``calibrate`` takes them.

    Args:
        targets: of layers with a tied weight the first.
        ties: the layers of each tied weight.
    """
    others = {first: group for group in ties for first in list(group)[:1]}
    views = []
    for name, module in targets.items():
        tied = (_view(other, twin) for other, twin in others.get(name, {}).items() if other != name)
        views.append(replace(_view(name, module), tied=tuple(tied)))
    return views


def _view(name: str, module: nn.Module) -> LayerView:
    base = base_of(module)
    lookup = EmbeddingProduct.of(base) if isinstance(base, nn.Embedding) else None
    return LayerView(
        name,
        module,
        stored_shape(module),
        in_dim_of(module),
        partial(dense_weight, module),
        experts_of(module),
        _watch(name, module),
        lookup,
    )


def _watch(name: str, module: nn.Module) -> Callable[[See, KeptTokens], Callable[[], None]] | None:
    base = base_of(module)
    return partial(watch_experts, base, name) if isinstance(base, ExpertWeight) else None


# ---------------------------------------------------------------------- finding


def find_targets(
    config: BaseSparseConfig, model: nn.Module, prefix: str, state_dict: dict[str, Tensor] | None = None
) -> Targets:
    """The layers that PEFT will adapt for this config, in the model's order.

    Args:
        config: of the new adapter.
        model: the base, which may have adapters.
        prefix: what the names of the method's parameters start with.
        state_dict: tensors of an adapter file, whose layers are then the targets.
    """
    check_no_quantised_experts(config, model)
    if state_dict is None:
        check_target_parameters(config, model)
    resolved = _with_all_linear(config, model)
    in_file = None if state_dict is None else {layer_of(key, prefix) for key in state_dict}
    found: Targets = {}
    for name, module in outermost_layers(model):
        if name in in_file if in_file is not None else check_target_module_exists(resolved, name):
            found[name] = module
        for parameter in _experts_in(module):
            full = f"{name}.{parameter}"
            if full in in_file if in_file is not None else _trains_experts(config, full, module):
                found[full] = _expert_target(module, parameter)
    return found


def which_layers(config: BaseSparseConfig, model: nn.Module) -> str:
    """The cure for target modules that match nothing: names of layers, the one that was meant first."""
    layers = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    names = sorted({name.rpartition(".")[2] for name in layers})
    given = [] if isinstance(config.target_modules, str) else list(config.target_modules or ())
    hint = did_you_mean(given, names)
    return f"{hint}; its linear layers are {', '.join(names[:MOST_NAMED])}" if names else hint


def _with_all_linear(config: BaseSparseConfig, model: nn.Module) -> BaseSparseConfig:
    """The config with the names that ``"all-linear"`` stands for; PEFT counts adapted experts among them."""
    asked = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if config.target_modules is not asked and config.target_modules is not None:
        experts = {name for name, module in model.named_modules() if isinstance(base_of(module), ExpertWeight)}
        config.target_modules = [name for name in config.target_modules if name not in experts]
    return config


def _experts_in(module: nn.Module) -> Iterable[str]:
    return expert_parameters(module.base_layer if isinstance(module, ExpertsLayer) else module)


def _trains_experts(config: BaseSparseConfig, name: str, holder: nn.Module) -> bool:
    """Whether a config names an expert parameter, and leaves it not out by other fields."""
    base = holder.base_layer if isinstance(holder, ExpertsLayer) else holder
    if not (is_named(config.target_parameters or (), name) or (config.target_experts and holds_experts(base))):
        return False
    named = copy.copy(config)
    named.target_modules = [name.partition(".")[2]]  # a suffix: PEFT asks no other field for a full name
    return bool(check_target_module_exists(named, name))


def _expert_target(module: nn.Module, parameter: str) -> nn.Module:
    known = module._modules.get(parameter) if isinstance(module, ExpertsLayer) else None
    base = module.base_layer if isinstance(module, ExpertsLayer) else module
    return known or ExpertWeight(base, parameter)


def check_no_quantised_experts(config: BaseSparseConfig, model: nn.Module) -> None:
    """Refuse experts that a config names and a parametrisation computes, as of bitsandbytes' 4 bits.

    Raises:
        TypeError: names the parameter.
    """
    for name in parametrised_experts(model) if config.names_experts else ():
        if config.target_experts or is_named(config.target_parameters, name):
            raise TypeError(f"target_parameters: {name} is computed by a parametrisation of the module: {QUANTISED}")


def hold_experts(model: nn.Module, targets: Targets) -> None:
    """Put the modules of experts, whose parameters are targets, into modules that can hold adapters."""
    for name, target in targets.items():
        if isinstance(target, ExpertWeight):
            holder_name, _, parameter = name.rpartition(".")
            parent, holder, attribute = _get_submodules(model, holder_name)
            if not isinstance(holder, ExpertsLayer):
                holder = ExpertsLayer(holder, holder_name)
                setattr(parent, attribute, holder)
            holder.weight_named(parameter)


def release_empty_experts(model: nn.Module) -> None:
    """Put modules of experts without any adapter back into their place; of others only adapted parameters are kept."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ExpertsLayer):
            module.forget_bare_weights()
            if not module.layers:
                parent, _, attribute = _get_submodules(model, name)
                setattr(parent, attribute, module.base_layer)


def outermost_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's named modules but itself and those inside of adapted layers."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, (BaseTunerLayer, ExpertsLayer)):
            inside = (*inside, f"{name}.")
        yield name, module


def layer_of(key: str, prefix: str) -> str:
    """The layer's name in the name of one of an adapter's tensors."""
    return key.rsplit(f".{prefix}", 1)[0].removeprefix("_orig_mod.")


# ---------------------------------------------------------------------- checking


def check_is_base(model: nn.Module) -> None:
    """Refuse a model in PEFT's wrapper, whose layers have other names and whose weights other owners.

    Raises:
        ValueError: names its adapters.
    """
    if isinstance(model, (PeftModel, BaseTuner)):
        names = ", ".join(map(repr, configs_of(model)))
        raise ValueError(
            f"the model has an adapter already ({names}): call model.add_adapter(name, config) for another one, pass "
            "model.get_base_model() to select_support, or take the base without adapters from model.unload()"
        )


def check_target(
    name: str,
    module: nn.Module,
    model: nn.Module,
    layer_cls: type[TunerLayer[Any]],
    method: str,
    *,
    takes_groups: bool,
    why_no_convolutions: str | None,
    takes_embeddings: bool,
) -> None:
    """Refuse a layer of a kind that the method cannot train.

    Args:
        name: of the layer.
        module: the layer, which may have adapters.
        model: that has it.
        layer_cls: the method's layers.
        method: for messages.
        takes_groups: whether the method trains convolutions of several groups.
        why_no_convolutions: why it trains no convolutions at all; None if it does.
        takes_embeddings: whether it trains embeddings.

    Raises:
        TypeError: it has another method's adapters, is of no kind that the method trains, or is quantised in a way
            that PEFT has no backend for.
        ValueError: an embedding that changes its weight in each pass.
        NotImplementedError: its weight is divided among processes.
    """
    base = base_of(module)
    weight = getattr(base, "weight", None)
    if isinstance(module, TunerLayer) and not isinstance(module, layer_cls):
        raise TypeError(
            f"Target module {name} has adapters of another method already (it is a {type(module).__name__}), and a "
            f"layer takes those of one method only; unload() or merge_and_unload() them before {method} adapts it"
        )
    if not isinstance(module, TunerLayer) and not isinstance(base, ExpertWeight):
        check_undivided(name, base, model, layer_cls, method)
    if isinstance(base, nn.Embedding) and takes_embeddings:
        _check_embedding(name, base, model)
        return
    if resolve_quantization_backend(base, **get_quantization_kwargs(model)) is not None:
        return
    if isinstance(base, ExpertWeight):
        _check_experts(name, base)
    elif not isinstance(base, (nn.Linear, Conv1D)) and not is_convolution(base):
        fused = f"Its weights are {BARE_WEIGHTS}. " if bare_weights(base) else ""
        raise TypeError(
            f"Target module {name} of type {type(base).__name__} is not supported. {fused}{method} "
            "trains `torch.nn.Linear`, `Conv1d`, `Conv2d`, `Conv3d`, transformers' `Conv1D`, "
            f"{'`Embedding` ' if takes_embeddings else ''}and the quantised linear layers that PEFT has a backend "
            "for; name other target_modules, or leave this one out with exclude_modules."
            + (EMBEDDING_CURE if isinstance(base, nn.Embedding) else "")
        )
    if is_convolution(base) and why_no_convolutions is not None:
        raise TypeError(
            f"Target module {name} of type {type(base).__name__}: {why_no_convolutions}; leave convolutions out with "
            "exclude_modules"
        )
    if is_convolution(base) and base.groups > 1 and not takes_groups:
        raise TypeError(
            f"Target module {name}: a convolution of {base.groups} groups has no low-rank form; leave it out "
            "with exclude_modules"
        )
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise TypeError(
            f"Target module {name} of type {type(base).__module__}.{type(base).__name__} holds {weight.dtype} "
            "weights and PEFT has no quantisation backend for it; use a base quantised with bitsandbytes, HQQ "
            "or torchao, or one in float16, bfloat16 or float32."
        )


def _check_embedding(name: str, base: nn.Embedding, model: nn.Module) -> None:
    quantised = resolve_quantization_backend(base, **get_quantization_kwargs(model)) is not None
    is_plain = type(base.weight) in (nn.Parameter, Tensor, DTensor)
    if quantised or not is_plain or not base.weight.is_floating_point():
        raise TypeError(
            f"Target module {name} of type {type(base).__module__}.{type(base).__name__} is a quantised embedding "
            f"({type(base.weight).__name__}, {base.weight.dtype}), whose rows have no entries to train; keep it in "
            "float16, bfloat16 or float32, or leave it out with exclude_modules"
        )
    if base.max_norm is not None:
        raise ValueError(
            f"Target module {name} has max_norm={base.max_norm}, with which each pass changes rows of the base "
            "weight, so that no adapter could leave it as it was; set max_norm to None, or leave the embedding out "
            "with exclude_modules"
        )


def _check_experts(name: str, base: ExpertWeight) -> None:
    weight = base.weight
    check_not_partitioned(name, base, TunerLayer, "an adapter")
    if isinstance(weight, DTensor):
        raise NotImplementedError(
            f"target_parameters: {name} is sharded over processes (FSDP2, tensor or expert parallelism), and adapters "
            f"need experts whole; use DDP, or leave experts out: fully_shard(model, ignored_params={{...}})"
        )
    if getattr(base.holder, "_is_expert_parallel", False):
        raise NotImplementedError(
            f"target_parameters: {name} is distributed over processes (expert parallelism), and adapters need all "
            "experts; load the model without a distributed_config, or leave experts out of the config"
        )
    if not weight.is_floating_point():
        raise TypeError(
            f"target_parameters: {name} of {type(base.holder).__name__} holds {weight.dtype} weights: {QUANTISED}"
        )
    if not weight.is_meta and not weight.is_contiguous():
        raise ValueError(
            f"target_parameters: {name} has memory of strides {weight.stride()}, and experts' weights are expected "
            "one after the other; make it contiguous (parameter.data = parameter.data.contiguous())"
        )


def own_weights(targets: Targets) -> dict[str, Tensor]:
    """``{layer name: weight}`` of the targets that have one as a tensor."""
    found = {name: getattr(base_of(module), "weight", None) for name, module in targets.items()}
    return {name: weight for name, weight in found.items() if isinstance(weight, Tensor)}


# ---------------------------------------------------------------------- comparing with what is recorded


def check_names(config: BaseSparseConfig, given: set[str], targets: set[str], what: str) -> None:
    """Refuse layers that are not the targets.

    Args:
        config: of the adapter.
        given: names of layers that something is given for.
        targets: those of the targets.
        what: what is given, with its verb.

    Raises:
        ValueError: names the missing and the additional ones.
    """
    if given == targets:
        return
    missing, extra = sorted(targets - given), sorted(given - targets)
    raise ValueError(
        f"{what} other layers than the config targets in this model: missing {missing[:3]}, not in the model "
        f"{extra[:3]} (and {max(0, len(missing) - 3) + max(0, len(extra) - 3)} more). Use the base model the "
        f"adapter was made for, or a new {type(config).__name__} for a new adapter."
    )


def check_shapes(config: BaseSparseConfig, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse a model whose weights have other shapes than those that the config records.

    Raises:
        ValueError: names the layer and both shapes.
    """
    for name, shape in shapes.items():
        made_for = (config.weight_shapes or {}).get(name)
        if made_for is not None and tuple(made_for) != shape:
            raise ValueError(
                f"weight_shapes: the adapter was made for a weight of shape {tuple(made_for)} in layer {name}, "
                f"this model's is {shape}; load it on the base model it was made for "
                f"({config.base_model_name_or_path or 'see its adapter_config.json'})"
            )
