"""Modules of fused experts with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from .active_delta import ActiveDelta
from .delta_layer import SparseTunerLayer
from .expert_mode import ExpertsMode, WeightPass
from .expert_sources import ExpertsSource
from .expert_weights import ExpertWeight
from .files.checks import BASE_ADAPTER
from .ledger import Ledger, Weight, all_give_output, closed, read_all, write_all
from .residency import note_holding
from .traced_experts import TracedMode, TracedPass, show_grouped_products
from .transitions import exclusive, exclusively

Layer = SparseTunerLayer[Any]

# The implementations of transformers' experts that have a backward pass in ordinary functions of torch.
IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")
_write_all = torch.no_grad()(write_all)


class _Plan(NamedTuple):
    """What one expert parameter is in a pass.

    Attributes:
        layer: of the parameter.
        delta: the adapters that act; None for the base weight alone, and for merged adapters.
        resident: whether the parameter holds their entries.
        wanted: what it must hold.
    """

    layer: Layer
    delta: ActiveDelta | None
    resident: bool
    wanted: ActiveDelta | Weight


class ExpertsLayer(nn.Module):
    """A module of fused experts, whose parameters have adapters.

    Each adapted parameter is a layer of its own, a child under the parameter's name, with its states and its ledger.
    This module runs the base's forward with all of them.

    Args:
        base_layer: the module that has the parameters.
        name: its full name in the model.
    """

    def __init__(self, base_layer: nn.Module, name: str):
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        show_grouped_products()

    def weight_named(self, parameter: str) -> nn.Module:
        """The child of a parameter: its layer, or before it has one the bare weight."""
        if parameter not in self._modules:
            self._modules[parameter] = ExpertWeight(self.base_layer, parameter)
        return cast("nn.Module", self._modules[parameter])

    def forget_bare_weights(self) -> None:
        """Drop the children of parameters that have no layer."""
        for name, child in list(self._modules.items()):
            if isinstance(child, ExpertWeight):
                del self._modules[name]

    @property
    def layers(self) -> list[Layer]:
        """The adapted parameters."""
        return [child for child in self._modules.values() if isinstance(child, SparseTunerLayer)]

    @property
    def _ledgers(self) -> list[Ledger]:
        # asked in every pass: of the children, adapted parameters alone have one
        return [
            ledger
            for child in self._modules.values()
            if child is not None and (ledger := child.__dict__.get("ledger")) is not None
        ]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self._modules:
                raise
            return getattr(self._modules["base_layer"], name)  # the model reads its module's settings

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base's output with the active adapters, or in a mixed batch with each input's own."""
        if not torch.compiler.is_compiling():
            ledgers = self._ledgers
            return read_all(ledgers, self._read_forward, ledgers, adapter_names, args, kwargs)
        run = self._untraced_forward if self._loops() else self._next_forward
        return run(adapter_names, args, kwargs)

    @torch.compiler.disable  # a graph ends in the loop anyway
    def _untraced_forward(self, adapter_names: list[str] | None, args: Any, kwargs: Any) -> Any:
        return self.forward(*args, adapter_names=adapter_names, **kwargs)

    def _read_forward(self, ledgers: list[Ledger], adapter_names: list[str] | None, args: Any, kwargs: Any) -> Any:
        """The output, by the base's module alone where its parameters hold all that the active adapters add."""
        if adapter_names is None and not torch.is_grad_enabled() and all_give_output(ledgers):
            base: Any = self._modules["base_layer"]
            return base(*args, **kwargs)
        return self._next_forward(adapter_names, args, kwargs)

    def _loops(self) -> bool:
        """Whether the base computes in transformers' loop over the experts that have tokens."""
        return hasattr(self.base_layer, "_apply_gate") and self._implementation() in (None, "eager")

    def _implementation(self) -> str | None:
        return getattr(getattr(self.base_layer, "config", None), "_experts_implementation", None)

    def _next_forward(self, adapter_names: list[str] | None, args: Any, kwargs: Any) -> Any:
        """The output, after what has to be done for it."""
        base = self._modules["base_layer"]
        if base is not None and base.__dict__.get("_is_fsdp_managed_module"):
            raise NotImplementedError(
                f"layer {self.name}: FSDP2 shards the parameters of experts, whose adapters need them whole; use DDP, "
                "or leave experts out: fully_shard(model, ignored_params={...})"
            )
        if adapter_names is not None:
            return self._mixed(adapter_names, args, kwargs)
        return self._run(None, args, kwargs)

    def _run(self, names: tuple[str, ...] | None, args: Any, kwargs: Any) -> Any:
        """The base's output with the named adapters, or with the active ones."""
        if torch.compiler.is_compiling():
            return self._trace(names, args, kwargs)
        return self._compute(self._settled(names) or exclusively(self._prepared, names), args, kwargs)

    def _trace(self, names: tuple[str, ...] | None, args: Any, kwargs: Any) -> Any:
        """The output in a graph, where nothing is written to weights."""
        passes: list[WeightPass] = []
        for layer in self.layers:
            delta = self._acting(layer, names)
            if delta is not None:
                passes.append(TracedPass(layer, delta))
        if not passes:
            return self.base_layer(*args, **kwargs)
        self._check_implementation()
        mode = TracedMode(passes)
        with mode:  # "as mode" is None in a graph
            result = self.base_layer(*args, **kwargs)
        self._check_used(passes, mode)
        return result

    def _settled(self, names: tuple[str, ...] | None) -> list[_Plan] | None:
        """The plans, where all parameters are as they want them and no transition is under way."""
        if any(ledger.is_closed for ledger in self._ledgers):
            return None
        plans = self._plans(names)
        return plans if all(plan.layer.ledger.holds(plan.wanted) for plan in plans) else None

    def _plans(self, names: tuple[str, ...] | None) -> list[_Plan]:
        return [self._plan(layer, names) for layer in self.layers]

    @classmethod
    def _plan(cls, layer: Layer, names: tuple[str, ...] | None) -> _Plan:
        delta = cls._acting(layer, names)
        if delta is None:
            merged = names is None and layer.merged and not layer.disable_adapters
            return _Plan(layer, None, False, Weight.MERGED if merged else Weight.OWN)
        # a mixed batch would write a weight once for each adapter in each pass
        resident = names is None and layer._may_be_resident()
        return _Plan(layer, delta, resident, delta if resident else Weight.OWN)

    @staticmethod
    def _acting(layer: Layer, names: tuple[str, ...] | None) -> ActiveDelta | None:
        """The adapters that act besides merged ones: the named, or the active ones."""
        if names is None and (layer.disable_adapters or layer.merged):
            return None
        chosen = layer._active_names() if names is None else tuple(name for name in names if name in layer.deltas)
        return layer._join(chosen) if chosen else None

    def _prepared(self, names: tuple[str, ...] | None) -> list[_Plan]:
        plans = self._plans(names)
        writes = []
        for layer, delta, _, wanted in plans:
            if layer.ledger.holds(wanted):
                continue
            if isinstance(wanted, Weight):
                layer.ledger.release()
            else:
                writes.append(layer.write_of(cast("ActiveDelta", delta)))
        if writes:
            _write_all(writes)
            for write in writes:
                note_holding(write.ledger)
        return plans

    def _compute(self, plans: list[_Plan], args: Any, kwargs: Any) -> Any:
        watched = [plan for plan in plans if self._needs_watching(plan)]
        if not watched:
            return self.base_layer(*args, **kwargs)
        self._check_implementation()
        passes = [self._pass(plan) for plan in watched]
        mode = ExpertsMode(passes)
        result = mode.run(self.base_layer, args, kwargs)
        self._check_used(passes, mode)
        return result

    @staticmethod
    def _needs_watching(plan: _Plan) -> bool:
        """Whether the base's own products would be wrong, or would form the gradient of all experts."""
        if plan.wanted is Weight.MERGED:
            return False
        return torch.is_grad_enabled() or (plan.delta is not None and not plan.resident)

    @staticmethod
    def _pass(plan: _Plan) -> WeightPass:
        layer, delta = plan.layer, plan.delta
        base = cast("ExpertWeight", layer.get_base_layer())
        resident = plan.resident or (delta is None and layer._may_be_resident())
        source = ExpertsSource(layer, delta, resident, base.experts)
        if delta is None:
            return WeightPass(layer.base_parameter, source, None, None, layer.name)
        values, how = layer._trained(delta, None)
        return WeightPass(layer.base_parameter, source, values, delta.support, layer.name, how.scale)

    def _check_implementation(self) -> None:
        chosen = self._implementation()
        if chosen not in IMPLEMENTATIONS:
            known = ", ".join(repr(name) for name in IMPLEMENTATIONS if name)
            raise ValueError(
                f"layer {self.name}: experts_implementation={chosen!r} computes with kernels that have no sparse "
                f"gradient; use model.set_experts_implementation() with one of {known}"
            )

    def _check_used(self, passes: Sequence[WeightPass], mode: ExpertsMode) -> None:
        missed = [one.name for one in passes if one.values is not None and one.name not in mode.used]
        if missed:
            raise RuntimeError(
                f"{', '.join(missed)}: {type(self.base_layer).__name__} computed without reading the parameter in a "
                "function of torch, so that it cannot be trained; leave it out of target_parameters"
            )

    # ------------------------------------------------------------------ mixed batches

    def _mixed(self, adapter_names: list[str], args: Any, kwargs: Any) -> Any:
        """Each adapter's inputs by themselves; all tensors have the same inputs in their first dimension."""
        self._check_mixed_batch(adapter_names, args)
        repeats = len(args[0]) // len(adapter_names)
        result: Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            index = (torch.tensor(rows, device=args[0].device)[:, None] * repeats).add(
                torch.arange(repeats, device=args[0].device)
            )
            parts = [part.index_select(0, index.reshape(-1)) for part in args]
            out = self._run(() if name == BASE_ADAPTER else (name,), parts, kwargs)
            result = out.new_empty(len(args[0]), *out.shape[1:]) if result is None else result
            result.index_copy_(0, index.reshape(-1), out)
        return result

    def _check_mixed_batch(self, adapter_names: list[str], args: Any) -> None:
        if any(layer.merged for layer in self.layers):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        same = all(isinstance(part, Tensor) and part.ndim and len(part) == len(args[0]) for part in args)
        if not args or not same or len(args[0]) % len(adapter_names):
            raise ValueError(
                f"layer {self.name}: experts called with tensors of shapes "
                f"{[tuple(getattr(part, 'shape', ())) for part in args]} cannot tell the {len(adapter_names)} inputs "
                "of `adapter_names` apart; infer with one adapter at a time"
            )

    # ------------------------------------------------------------------ PEFT's and torch's bookkeeping

    @exclusive
    def release(self) -> None:
        """Give all parameters their own entries back; merged adapters stay merged."""
        for layer in self.layers:
            layer.release()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base module, with the adapters merged into its parameters or as it was."""
        for layer in self.layers:
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            else:
                layer.release()
        return self.base_layer

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        return exclusively(closed, self._ledgers, lambda: self._apply_alone(fn, recurse))

    def _apply_alone(self, fn: Any, recurse: bool) -> Self:
        self.release()
        unchanged = [layer.ledger.begin_move() for layer in self.layers]
        super()._apply(fn, recurse)
        for layer, was_unchanged in zip(self.layers, unchanged, strict=True):
            layer.ledger.moved(was_unchanged)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    @exclusive
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, of the base's own weights, which no entries are written into while the result refers to them."""
        self.release()
        state = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        for layer in self.layers:
            name = cast("ExpertWeight", layer.get_base_layer()).parameter
            weight = state.get(f"{prefix}base_layer.{name}")
            if isinstance(weight, Tensor) and weight is not layer.base_parameter:
                layer.ledger.keep_own_while(weight)
        return state

    @exclusive
    def __getstate__(self) -> dict[str, Any]:
        self.release()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for child in self._modules.values():
            base = child.get_base_layer() if isinstance(child, SparseTunerLayer) else child
            if isinstance(base, ExpertWeight):
                base.refer_to(self.base_layer)
