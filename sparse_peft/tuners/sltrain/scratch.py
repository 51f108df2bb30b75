"""A model from scratch whose dense weights are never allocated."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .config import SLTrainConfig
from .weightless import WeightlessLinear


def build_for_pretraining(
    model_config: PretrainedConfig,
    config: SLTrainConfig,
    *,
    auto_class: type = AutoModelForCausalLM,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> PeftModel:
    """A transformers model with new weights, of which the target layers' are sparse plus low rank.

    It is built on the meta device, where the target layers lose their weights before anything has memory. The other
    parameters are then initialised as transformers does it. Paper: SLTrain, https://arxiv.org/abs/2406.02214.

    Args:
        model_config: the model's, such as a ``LlamaConfig``.
        config: with ``mode="pretrain"``.
        auto_class: the auto class, or model class, whose ``from_config`` (``_from_config``) makes the model.
        device: of the result.
        dtype: of the embeddings, norms and other dense parameters; the config's if None. The adapter's are float32.

    Raises:
        ValueError: ``mode="finetune"``, or a target layer shares its weight.
        TypeError: a target is no plain linear layer.

    Example:
        >>> from transformers import LlamaConfig
        >>> from sparse_peft import SLTrainConfig, build_for_pretraining
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> config = SLTrainConfig(mode="pretrain", r=8, target_modules="all-linear")
        >>> model = build_for_pretraining(LlamaConfig(vocab_size=64, **sizes), config)
        >>> model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.device
        device(type='meta')
    """
    if config.mode != "pretrain":
        raise ValueError(f"mode={config.mode!r}: build_for_pretraining makes models of mode='pretrain'")
    config = copy.copy(config)
    config.inference_mode = False  # a saved one is for inference
    make = getattr(auto_class, "from_config" if hasattr(auto_class, "from_config") else "_from_config")
    with torch.device("meta"):
        base = make(model_config, **({} if dtype is None else {"dtype": dtype}))
    model = get_peft_model(base, config)
    materialise(base, torch.device(device))
    return model.to(device)


@torch.no_grad()
def materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Give a model's parameters and buffers that are on the meta device memory, and their first values.

    Raises:
        RuntimeError: transformers computes a buffer when its layer is made, and cannot compute it again.
    """
    fresh: list[nn.Module] = []
    buffers: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        if not any(tensor is not None and tensor.device.type == "meta" for tensor in tensors):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                empty = torch.empty_like(parameter, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = empty = torch.empty_like(buffer, device=device)
                buffers.append((module, name, empty))
        fresh.append(module)
    for module in fresh:
        model._init_weights(module)
        if isinstance(module, WeightlessLinear):  # which transformers does not know as the linear layer it was
            nn.init.zeros_(module.bias)
    for module, name, buffer in buffers:
        if module._buffers[name] is buffer and buffer._version == 0:  # nothing was written to it
            _compute_buffers(module, name, device)
    model.tie_weights()


def _compute_buffers(module: nn.Module, name: str, device: torch.device) -> None:
    """Make a layer's buffers anew from its config: rotary frequencies, which transformers initialises from 5.0 on."""
    config = getattr(module, "config", None)
    if config is None or next(module.parameters(), None) is not None:
        raise RuntimeError(
            f"{type(module).__name__}: its buffer {name!r} is computed when the layer is made, and this version of "
            "transformers cannot do that again; install transformers>=5"
        )
    made: Any = type(module)(config, device=device)
    module._buffers.update(made._buffers)
    module.__dict__.update({key: value for key, value in made.__dict__.items() if isinstance(value, Tensor)})
