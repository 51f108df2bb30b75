"""Norms of what goes into the layers, or comes out of them, over data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .passes import each_batch, flatten_tokens, layer_input, run_model, tiles


def _sum_of_squares(x: Tensor, limit: int) -> Tensor:
    """``(features,)`` float32 sums over the tokens of ``(tokens, features)``, cast a tile at a time."""
    total = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    for start, stop in tiles(x.shape[0], x.shape[1] * torch.float32.itemsize, limit):
        total += x[start:stop].to(torch.float32).square().sum(0)
    return total


def feature_norms(
    model: nn.Module,
    targets: dict[str, nn.Module],
    batches: Iterable,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    panel_bytes: int,
    outputs: Collection[str] = (),
) -> dict[str, Tensor]:
    """L2 norm of each input feature of each layer over all tokens, in one forward pass over the batches.

    Where a batch has an ``attention_mask`` of shape ``(batch, seq)`` and a layer's input is
    ``(batch, seq, features)``, masked tokens are left out.

    Args:
        model: run as ``model(**batch)``, or by ``loss_fn``, without gradients.
        targets: ``{layer name: module}``.
        batches: iterated once.
        loss_fn: ``loss_fn(model, batch)``; its result is not used.
        panel_bytes: limit of a temporary's size.
        outputs: the layers whose output features are looked at instead.

    Returns:
        ``{layer name: (in_features,) float32}``.

    Raises:
        ValueError: no usable batches, or a layer that no token reached.
    """
    sums: dict[str, Tensor] = {}
    # of one batch, added to the sums once all of it is known to be finite
    waiting: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def hook(name: str):
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            x = (output if name in outputs else layer_input(args, kwargs)).detach()
            if mask is not None and x.shape[:-1] == mask.shape:
                x = x[mask.to(x.device)]
            x = flatten_tokens(x)
            if x.shape[0]:
                found = _sum_of_squares(x, panel_bytes)
                waiting[name] = waiting[name] + found if name in waiting else found

        return see

    def use(batch: Any, is_last: bool) -> str | None:
        nonlocal mask
        given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        mask = given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None
        waiting.clear()
        run_model(model, batch) if loss_fn is None else loss_fn(model, batch)
        for name, found in waiting.items():
            if not bool(found.isfinite().all()):
                return f"the {'outputs' if name in outputs else 'inputs'} of layer {name} are not finite"
        for name, found in waiting.items():
            sums[name] = sums[name] + found if name in sums else found
        return None

    with ExitStack() as stack:
        for name, module in targets.items():
            stack.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        stack.enter_context(torch.no_grad())
        each_batch(model, batches, use)
    for name in targets:
        if name not in sums:
            raise ValueError(
                f"layer {name}: no token of the data reached it, so its features have no norm; give more data, or "
                "leave the layer out with exclude_modules"
            )
    return {name: sums[name].sqrt() for name in targets}
