"""More layers for new knowledge: copies of the least important blocks that change nothing at first (ADEPT)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.model_pass import model_loss, to_device
from .procedure import LossFn

# What a block's layers that write to the residual stream are called, in transformers' models.
WRITERS = ("o_proj", "out_proj", "c_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2")


@dataclass(frozen=True)
class Expansion:
    """A model's copied blocks.

    Attributes:
        copies: numbers of the copies in the expanded model, ascending; PEFT's ``layers_to_transform`` takes them.
        copied: numbers of the copied blocks in the model as it was.
        importance: ``{block: rise of the loss without it}``; empty if the blocks were given.
    """

    copies: list[int]
    copied: list[int]
    importance: dict[int, float]


@torch.no_grad()
def expand_layers(
    model: nn.Module,
    count: int = 1,
    *,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    blocks: Sequence[int] | None = None,
    writers: Sequence[str] = WRITERS,
) -> Expansion:
    """Insert copies of blocks behind them, whose outputs are zero: the model computes what it did, bit for bit.

    ADEPT (https://arxiv.org/abs/2510.10071) copies the blocks that general data need least, and trains copies only.
    The layers of a copy that write to the residual stream start at zero. All parameters but those of the copies are
    frozen. For adapters of the copies set their config's ``layers_to_transform`` to ``copies``.

    Args:
        model: a model of transformers with residual blocks, changed in place; its config follows.
        count: number of blocks to copy.
        batches: of general data, without ``blocks``: the blocks are those without which the loss rises least.
        loss_fn: ``loss_fn(model, batch) -> scalar``; by default ``model(**batch).loss``.
        blocks: numbers of the blocks to copy, in place of data.
        writers: names of the layers that write to the residual stream.

    Raises:
        ValueError: neither or both of batches and blocks, numbers that do not exist, no layer with such a name, or a
            model that would compute something else; the model is unchanged then.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sparse_peft.procedures import expand_layers
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 20}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))
        >>> expand_layers(model, blocks=[1]).copies, model.config.num_hidden_layers
        ([2], 4)
    """
    container = _blocks_of(model)
    if (batches is None) == (blocks is None):
        raise ValueError("expand_layers needs either batches, to measure which blocks matter, or blocks=[...]")
    importance: dict[int, float] = {}
    if blocks is None:
        importance = _importance(model, container, list(batches or ()), loss_fn)
        blocks = sorted(importance, key=importance.__getitem__)[:count]
    chosen = sorted(set(blocks))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < len(container):
        raise ValueError(f"blocks={list(blocks)}: numbers from 0 to {len(container) - 1} are expected")
    expected = _outputs(model)
    original, layer_types = list(container), getattr(model.config, "layer_types", None)
    copies = _insert(model, container, chosen, writers)
    if not torch.equal(_outputs(model), expected):
        _set_blocks(model, container, original, layer_types)
        raise ValueError(
            f"{type(model).__name__} computes something else with copies of blocks {chosen}: other layers than "
            f"{', '.join(writers)} write to its residual stream; name them with writers=[...]"
        )
    model.requires_grad_(False)
    for number in copies:
        container[number].requires_grad_(True)
    return Expansion(copies, chosen, importance)


def _blocks_of(model: nn.Module) -> nn.ModuleList:
    """The longest list of blocks of one class."""
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(block) for block in m}) == 1]
    if not found or not hasattr(getattr(model, "config", None), "num_hidden_layers"):
        raise ValueError(
            f"{type(model).__name__}: a model of transformers with a list of blocks and config.num_hidden_layers is "
            "expected"
        )
    return max(found, key=len)


def _outputs(model: nn.Module) -> Tensor:
    """The model's first output on fixed tokens."""
    was_training = model.training
    inputs: Any = model.dummy_inputs
    device = next(model.parameters()).device
    found = model.eval()(**to_device(inputs, device))[0]
    model.train(was_training)
    return found


def _insert(model: nn.Module, container: nn.ModuleList, chosen: Sequence[int], writers: Sequence[str]) -> list[int]:
    """Insert the copies, and return their numbers."""
    types = getattr(model.config, "layer_types", None)
    blocks: list[nn.Module] = []
    new_types: list[Any] = []
    copies = []
    for number, block in enumerate(container):
        blocks.append(block)
        new_types.append(types[number] if types else None)
        if number in chosen:
            copies.append(len(blocks))
            blocks.append(_silenced(copy.deepcopy(block), writers))
            new_types.append(new_types[-1])
    _set_blocks(model, container, blocks, new_types if types else None)
    return copies


def _silenced(block: nn.Module, writers: Sequence[str]) -> nn.Module:
    found = [module for name, module in block.named_modules() if name.rpartition(".")[2] in writers]
    if not found:
        raise ValueError(
            f"{type(block).__name__} has none of the layers {', '.join(writers)}; name those that write to the "
            "residual stream with writers=[...]"
        )
    for module in found:
        for parameter in module.parameters():
            parameter.zero_()
    return block


def _set_blocks(model: Any, container: nn.ModuleList, blocks: Sequence[nn.Module], types: list[Any] | None) -> None:
    container._modules.clear()
    container.extend(blocks)
    for number, block in enumerate(blocks):
        indexed: list[Any] = [module for module in block.modules() if hasattr(module, "layer_idx")]
        for module in indexed:
            module.layer_idx = number
    model.config.num_hidden_layers = len(blocks)
    if types is not None:
        model.config.layer_types = types


def _importance(
    model: nn.Module, container: nn.ModuleList, batches: Sequence[Any], loss_fn: LossFn | None
) -> dict[int, float]:
    """How much the mean loss rises without each block."""
    if not batches:
        raise ValueError("expand_layers: batches has none; pass batches of general data")
    device, was_training = next(model.parameters()).device, model.training
    model.eval()

    def loss() -> float:
        losses = [(loss_fn or model_loss)(model, to_device(batch, device)).double() for batch in batches]
        return float(torch.stack(losses).mean())

    whole, found = loss(), {}
    for number, block in enumerate(container):
        with _skipped(block):
            found[number] = loss() - whole
    model.train(was_training)
    return found


@contextmanager
def _skipped(block: nn.Module) -> Iterator[None]:
    """Let a block return what it is given."""
    handle = block.register_forward_hook(_input_as_output, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _input_as_output(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given
