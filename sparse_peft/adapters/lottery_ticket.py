"""LT-SFT's first phase: train whole layers, note the entries that moved most, and take the training back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..support import Support
from ..tuners.targets import Targets, own_weights
from .extract import ExtractOptions, WeightPair, extract_layers, options_of, targets_of
from .weight_reader import ModelWeights


def lottery_ticket(
    model: nn.Module,
    train: Callable[[nn.Module], Any],
    options: ExtractOptions | None = None,
    known: Mapping[str, Support] | None = None,
    **fields: Any,
) -> dict[str, Support]:
    """The entries of a model's layers that a training of the whole layers moves most (LT-SFT, section 3.1).

    The target layers' weights train, and besides them what requires gradients already; LT-SFT
    (https://arxiv.org/abs/2110.07560) freezes norms and output embeddings. Afterwards the model is as before, bit for
    bit, also if the training fails. A second training, of these entries alone, is that of a
    [`SparseConfig`][sparse_peft.SparseConfig] with ``selection="given"``.

    The first phase has the memory of full fine-tuning, and a copy of the model in the CPU's memory.

    Args:
        model: the base model, without adapters.
        train: ``train(model)`` trains it, with any trainer.
        options: budget, criterion and layers, as for [`extract`][sparse_peft.adapters.extract]; its fields for the
            adapter's file are of no use here.
        known: what earlier rounds chose, for a model into which their adapter was merged. These entries train and are
            not chosen again: the budget is that of the new ones, and the result has both.
        fields: of [`ExtractOptions`][sparse_peft.adapters.ExtractOptions], in place of ``options``. As in the paper,
            ``allocation`` is ``"global"`` by default: the changes of all layers are compared.

    Returns:
        ``{layer name: positions}``, for [`select_support`][sparse_peft.select_support]; layers without any are left
        out.

    Raises:
        ValueError: no target layer changed, changes that are not finite, a bad budget, or known entries of layers
            that are no targets.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig, select_support
        >>> from sparse_peft.adapters import lottery_ticket
        >>> def train(model):
        ...     trained = [p for p in model.parameters() if p.requires_grad]
        ...     model(torch.ones(4, 64)).square().mean().backward()
        ...     torch.optim.AdamW(trained, lr=1e-3).step()
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> supports = lottery_ticket(base, train, num_params=50, target_modules=["0"])
        >>> config = select_support(base, SparseConfig(selection="given"), supports=supports)
        >>> get_peft_model(base, config).base_model.model[0].support("default").nnz
        50
    """
    options = options_of(options, fields if options else {"allocation": "global", **fields})
    targets = targets_of(options, model)
    before, known = ModelWeights(model).copied(), dict(known or {})
    if unknown := set(known) - set(own_weights(targets)):
        raise ValueError(f"known: layer {min(unknown)} is no target; its positions are for another model")
    with _rewound(model, targets, before):
        train(model)
        for name, support in known.items():  # as if they had not moved
            _put_back(own_weights(targets)[name], before.read(f"{name}.weight"), support)
        found = extract_layers(WeightPair(before, ModelWeights(model), targets), targets, options)
    new = {name: state.support for name, (_, state) in found.items()}
    return {name: _union(name, known.get(name), new.get(name)) for name in targets if name in known or name in new}


@torch.no_grad()
def _put_back(weight: Tensor, before: Tensor, support: Support) -> None:
    flat = support.indices.long().to(weight.device)
    weight.view(-1)[flat] = before.to(weight.device).view(-1)[flat]


def _union(name: str, known: Support | None, new: Support | None) -> Support:
    if known is None or new is None:
        found = known or new
        assert found is not None
        return found
    flat = torch.cat([known.indices.long().cpu(), new.indices.long().cpu()])
    return Support.from_indices(known.shape, flat.sort().values, name=name)


@contextmanager
def _rewound(model: nn.Module, targets: Targets, before: ModelWeights) -> Iterator[None]:
    """Let the targets' weights train, and undo all that training changes in the model's tensors and flags."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        for weight in own_weights(targets).values():
            weight.requires_grad_(True)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in ModelWeights(model).tensors.items():
                tensor.copy_(before.read(name))
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
