"""Masks of an adapter from outside: given ones, what they are, and their release."""

from __future__ import annotations

import torch
from torch import nn

from ...dynamics.optimizer_state import inner_optimizer
from ...numerics.bits import pack_bits, unpack_bits
from ...sparsify import LayerMask, Masks
from .layer import PruneLinear
from .model import states_of
from .moments import clear_masked_
from .state import PrunedState


@torch.no_grad()
def set_masks(model: nn.Module, masks: Masks, adapter_name: str = "default") -> None:
    """Give an adapter the masks that [`prune`][sparse_peft.sparsify.prune] chose, with any of its scores.

    Args:
        model: with a ``PruneConfig`` adapter.
        masks: of all its layers, and maybe of others.
        adapter_name: the adapter's.

    Raises:
        ValueError: a layer without a mask, or with one of another shape; nothing is changed then.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import PruneConfig, set_masks
        >>> from sparse_peft.sparsify import pruned
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> batches = [torch.randn(16, 8)]
        >>> with pruned(base, "2:4", "wanda", calibration=batches, loss_fn=lambda model, x: model(x)) as masks:
        ...     pass
        >>> model = get_peft_model(base, PruneConfig(pattern="2:4", target_modules=["0"]))
        >>> set_masks(model, masks)
    """
    found = states_of(model, adapter_name)
    for name, (layer, _) in found.items():
        mask = masks.layers.get(name)
        if mask is None or mask.shape != layer.stored_shape:
            has = "no mask" if mask is None else f"one of shape {mask.shape}"
            raise ValueError(
                f"masks: layer {name} of {layer.stored_shape} has {has} there; prune the same model, with the "
                "config's target_modules"
            )
    for name, (layer, state) in found.items():
        kept = masks.layers[name].to_bool(state.mask.device)
        state.put(mask=pack_bits(kept if layer.product.in_dim == 1 else kept.t()), beta=0.0)


@torch.no_grad()
def adapter_masks(model: nn.Module, adapter_name: str = "default") -> Masks:
    """An adapter's masks, to save or to compare.

    Args:
        model: with a ``PruneConfig`` adapter.
        adapter_name: the adapter's.

    Raises:
        ValueError: the model has no such adapter.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import PruneConfig, adapter_masks
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapter_masks(get_peft_model(base, PruneConfig(pattern="2:4", target_modules=["0"]))).density
        0.5
    """
    found = states_of(model, adapter_name)
    config = next(state.config for _, state in found.values())
    about = {"pattern": str(config.pattern), "score": config.recipe}
    return Masks({name: LayerMask.of(_stored(layer, state)) for name, (layer, state) in found.items()}, about)


def _stored(layer: PruneLinear, state: PrunedState) -> torch.Tensor:
    kept = unpack_bits(state.mask, layer.sides[1])
    return kept if layer.product.in_dim == 1 else kept.t().contiguous()


@torch.no_grad()
def release_masks(
    model: nn.Module, adapter_name: str = "default", optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Let an adapter's zeros grow again (SPDF, https://arxiv.org/abs/2303.10464): they start at zero and train.

    From then on the weight in use is ``mask * W + delta``. What the delta had under the mask becomes zero first, so
    that the model is the same. Warm the learning rate up again.

    Args:
        model: with a ``PruneConfig`` adapter that trains weights, or entries.
        adapter_name: the adapter's.
        optimizer: whose state of the revived weights becomes zero; None if there is none yet.

    Raises:
        ValueError: a low-rank delta, whose product has no single entries to set to zero; or a mask whose zeros are
            not closed yet.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import PruneConfig, release_masks
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> model = get_peft_model(base, PruneConfig(trains="weights", target_modules=["0"]))
        >>> release_masks(model)
        >>> bool(model.base_model.model[0].deltas["default"].released)
        True
    """
    found = states_of(model, adapter_name)
    for name, (_, state) in found.items():
        if "A" in state.own_parameters or float(state.beta) > 0:
            why = "a low-rank delta has no entries that could start at zero" if "A" in state.own_parameters else (
                f"zeros of its mask still pass a share of {float(state.beta):g}"
            )  # fmt: skip
            raise ValueError(
                f"layer {name}: {why}; use trains='weights' or 'sparse', or merge the adapter and add another"
            )
    for _, state in found.values():
        clear_masked_(state, None if optimizer is None else inner_optimizer(optimizer), values=True)
        state.put(released=1)
