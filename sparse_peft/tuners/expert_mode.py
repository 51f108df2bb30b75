"""The base's own experts function, whose products with trained expert weights are taken over.

A module of experts computes in its own way: a loop over experts, a grouped product, a gathered one; with its own gate,
activation, biases and routing weights. All of them reach a weight by indexing it with an expert, or as a whole, and
multiply it by tokens. A mode of torch sees these calls in one thread and leaves the module as it is, with its hooks:
the product is computed by the function that the base called, and autograd gets the node of ``expert_product`` instead
of one that forms the gradient of all experts.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode

from ..numerics import panels
from ..ops import (
    EveryExpert,
    ExpertProduct,
    OneExpert,
    Recipe,
    Routing,
    SortedTokens,
    TokenwiseExperts,
    dense_experts,
    expert_parts,
    expert_product,
    log_once,
)
from ..support import Support
from .expert_sources import WholeSource


class WeightPass:
    """One expert parameter in one pass of its module.

    Args:
        parameter: the parameter ``(experts, rows, cols)``.
        source: of its effective weights.
        values: ``(entries,)`` of the active adapters, differentiable; None without adapters.
        support: of the values.
        name: of the parameter, for messages.
        scale: factor between the values and the delta.
    """

    def __init__(
        self,
        parameter: Tensor,
        source: WholeSource,
        values: Tensor | None,
        support: Support | None,
        name: str,
        scale: float = 1.0,
    ):
        self.parameter, self.source, self.values, self.support, self.name = parameter, source, values, support, name
        self.scale = scale
        self._parts: Sequence[Tensor] | None = None

    def part(self, expert: int) -> tuple[Tensor | None, int]:
        """The values of one expert's entries, and the number of the first; split once, so that backward joins once."""
        if self.values is None or self.support is None:
            return None, 0
        ranges = expert_parts(self.support, self.source.experts)
        if self._parts is None:
            self._parts = self.values.split([last - first for _, first, last in ranges])
        return self._parts[expert], ranges[expert][1]


@dataclass(frozen=True)
class View:
    """What the base made of an expert parameter, as the base sees it.

    Attributes:
        of: the parameter.
        tensor: with the view's shape. Its numbers are those of the base where ``ids`` is None.
        expert: the one that was chosen by a number.
        ids: ``(rows,)`` those that were chosen by a tensor of numbers.
        is_turned: whether rows and columns are exchanged.
    """

    of: WeightPass
    tensor: Tensor
    expert: int | None = None
    ids: Tensor | None = None
    is_turned: bool = False


@dataclass(frozen=True)
class _Made:
    """How an activation was made."""

    result: weakref.ref[Tensor]
    version: int
    recipe: Recipe


def _itself(x: Tensor) -> Tensor:
    return x


def _rows(x: Tensor, numbers: Tensor) -> Tensor:
    """``x[numbers]``, where a CPU's indexing takes ten times as long as this."""
    return x.index_select(0, numbers.remainder(len(x)))  # numbers may count from the end


def _getter(name: str) -> Any:
    """What a mode of torch sees where an attribute of a tensor is read."""
    return getattr(Tensor, name).__get__


# Cheap functions whose results are made again in backward instead of being kept.
_RECOMPUTED = {Tensor.__getitem__, Tensor.index_select, torch.index_select, Tensor.repeat_interleave}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__}
_REMEMBERED = _RECOMPUTED | _PRODUCTS
_TURNS = {Tensor.transpose, torch.transpose, Tensor.t, _getter("mT"), _getter("T")}
_MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
# What is asked of a weight without computing with it.
_ATTRIBUTES = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "requires_grad",
    "is_cuda",
    "is_meta",
    "grad",
    "itemsize",
    "_version",
)
_QUESTIONS = {
    *map(_getter, _ATTRIBUTES), Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.data_ptr,
    Tensor.is_contiguous, Tensor.element_size, Tensor.is_floating_point, Tensor.__len__, torch.is_floating_point,
    Tensor.get_device,
}  # fmt: skip
NOTHING = (-1, None)


def _grouped_products() -> set[Any]:
    """The functions that multiply tokens sorted by expert: torch's, and transformers' for what torch's do not take."""
    found = {getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)} - {None}
    with suppress(ImportError):  # of versions without fused experts
        importlib.import_module("transformers.integrations.moe")
        fallback = torch.ops.transformers.grouped_mm_fallback
        found |= {fallback, fallback.default}
    return found


_GROUPED = _grouped_products()


class ExpertsMode(TorchFunctionMode):
    """Takes over the products of one pass with expert parameters.

    Args:
        passes: of the parameters.
    """

    def __init__(self, passes: Sequence[WeightPass]):
        super().__init__()
        self._views = {id(one.parameter): View(one, one.parameter) for one in passes}
        self._made: dict[int, _Made] = {}
        self.used: set[str] = set()  # names of the parameters that the base asked for

    def run(self, act: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of ``act`` in the mode, which an interruption at any line leaves.

        Ends of ``torch.no_grad`` blocks pass through the mode, too: interrupted there, gradients would stay disabled.
        """
        depth, with_gradients = torch._C._len_torch_function_stack(), torch.is_grad_enabled()
        try:
            with self:
                return act(*args, **kwargs)
        except BaseException:
            while torch._C._len_torch_function_stack() > depth:
                _pop_mode()
            torch.set_grad_enabled(with_gradients)
            raise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        place, view = self._find(args, kwargs)
        if view is None:
            result = func(*args, **kwargs)
            if func in _REMEMBERED and not kwargs:
                self._remember(func, args, result)
            return result
        if func in _QUESTIONS:
            return func(*args, **kwargs)
        self.used.add(view.of.name)
        return self._handle(func, place, view, args, kwargs)

    def _find(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, View | None]:
        """The first expert weight among the arguments, and its place among those by position."""
        views = self._views
        place = -1
        for argument in args:
            place += 1
            if id(argument) in views:
                return place, views[id(argument)]
            if isinstance(argument, (list, tuple)):
                for part in argument:
                    if id(part) in views:
                        return -1, views[id(part)]
        for argument in kwargs.values():
            if id(argument) in views:
                return -1, views[id(argument)]
        return NOTHING

    def _view_of(self, argument: Any) -> View | None:
        return self._views.get(id(argument))

    def _handle(self, func: Any, place: int, view: View, args: Any, kwargs: dict[str, Any]) -> Any:
        result: Any = NotImplemented
        if func is Tensor.__getitem__ and place == 0:
            result = self._choose(view, args[1])
        elif func in _TURNS:
            result = self._turn(func, view, args, kwargs)
        elif func is F.linear and place == 1:
            result = self._linear(view, *args, **kwargs)
        elif func in _MATMULS and place in (0, 1) and not kwargs:
            result = self._matmul(func, view, place, args)
        elif func in _GROUPED and place == 1:
            result = self._grouped(func, view, *args, **kwargs)
        return self._densely(func, args, kwargs) if result is NotImplemented else result

    # ------------------------------------------------------------------ views

    def _keep(self, view: View) -> Tensor:
        self._views[id(view.tensor)] = view
        return view.tensor

    def _choose(self, view: View, index: Any) -> Any:
        if view.expert is not None or view.ids is not None or view.is_turned:
            return NotImplemented
        if isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64:
            # gathered only where it is multiplied, a panel at a time
            stand_in = view.tensor.detach()[:1].expand(len(index), *view.tensor.shape[1:])
            return self._keep(replace(view, tensor=stand_in, ids=index))
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype == torch.int64):
            number = int(index) % len(view.tensor)
            return self._keep(replace(view, tensor=view.tensor.detach()[number], expert=number))
        return NotImplemented

    def _turn(self, func: Any, view: View, args: Any, kwargs: dict[str, Any]) -> Any:
        turned = func(view.tensor.detach(), *args[1:], **kwargs)
        expected = view.tensor.detach().transpose(-2, -1)
        if turned.shape != expected.shape or turned.stride() != expected.stride():
            return NotImplemented
        return self._keep(replace(view, tensor=turned, is_turned=not view.is_turned))

    # ------------------------------------------------------------------ products

    def _linear(self, view: View, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        if view.expert is None:
            return NotImplemented
        # x @ W.T: the view's columns are the inputs
        trained = bias if bias is not None and bias.requires_grad else None
        fixed = bias if trained is None else None
        product = partial(F.linear, weight=weight, bias=fixed)
        result = self._one_expert(view, x, int(not view.is_turned), product, fixed)
        return result if trained is None else result + trained

    def _matmul(self, func: Any, view: View, place: int, args: Any) -> Any:
        x = args[1 - place]
        if self._view_of(x) is not None:
            return NotImplemented
        if view.expert is not None and place == 1 and x.ndim >= 2:
            return self._one_expert(view, x, int(view.is_turned), lambda x: func(x, view.tensor), None)
        if view.expert is None and x.ndim == 3:
            return self._batched(func, view, place, x)
        return NotImplemented

    def _one_expert(
        self, view: View, x: Tensor, in_dim: int, product: Callable[[Tensor], Tensor], bias: Tensor | None
    ) -> Tensor:
        assert view.expert is not None
        rows = x.reshape(-1, x.shape[-1])
        routing = OneExpert(view.expert, len(rows))
        result = self._product(view, self._cast(rows, view), routing, in_dim, lambda: product(rows), self._recipe(x))
        if bias is not None and not view.of.source.is_whole:
            result = result + bias.to(result.dtype)
        return result.view(*x.shape[:-1], -1)

    def _product(
        self,
        view: View,
        x: Tensor,
        routing: Routing,
        in_dim: int,
        run: Callable[[], Tensor],
        recipe: Recipe | None,
        grouped: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """The product of rows with experts' weights; ``run`` computes it where the parameter holds these weights."""
        one = view.of
        values, first = (one.values, 0) if view.expert is None else one.part(view.expert)
        how = ExpertProduct(one.source, one.support, routing, in_dim, first, one.scale, grouped)
        return expert_product(x, values, how, run if one.source.is_whole else None, recipe)

    def _batched(self, func: Any, view: View, place: int, x: Tensor) -> Any:
        """``bmm`` of one matrix of tokens for each expert, or of one token for each chosen expert."""
        rows = x if place == 1 else x.transpose(1, 2)
        in_dim = int(view.is_turned) if place == 1 else int(not view.is_turned)
        routing: Routing
        if view.ids is None and place == 1:
            routing = EveryExpert(view.of.source.experts, rows.shape[1])
        elif view.ids is not None and rows.shape[1] == 1:
            routing = TokenwiseExperts(view.ids)
        else:
            return NotImplemented
        flat = self._cast(rows.reshape(-1, rows.shape[-1]), view)
        recipe = self._recipe(x) if place == 1 else None
        result = self._product(view, flat, routing, in_dim, partial(self._gathered, func, view, place, x), recipe)
        if view.of.source.is_whole:
            return result
        result = result.view(rows.shape[0], rows.shape[1], -1)
        return result if place == 1 else result.transpose(1, 2)

    @staticmethod
    def _gathered(func: Any, view: View, place: int, x: Tensor) -> Tensor:
        """The base's own product, with as many gathered weights at a time as fit a panel."""
        if view.ids is None:
            return func(x, view.tensor)
        weight, parts = view.of.parameter.detach(), []
        for start, stop in panels(len(view.ids), weight[0].numel() * weight.element_size()):
            chosen = weight[view.ids[start:stop]]
            chosen = chosen.transpose(1, 2) if view.is_turned else chosen
            parts.append(func(x[start:stop], chosen) if place == 1 else func(chosen, x[start:stop]))
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _grouped(
        self, func: Any, view: View, x: Tensor, weight: Tensor, offs: Tensor | None = None, **more: Any
    ) -> Any:
        if (
            view.expert is not None
            or view.ids is not None
            or offs is None
            or any(v is not None for v in more.values())
        ):
            return NotImplemented
        run = partial(func, x, weight.detach(), offs=offs)
        recipe = self._recipe_without_products(x)
        return self._product(view, x, SortedTokens(offs), int(view.is_turned), run, recipe, func)

    @staticmethod
    def _cast(x: Tensor, view: View) -> Tensor:
        """Tokens in the dtype of a product under autocast, where the base's own function does not cast them."""
        kind = x.device.type
        if view.of.source.is_whole or not torch.is_autocast_enabled(kind):
            return x
        return x.to(torch.get_autocast_dtype(kind))

    # ------------------------------------------------------------------ other functions

    def _densely(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        def dense(argument: Any) -> Any:
            if isinstance(argument, (list, tuple)):
                return type(argument)(map(dense, argument))
            view = self._view_of(argument)
            return argument if view is None else self._dense(view, func)

        return func(*map(dense, args), **{name: dense(value) for name, value in kwargs.items()})

    def _dense(self, view: View, func: Any) -> Tensor:
        log_once(
            f"{view.of.name}: {getattr(func, '__name__', func)} is no product that is known of experts; its weights "
            "are copied, and their gradient is dense"
        )
        one, source = view.of, view.of.source
        if view.expert is not None:
            values = one.part(view.expert)[0]
            weight = dense_experts(values, source, one.support, [view.expert], one.scale)[0]
        else:
            weight = dense_experts(one.values, source, one.support, range(source.experts), one.scale)
            weight = weight if view.ids is None else weight[view.ids]
        return weight.transpose(-2, -1) if view.is_turned else weight

    # ------------------------------------------------------------------ activations

    def _remember(self, func: Any, args: Any, result: Any) -> None:
        """Note how an activation was made, where backward can make it again from what is kept anyway."""
        if not isinstance(result, Tensor) or not torch.is_grad_enabled() or len(args) != 2:
            return
        first, second = args
        if func in _RECOMPUTED and isinstance(first, Tensor) and isinstance(second, Tensor) and second.ndim == 1:
            is_rows = func is Tensor.__getitem__ and second.dtype == torch.int64
            recipe = Recipe(_rows if is_rows else func, (first, second))
        elif func in _PRODUCTS and all(isinstance(one, Tensor) and one.requires_grad for one in args):
            recipe = Recipe(torch.mul, (first, second))
        else:
            return
        self._made[id(result)] = _Made(weakref.ref(result), result._version, recipe)

    def _recipe(self, x: Tensor) -> Recipe | None:
        made = self._made.get(id(x))
        if made is None or made.result() is not x or made.version != x._version:
            return None
        return made.recipe

    def _recipe_without_products(self, x: Tensor) -> Recipe | None:
        return (self._recipe(x) or Recipe(_itself, (x,))).without_products()
