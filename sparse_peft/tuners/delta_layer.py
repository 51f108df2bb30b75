"""What the layers of all sparse-delta methods share: trained entries on top of the residency ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from ..ops import (
    UNOBSERVED,
    BatchOrder,
    LinearProduct,
    WeightSource,
    add_to_support_,
    delta_matmul,
    effective_entries,
    functional_layer,
    log_once,
    new_key,
    read_support,
    support_layer,
)
from ..support import Support
from .base_layer import TunerLayer
from .delta import Delta
from .layer_parts import weight_of
from .residency import (
    ActiveDelta,
    DeltaSource,
    DequantisedSource,
    OverlaySource,
    Residency,
    ResidentSource,
    Stamp,
    Write,
    note_holding,
    release_layers,
)
from .stacks import EntryStack, Stack

# Unions of several adapters' supports that a layer keeps, so that switching back and forth does not make them anew.
KEPT_UNIONS = 4
WRITABLE_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def is_dense(weight: Tensor) -> bool:
    """Whether the weight fills its memory without gaps, in the usual order or, as images may, with channels last."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = layouts.get(weight.ndim)
    return weight.is_contiguous() or (channels_last is not None and weight.is_contiguous(memory_format=channels_last))


def _rejoin(layer: SparseTunerLayer[Any], _incompatible_keys: Any) -> None:
    layer.rejoin()


DeltaT = TypeVar("DeltaT", bound=Delta)
Joined = tuple[tuple[Support, ...], ActiveDelta]


class SparseTunerLayer(TunerLayer[DeltaT]):
    """A layer whose weight is trained at the supports of its adapters.

    Args:
        base_layer: ``nn.Linear``, ``nn.Conv1d`` to ``nn.Conv3d``, transformers' ``Conv1D``, or a quantised linear
            layer that PEFT has a backend for.
        name: the layer's full name in the model, for errors and for random supports.
        resident: whether the base weight may hold the active adapter's entries between forward passes.

    A batch whose inputs use several adapters costs the base's product and, where that is cheaper, one more for all of
    them. Their values lie side by side for it from the first such batch until adapters are switched.
    """

    stack_cls: ClassVar[type[Stack] | None] = EntryStack  # None: the adapters have no common product

    def __init__(self, base_layer: nn.Module, name: str, resident: bool = True, **kwargs: Any) -> None:
        super().__init__(base_layer, name, **kwargs)
        self.resident = resident
        self._residency = Residency(name)
        self._joined: Joined | None = None
        self._joins: dict[tuple[str, ...], Joined] = {}
        self._step_expected = False
        self._writable: tuple[Tensor, int, bool] | None = None
        self._stack: Stack | None = None
        self.observer_key = new_key()
        self.register_load_state_dict_post_hook(_rejoin)

    # ------------------------------------------------------------------ adapters

    def support(self, adapter_name: str) -> Support:
        """The trained positions of one adapter in this layer."""
        return self.settled(adapter_name).support

    def active_support(self) -> Support | None:
        """The trained positions of all active adapters together; None without any."""
        names = self._active_names()
        return self._join(names).support if names else None

    def settled(self, adapter_name: str) -> DeltaT:
        """The adapter's trained state; positions that no file has brought are chosen now, from the base weight."""
        delta = self.deltas[adapter_name]
        if delta.known_support() is None:
            self.release()
            with torch.no_grad(), torch.inference_mode(False):
                delta.support = delta.draw(self.dense_base_weight, self.stored_shape)
        return delta

    def _join(self, names: tuple[str, ...]) -> ActiveDelta:
        """The named adapters' common support; kept for each selection of them until one's own support changes."""
        if self._joined is not None and self._joined[1].names == names:
            # a compiled graph is traced with what set_adapter and loading left here
            if torch.compiler.is_compiling() or self._is_current(self._joined):
                return self._joined[1]
        known = self._joins.get(names)
        if known is None or not self._is_current(known):
            with torch.inference_mode(False):
                supports = {name: self.settled(name).support for name in names}
                known = tuple(supports.values()), ActiveDelta.join(supports)
            unions = [other for other in self._joins if len(other) > 1 and other != names]
            if len(names) > 1 and len(unions) >= KEPT_UNIONS:
                del self._joins[unions[0]]
            self._joins[names] = known
        self._joined = known
        return known[1]

    def _is_current(self, joined: Joined) -> bool:
        supports, delta = joined
        return all(old is self.deltas[name].known_support() for old, name in zip(supports, delta.names, strict=True))

    def _forget_joins(self, adapter_name: str) -> None:
        self._joined = None
        self._joins = {names: joined for names, joined in self._joins.items() if adapter_name not in names}

    def rejoin(self) -> None:
        """Prepare the active adapters' common support where it is known, so that no traced forward has to."""
        names = self._active_names()
        if names and not self.merged and all(self.deltas[name].is_set for name in names):
            self._join(names)

    def sum_values(self, delta: ActiveDelta) -> Tensor:
        """The values of the joined adapters at their common support, ``(entries,)``, differentiable."""
        return delta.sum_values([self.deltas[name]() for name in delta.names])

    def stamp(self, delta: ActiveDelta | None) -> Stamp | None:
        """What the values of the joined adapters are now."""
        return None if delta is None else Stamp(tuple(self.settled(name) for name in delta.names), self._is_sharded())

    def check_stamp(self, delta: ActiveDelta, stamp: Stamp) -> None:
        if not stamp.is_current() or any(
            d.known_support() is not s for d, s in zip(stamp.deltas, stamp.supports, strict=True)
        ):
            raise RuntimeError(
                f"the values of adapter {', '.join(delta.names)} in layer {self.name} were changed between the "
                "forward pass and its backward pass; step the optimizer, load and reselect only after backward"
            )

    # ------------------------------------------------------------------ residency

    @torch.no_grad()
    def hold(self, delta: ActiveDelta | None, stamp: Stamp | None) -> None:
        """Make the base weight hold these adapters' entries, or its own for ``None``; nothing if it does already."""
        if delta is None or stamp is None:
            self.release()
        elif self._step_expected or not self._residency.holds(stamp):
            self.check_stamp(delta, stamp)
            with torch.inference_mode(False):
                self._residency.write(self.base_parameter, delta.support, self.sum_values(delta), stamp)
            self.now_holds()

    def now_holds(self) -> None:
        """Note that the base weight holds the active adapters' current entries."""
        self._step_expected = False
        note_holding(self)

    def held_weight(self) -> tuple[Residency, Tensor] | None:
        """The ledger and the base weight, if that holds entries of adapters that are not merged."""
        return None if self._residency.held is None or self.merged else (self._residency, self.base_parameter)

    def release(self) -> None:
        """Give the base weight its own entries back; merged adapters stay merged."""
        if self.held_weight() is not None:
            release_layers([self])

    def pending_write(self) -> Write | None:
        """What makes the base weight hold the active adapters' entries; None if it does, or may not."""
        if self._holds_current():
            return None
        names = self._active_names()
        if not names or self.merged or self.disable_adapters or self.path() != "resident":
            return None
        delta = self._join(names)
        stamp = self.stamp(delta)
        if self._residency.holds(stamp) and not self._step_expected:
            return None
        return Write(self._residency, self.base_parameter, delta.support, self.sum_values(delta), stamp)

    def expect_step(self) -> None:
        """After a backward pass the values may be stepped by means that leave no trace, as ``param.data`` does."""
        self._step_expected = True

    def _may_be_resident(self) -> bool:
        weight = self.base_parameter
        if not self.resident or self._is_sharded():
            return False
        # what follows changes only with the memory itself, and would be asked in every pass
        known = self._writable
        if known is None or known[0] is not weight or known[1] != weight.data_ptr():
            self._writable = known = weight, weight.data_ptr(), self._is_writable(weight)
        return known[2]

    @staticmethod
    def _is_writable(weight: Tensor) -> bool:
        return (
            weight.dtype in WRITABLE_DTYPES
            and is_dense(weight)
            and not weight.is_inference()
            and not (weight.device.type == "cpu" and weight.is_shared())
            # a view into a larger buffer belongs to whoever made it (FSDP's flat parameters, packed checkpoints)
            and weight.untyped_storage().nbytes() == weight.nbytes
        )

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is None and not torch.is_grad_enabled() and self._holds_current():
            return self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._base_forward(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        names = self._active_names()
        if not names:
            return self._base_forward(x, *args, **kwargs)
        delta = self._join(names)
        if self.quantization_backend is not None:
            self._restore_dtypes(delta.names)
        path = "additive" if args or kwargs else self.path(x)
        if path == "dequantised":
            return self._dequantised_forward(x, delta)
        if path == "additive":
            log_once(f"layer {self.name}: the base layer's own forward is used, with the delta added to its result")
            return self._additive_forward(x, delta, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._functional_forward(x, delta)
        if path == "overlay":
            log_once(f"layer {self.name}: the base weight cannot be written, its panels are copied in every pass")
            self.release()
            return self._product(x, delta, OverlaySource(self, delta))
        if torch.is_grad_enabled() and (x.requires_grad or any(self.settled(n).values.requires_grad for n in names)):
            return self._product(x, delta, ResidentSource(self, delta))
        self.hold(delta, self.stamp(delta))
        return self.base_layer(x)

    def path(self, x: Tensor | None = None) -> str:
        """How the forward pass of one adapter, or of several that act together, is computed.

        Args:
            x: the input; one in the base's dtype if None.

        Returns:
            ``"resident"``, ``"overlay"``, ``"dequantised"`` or ``"additive"``; see docs/how_it_works.md.
        """
        if self.quantization_backend is not None:
            stock = self.quantization_backend.supports_merge and not self._is_hooked()
            return "dequantised" if stock else "additive"
        if self._is_hooked() or not self._base_is_stock(x):
            return "additive"
        # a compiled graph writes nothing: it sets the entries in a transient copy
        return "resident" if torch.compiler.is_compiling() or self._may_be_resident() else "overlay"

    def _holds_current(self) -> bool:
        """Whether the base weight holds the active adapters' current values: the short way of inference."""
        held = self._residency.held
        return (
            held is not None
            and not torch.compiler.is_compiling()
            and not self._step_expected
            and isinstance(held.stamp, Stamp)
            and held.stamp.is_current()
        )

    def _product(self, x: Tensor, delta: ActiveDelta | None, source: WeightSource) -> Tensor:
        dtype = self._compute_dtype(x)
        bias = self.base_bias
        return support_layer(
            x.to(dtype),
            None if delta is None else self.sum_values(delta),
            None if bias is None else bias.to(dtype),
            source,
            None if delta is None else delta.support,
        )

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer without any adapter, such that an adapter may act before this pass's backward."""
        self.release()
        plain = torch.compiler.is_compiling() or args or kwargs or not torch.is_grad_enabled() or not x.requires_grad
        if plain or self.quantization_backend is not None or self._is_hooked():
            return self.base_layer(x, *args, **kwargs)
        if not self._base_is_stock(x) or not self._may_be_resident():
            return self.base_layer(x, *args, **kwargs)
        return self._product(x, None, ResidentSource(self, None))

    def _functional_forward(self, x: Tensor, delta: ActiveDelta) -> Tensor:
        dtype = self._compute_dtype(x)
        weight, bias, held = weight_of(self.base_layer), self.base_bias, self._residency.held
        return functional_layer(
            x.to(dtype),
            self.sum_values(delta),
            None if bias is None else bias.to(dtype),
            weight,
            read_support(weight, delta.support) if held is None else held.originals,
            delta.support,
            delta.csr,
            self.product,
            self.observer_key,
        )

    def _dequantised_forward(self, x: Tensor, delta: ActiveDelta) -> Tensor:
        dtype = getattr(self.base_layer, "compute_dtype", None) or x.dtype
        return self._product(x.to(dtype), delta, DequantisedSource(self, delta)).to(x.dtype)

    def _additive_forward(self, x: Tensor, delta: ActiveDelta, *args: Any, **kwargs: Any) -> Tensor:
        self.release()
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        part = self._delta_product(x, self.sum_values(delta), delta.support, self.observer_key)
        return result + part.to(result.dtype)

    def _delta_product(self, x: Tensor, values: Tensor, support: Support, key: int = UNOBSERVED) -> Tensor:
        """What a delta alone makes of the input."""
        if isinstance(self.product, LinearProduct):
            return delta_matmul(x, values, support, self.product.in_dim, key)
        source = DeltaSource(self.stored_shape, support, values, self.product, key)
        return support_layer(x.to(self._compute_dtype(x)), values, None, source, support)

    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        delta = self.settled(adapter_name)
        return self._delta_product(x, delta(), delta.support)

    # ------------------------------------------------------------------ mixed batches

    def _mixed_deltas_(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> None:
        used = set(adapter_names)
        names = tuple(name for name in self.deltas if name in used)
        trains = torch.is_grad_enabled() and any(self.deltas[name].values.requires_grad for name in names)
        # FSDP2 gathers values anew in each pass: nothing tells whether they are those that a stack was made of
        stacks = isinstance(self.product, LinearProduct) and not self._is_sharded()
        if not names or trains or not stacks or self.stack_cls is None:
            return super()._mixed_deltas_(result, x, adapter_names)
        numbers = {name: number for number, name in enumerate(names)}
        order = BatchOrder.of(tuple(numbers.get(name, -1) for name in adapter_names), len(names), x.device)
        suits = self.stack_cls.suits(order, x[0, ..., 0].numel())
        stack = self._stacked(self.stack_cls, names, x) if suits else None
        if stack is None:
            return super()._mixed_deltas_(result, x, adapter_names)
        stack.add_(result, x, order)

    def _stacked(self, kind: type[Stack], names: tuple[str, ...], x: Tensor) -> Stack | None:
        if self._stack is None or not self._stack.serves(names, x):
            deltas = {name: self.settled(name) for name in names}
            with torch.no_grad(), torch.inference_mode(False):
                self._stack = kind.of(deltas, self.product.in_dim, x.dtype)
        return self._stack

    # ------------------------------------------------------------------ merging

    def _merge(self, names: tuple[str, ...], safe_merge: bool) -> None:
        if self.quantization_backend is not None:
            return self._merge_packed(self.quantization_backend, names, safe_merge)
        delta = self._join((*self.merged_adapters, *names))
        values, weight = self.sum_values(delta), self.base_parameter
        if safe_merge:
            originals = self._residency.originals_at(weight, delta.support)
            self._check_merged(effective_entries(originals, values), names)
        self._residency.write(weight, delta.support, values, ("merged", *self.merged_adapters, *names))

    def _add_deltas_(self, weight: Tensor, names: tuple[str, ...]) -> None:
        delta = self._join(names)
        add_to_support_(weight, delta.support, self.sum_values(delta))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's delta as a dense tensor of the stored weight's shape, in the values' dtype."""
        module = self.settled(adapter)
        dense = module.values.new_zeros(self.stored_shape)
        add_to_support_(dense, module.support, module.values)
        return dense.view(self.weight_shape)

    # ------------------------------------------------------------------ PEFT's and torch's bookkeeping

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self.release()
        self._stack = None
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.rejoin()

    def enable_adapters(self, enabled: bool) -> None:
        self.release()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        self.release()
        self._forget_joins(adapter_name)
        self._stack = None
        super().delete_adapter(adapter_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.release()
        self._stack = None
        module = super()._apply(fn, recurse)
        if self._residency.held is not None:
            self._residency.moved(self.base_parameter)
        self.rejoin()
        return module

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.release()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.release()
        return {**self.__dict__, "_writable": None, "_joins": {}, "_stack": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.observer_key = new_key()  # a copy's gradients are none of the original's observer's business
