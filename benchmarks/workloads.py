"""What is trained: one model and one batch, the same for every method of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_peft.tuners.four_bit import prepare_four_bit

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEQUENCE_LENGTH = 128


@dataclass(frozen=True)
class Workload:
    """A base model with its batch.

    Every method differentiates with respect to the first layer's input, as a layer inside a deep model does; otherwise
    a shallow model would flatter the methods that need no gradient below their first layer.

    Args:
        name: how tables and files call it.
        base: the model; methods train copies of it.
        target_modules: names of the modules that adapters change.
        forward: from a model to its output on the batch, ready for ``backward``.
        decode: from a model to its output on one token, called without gradients.
        output_gradient: what the output's backward starts from; None for a loss.
        task_type: PEFT's task type, None for a model that is no transformers model.
        sizes: numbers that describe the model and batch, for the report.
    """

    name: str
    base: nn.Module
    target_modules: list[str]
    forward: Callable[[nn.Module], Tensor]
    decode: Callable[[nn.Module], Tensor]
    output_gradient: Tensor | None
    task_type: str | None
    sizes: dict[str, int | str]

    def copy_of_base(self) -> nn.Module:
        return copy.deepcopy(self.base)


class LinearStack(nn.Module):
    """``depth`` square Linear layers without bias or activation: nothing but the adapted products costs anything."""

    def __init__(self, d: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleDict({f"proj_{i}": nn.Linear(d, d, bias=False) for i in range(depth)})
        for layer in self.layers.values():
            nn.init.normal_(layer.weight, std=d**-0.5)  # keeps the activations' scale over any depth

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def quantise_nf4(base: nn.Module, dtype: torch.dtype, names: Collection[str] | None = None) -> nn.Module:
    """The same model with its linear layers, or those of these names, in bitsandbytes' NF4, computing in ``dtype``."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: PLC0415  (an optional package)

    layers = [(name, module) for name, module in base.named_modules() if type(module) is nn.Linear]
    for name, layer in layers:
        if names is not None and name.rpartition(".")[2] not in names:
            continue
        has_bias = layer.bias is not None
        packed = Linear4bit(
            layer.in_features, layer.out_features, bias=has_bias, compute_dtype=dtype, quant_type="nf4"
        )
        packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        if has_bias:
            packed.bias = layer.bias
        base.set_submodule(name, packed.to(layer.weight.device))
    # for LoRA too, whose layers lose their gradient where bitsandbytes repacks a weight for its CPU
    prepare_four_bit(base.modules())
    return base


def linear_stack(
    d: int, depth: int, tokens: int, device: torch.device, dtype: torch.dtype, nf4: bool = False
) -> Workload:
    """``depth`` Linear layers ``(d, d)`` on ``tokens`` rows of noise."""
    torch.manual_seed(0)
    base = LinearStack(d, depth).to(device, dtype)
    if nf4:
        base = quantise_nf4(base, dtype)
    x = torch.randn(tokens, d, device=device, dtype=dtype)

    return Workload(
        name=f"synthetic-d{d}-T{tokens}" + ("-nf4" if nf4 else ""),
        base=base,
        target_modules=[f"proj_{i}" for i in range(depth)],
        forward=lambda model: model(x.detach().requires_grad_()),
        decode=lambda model: model(x[:1]),
        output_gradient=torch.randn_like(x) / x.numel(),
        task_type=None,
        sizes={"d": d, "depth": depth, "tokens": tokens} | ({"quantised": "nf4"} if nf4 else {}),
    )


def _language_model(name: str, base: nn.Module, ids: Tensor, checkpointing: bool, sizes: dict) -> Workload:
    base.config.use_cache = False
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(model: nn.Module) -> Tensor:
        embeddings = model.get_input_embeddings()(ids)
        if not embeddings.requires_grad:
            embeddings.requires_grad_()
        return model(inputs_embeds=embeddings, labels=ids).loss

    return Workload(
        name=name,
        base=base,
        target_modules=LLAMA_TARGETS,
        forward=forward,
        decode=lambda model: model(input_ids=ids[:1, :1]).logits,
        output_gradient=None,
        task_type="CAUSAL_LM",
        sizes={**sizes, "tokens": ids.numel(), "sequence": ids.shape[1], "gradient_checkpointing": int(checkpointing)},
    )


def random_llama(
    d: int, depth: int, tokens: int, device: torch.device, dtype: torch.dtype, checkpointing: bool
) -> Workload:
    """A Llama of ``depth`` layers and hidden size ``d`` with random weights; ``d`` must be a multiple of 64."""
    if d % 64:
        raise ValueError(f"d={d} must be a multiple of 64 for the llama workload, whose heads are 64 wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=d,
        intermediate_size=8 * d // 3 // 64 * 64,
        num_hidden_layers=depth,
        num_attention_heads=d // 64,
        num_key_value_heads=max(1, d // 192),
        tie_word_embeddings=True,
    )
    if config.num_attention_heads % config.num_key_value_heads:
        config.num_key_value_heads = config.num_attention_heads
    base = LlamaForCausalLM(config).to(device, dtype)
    ids = torch.randint(config.vocab_size, _batch_shape(tokens), device=device)
    return _language_model(f"llama-d{d}", base, ids, checkpointing, {"d": d, "depth": depth})


def smollm2(tokens: int, device: torch.device, dtype: torch.dtype, checkpointing: bool) -> Workload:
    """SmolLM2-135M on the King James Bible; needs the packages of ``examples/requirements.txt``."""
    from examples.smollm2 import kjv_blocks, load_model, load_tokenizer  # noqa: PLC0415  (optional packages)

    batch, length = _batch_shape(tokens)
    blocks = kjv_blocks(load_tokenizer(), length, limit=batch)
    base = load_model(dtype).to(device)
    sizes = {"d": base.config.hidden_size, "depth": base.config.num_hidden_layers}
    return _language_model("smollm2-135m", base, torch.tensor(blocks, device=device), checkpointing, sizes)


def _batch_shape(tokens: int) -> tuple[int, int]:
    """Sequences of ``SEQUENCE_LENGTH`` tokens, or a single shorter one."""
    length = min(tokens, SEQUENCE_LENGTH)
    if tokens < 2 or tokens % length:
        raise ValueError(f"tokens={tokens} must be 2 to {SEQUENCE_LENGTH}, or a multiple of {SEQUENCE_LENGTH}")
    return tokens // length, length
