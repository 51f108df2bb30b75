"""Products with fused experts as ``calibrate`` sees them: in a base model, without adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..calibrate.layer_view import KeptTokens, See
from .expert_mode import ExpertsMode, View, WeightPass
from .expert_sources import BaseExperts
from .expert_weights import ExpertWeight


class WatchedExperts(ExpertsMode):
    """Shows each product with one expert parameter.

    Args:
        weight: the parameter.
        name: its full name.
        see: gets the products.
    """

    def __init__(self, weight: Tensor, name: str, see: See):
        super().__init__([WeightPass(weight, BaseExperts(weight), None, None, name)])
        self.see = see

    def _product(self, view: View, x: Tensor, routing: Any, *how: Any) -> Tensor:
        result = super()._product(view, x, routing, *how)
        seen = self.see(x, result, routing)
        return result if seen is None else seen

    def _dense(self, view: View, func: Any) -> Tensor:
        raise NotImplementedError(
            f"layer {view.of.name}: its experts are multiplied in {getattr(func, '__name__', func)}, which shows no "
            "expert's inputs; give select_support gradients={name: tensor} of a backward pass, or choose a selection "
            "that needs no data"
        )


def watch_experts(target: ExpertWeight, name: str, see: See, kept: KeptTokens) -> Callable[[], None]:
    """See the products with an expert parameter in each pass of its module.

    Args:
        target: the parameter.
        name: its full name.
        see: gets the products.
        kept: the tokens that count; the others run, and are not seen.

    Returns:
        A function that ends it.
    """
    holder = target.holder
    had, forward = holder.__dict__.get("forward"), holder.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        mask, seen = kept(), args
        masked = mask is not None and _are_tokens(args, mask)
        if masked and mask is not None:
            seen = tuple(part[mask.reshape(-1).to(part.device)] for part in args)
        with WatchedExperts(target.weight, name, see):
            result = forward(*seen, **kwargs)
        return forward(*args, **kwargs) if masked else result

    def end() -> None:
        if had is None:
            del holder.__dict__["forward"]
        else:
            holder.__dict__["forward"] = had

    holder.__dict__["forward"] = run
    return end


def _are_tokens(args: tuple[Any, ...], mask: Tensor) -> bool:
    """Whether all arguments have the tokens of a mask as their first dimension."""
    return bool(args) and all(isinstance(one, Tensor) and one.ndim and len(one) == mask.numel() for one in args)
