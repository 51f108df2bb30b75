"""What the layers of all sparse-delta methods share: trained entries on top of the residency ledger."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from ..calibrate.partitions import gather_missing
from ..ops import (
    UNOBSERVED,
    BatchOrder,
    GradientObserver,
    How,
    LinearProduct,
    add_to_support_,
    delta_matmul,
    effective_entries,
    functional_layer,
    log_once,
    new_key,
    own_entries,
    read_support,
    support_layer,
)
from ..support import Support
from .active_delta import ActiveDelta
from .backups import EntriesBackup
from .base_layer import Step, TunerLayer, of_owner
from .changes import Stamp
from .contents import Contents
from .delta import Delta
from .delta_config import IN_PRODUCTS, Resident
from .fully_sharded import values_of_own_rows
from .layer_parts import weight_of
from .ledger import Content, Held, Merged, Weight, Write, transition, write_all
from .residency import hold_layers, note_holding, release_layers
from .sources import (
    DeltaSource,
    DequantisedSource,
    GatheredSource,
    LayerSource,
    OverlaySource,
    ProductSource,
    ResidentSource,
)
from .stacks import EntryStack, Stack
from .tensor_parallel import WholeObserver
from .transitions import exclusive, exclusively

DeltaT = TypeVar("DeltaT", bound=Delta)

# Unions of several adapters' supports that a layer keeps, so that switching back and forth does not make them anew.
KEPT_UNIONS = 4
# The method that computes each path.
HANDLERS = {
    name: f"_{name}_forward"
    for name in ("resident", "product", "gathered", "overlay", "dequantised", "additive", "traced", "transformed")
}
WRITABLE_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def is_dense(weight: Tensor) -> bool:
    """Whether the weight fills its memory without gaps, in the usual order or, as images may, with channels last."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = layouts.get(weight.ndim)
    return weight.is_contiguous() or (channels_last is not None and weight.is_contiguous(memory_format=channels_last))


def _rejoin(layer: SparseTunerLayer[Any], _incompatible_keys: Any) -> None:
    layer.rejoin()


class SparseTunerLayer(TunerLayer[DeltaT]):
    """A layer whose weight is trained at the supports of its adapters.

    Args:
        base_layer: ``nn.Linear``, ``nn.Conv1d`` to ``nn.Conv3d``, transformers' ``Conv1D``, a quantised linear layer
            that PEFT has a backend for, or ``nn.Embedding`` in layers that train it.
        name: the layer's full name in the model, for errors and for random supports.
        resident: whether the base weight may hold the active adapter's entries between forward passes; with
            ``"product"`` in evaluation only.
        owner: as in ``TunerLayer``.

    A batch whose inputs use several adapters costs the base's product and, where that is cheaper, one more for all of
    them. Their values lie side by side for it from the first such batch until adapters are switched.
    """

    stack_cls: ClassVar[type[Stack] | None] = EntryStack  # None: the adapters have no common product
    takes_partitions = True
    adds_entries_only: ClassVar[bool] = True  # whether an adapter adds nothing to the weight but its entries

    def __init__(self, base_layer: nn.Module, name: str, resident: Resident = True, **kwargs: Any) -> None:
        super().__init__(base_layer, name, **kwargs)
        self.resident = resident
        self._joined: ActiveDelta | None = None
        self._joins: dict[tuple[str, ...], ActiveDelta] = {}  # of single adapters
        self._unions: dict[tuple[str, ...], ActiveDelta] = {}  # of several
        self._writable: tuple[weakref.ref[Tensor], int, bool] | None = None
        self._stack: Stack | None = None
        self._unwritten: weakref.ref[nn.Parameter] | None = None
        self._own_key = new_key(self.matrices)
        self.register_load_state_dict_post_hook(_rejoin)

    @property
    def observer_key(self) -> int:
        """The layer's key, for observers of its weight's gradient; layers of one tied weight have the same."""
        return cast("SparseTunerLayer[DeltaT]", self.owner)._own_key

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
            exclusively(self._draw, delta)
        if not delta.knows_zeros:
            exclusively(self._note_zeros, delta)
        return delta

    def _draw(self, delta: DeltaT) -> None:
        if delta.known_support() is None:
            self.release()
            with torch.no_grad(), torch.inference_mode(False):
                delta.support = delta.draw(self.dense_base_weight, self.stored_shape)

    def _note_zeros(self, delta: DeltaT) -> None:
        if self.parallel is not None or self._is_sharded():
            raise NotImplementedError(
                f"preserve_zeros=True: layer {self.name} is divided among processes, which do not know one another's "
                "zeros; use DDP, or selection='nonzero'"
            )
        self.release()
        with torch.no_grad(), torch.inference_mode(False):
            delta.note_zeros(self.dense_base_weight())

    def _join(self, names: tuple[str, ...]) -> ActiveDelta:
        """The named adapters' common support; kept for each selection of them until one's own support changes."""
        if self._owner:  # the weight holds one join, whichever layer asks
            return cast("SparseTunerLayer[DeltaT]", self.owner)._join(names)
        known = self._joined
        # a compiled graph is traced with what set_adapter and loading left here
        if known is not None and known.names == names and (torch.compiler.is_compiling() or self._is_current(known)):
            return known
        return exclusively(self._join_anew, names)

    def _join_anew(self, names: tuple[str, ...]) -> ActiveDelta:
        kept = self._joins if len(names) == 1 else self._unions
        known = kept.get(names)
        if known is None or not self._is_current(known):
            with torch.inference_mode(False):
                shard = None if self.parallel is None else self.parallel.shard
                known = ActiveDelta.join({name: self.settled(name).support for name in names}, shard)
            kept[names] = known
            if len(self._unions) > KEPT_UNIONS:
                del self._unions[next(iter(self._unions))]
        self._joined = known
        return known

    def _is_current(self, joined: ActiveDelta) -> bool:
        """Whether the adapters still have the supports that were joined."""
        deltas = self.deltas
        for name, support in zip(joined.names, joined.parts, strict=True):
            if deltas[name].known_support() is not support:
                return False
        return True

    def _forget_joins(self, adapter_name: str) -> None:
        self._joined = None
        self._joins.pop((adapter_name,), None)
        self._unions = {names: joined for names, joined in self._unions.items() if adapter_name not in names}

    def rejoin(self) -> None:
        """Prepare the active adapters' common support where it is known, so that no traced forward has to."""
        names = self._active_names()
        if names and not self.merged and all(self.deltas[name].is_set for name in names):
            self._join(names)

    def sum_values(self, delta: ActiveDelta, stamp: Stamp | None = None) -> Tensor:
        """The joined adapters' delta at their common support, ``(entries,)``, differentiable.

        Args:
            delta: the adapters.
            stamp: of a pass whose parameters are meant, where they were replaced since.
        """
        if stamp is None or stamp.is_in_place():
            return delta.sum_values(self._own(delta, [self.deltas[name]() for name in delta.names]))
        marks = zip(delta.names, stamp.marks, strict=True)
        return delta.sum_values(self._own(delta, [self.deltas[name].scaled(mark.tensor) for name, mark in marks]))

    def whole_values(self, delta: ActiveDelta) -> Tensor:
        """The joined adapters' delta as numbers, without DeepSpeed's hooks, which a backward pass must not run."""
        with torch.no_grad():
            return delta.sum_values([self.deltas[name].forward() for name in delta.names])

    def _own(self, delta: ActiveDelta, values: list[Tensor]) -> list[Tensor]:
        """Of each adapter's values those in this process's part of the weight; their gradients are summed."""
        if self.parallel is None:
            return values
        slots = cast("tuple[Tensor, ...]", delta.own)
        return [own_entries(part, own, self.parallel.group) for part, own in zip(values, slots, strict=True)]

    def stamp(self, delta: ActiveDelta | None) -> Stamp | None:
        """What the values of the joined adapters are now."""
        if delta is None:
            return None
        content = self.ledger.content
        if content is not None and isinstance(content, Held) and content.delta is delta and content.stamp.is_current():
            return content.stamp
        # parameters that are gathered change their addresses
        gathered = self._is_sharded() or self._is_partitioned()
        return Stamp([self.settled(name) for name in delta.names], gathered)

    def check_stamp(self, delta: ActiveDelta, stamp: Stamp) -> None:
        """Refuse values that changed since the forward pass.

        Raises:
            RuntimeError: names the adapters and the layer.
        """
        if not stamp.is_unwritten() or not self._is_current(delta):
            raise RuntimeError(
                f"the values of adapter {', '.join(delta.names)} in layer {self.name} were changed between the "
                "forward pass and its backward pass; step the optimizer, load and reselect only after backward"
            )

    def put_contents(self, adapter_name: str, contents: Contents) -> None:
        """Replace what an adapter has in this layer; called with the transitions' lock and the weight released."""
        self._forget_joins(adapter_name)
        self._stack = None
        contents.put_into(self.deltas[adapter_name])
        self.rejoin()

    # ------------------------------------------------------------------ residency

    def _prepare(self, wanted: ActiveDelta | Weight) -> None:
        if isinstance(wanted, Weight):
            super()._prepare(wanted)
            return
        if self.divided is not None:
            hold_layers(self._siblings())
        if not self.ledger.holds(wanted):
            self._write(wanted, self.stamp(wanted))

    def _write(self, delta: ActiveDelta, stamp: Stamp | None) -> None:
        write_all([self.write_of(delta, stamp=stamp)])
        note_holding(self.ledger)

    def write_of(self, delta: ActiveDelta, values: Tensor | None = None, stamp: Stamp | None = None) -> Write:
        """What makes the base weight, or this process's rows of it, hold the entries of joined adapters.

        Args:
            delta: the adapters.
            values: ``(entries,)``: the delta at the entries in this process's rows, of a weight that FSDP2 divides;
                asked of the other processes if None.
            stamp: what the adapters' values are; by default their present ones.
        """
        stamp, divided = stamp or self.stamp(delta), self.divided
        assert stamp is not None
        if divided is not None:
            if values is None:
                (values,) = values_of_own_rows([(self, delta)])
            # what state dicts refer to was left alone by the last write, if there was one
            rows = divided.own_rows() if self.ledger.is_own else divided.get("weight")
            held = Held(delta, stamp, divided, rows, self.adds_entries_only)
            return Write(self.ledger, rows, delta.within(divided.shard).support, values, 1.0, held)
        weight, parameters = self.base_parameter, self.base_parameters
        # of a divided layer, processes whose weights may not be written must exchange the same as the others
        is_all = self.adds_entries_only and self.parallel is None
        held = Held(delta, stamp, parameters, weight, is_all)
        with torch.no_grad():  # autograd would save tensors in a checkpointed block's first pass, which alone writes
            if len(delta.names) == 1 and self.parallel is None and stamp.is_in_place():
                state = self.deltas[delta.names[0]]
                return Write(self.ledger, weight, delta.support, state.unscaled(), state.value_scale, held)
            values = self.sum_values(delta, stamp)
        return Write(self.ledger, weight, delta.support, values.detach(), 1.0, held)

    def pending_delta(self) -> ActiveDelta | None:
        """The active adapters, whose entries the base weight could hold and does not; None without any."""
        names = self._active_names()
        if not names or self.ledger.is_merged or self.disable_adapters or self.path() != "resident":
            return None
        delta = self._join(names)
        return None if self.ledger.holds(delta) else delta

    def hold(self, delta: ActiveDelta | None, stamp: Stamp | None) -> bool:
        """Make the base weight hold what it held in a forward pass: these adapters' entries, or its own for None.

        Called by a thread that is among the ledger's readers.

        Returns:
            Whether it does; else it is the base's own, because it must stay that now.

        Raises:
            RuntimeError: the values changed, or adapters were merged.
        """
        if not self.ledger.is_closed and self._still_holds(delta, stamp):
            return True
        return exclusively(self._hold_again, delta, stamp)

    def _still_holds(self, delta: ActiveDelta | None, stamp: Stamp | None) -> bool:
        content = self.ledger.content
        if delta is None or stamp is None:
            return self.ledger.is_own
        return isinstance(content, Held) and content.delta is delta and content.stamp.is_same(stamp)

    def _hold_again(self, delta: ActiveDelta | None, stamp: Stamp | None) -> bool:
        if self._still_holds(delta, stamp):
            return True
        if self.merged:
            raise RuntimeError(
                f"layer {self.name}: adapters {self.merged_adapters} were merged between a forward pass and its "
                "backward pass; merge after backward"
            )
        if delta is None or stamp is None or self.ledger.is_kept_own:
            release_layers(layer.ledger for layer in self._siblings())
            return delta is None
        self.check_stamp(delta, stamp)
        if self.divided is not None:  # with the other layers, before their weights are gathered
            hold_layers(self._siblings())
        if not self._still_holds(delta, stamp):
            self._write(delta, stamp)
        return True

    def _enter_partitioned(self) -> None:
        super()._enter_partitioned()
        if self._gathers():  # the layer itself multiplies by what is its base layer's: DeepSpeed is told
            external: dict[int, Any] = self.__dict__["_external_params"]
            found: list[Any] = [
                parameter for parameter in self.base_layer._parameters.values() if parameter is not None
            ]
            external.update({id(parameter): parameter for parameter in found})
            gather_missing(found)  # in the first pass

    def _gathers(self) -> bool:
        """Whether DeepSpeed gathers for this layer what its base layer needs, which nothing else has hooks in."""
        base = self.base_layer
        hooks = [*base._forward_pre_hooks.values(), *base._forward_hooks.values()]
        return "_external_params" in self.__dict__ and not (
            any(not getattr(hook, "__module__", "").startswith("deepspeed.") for hook in hooks)
            or base.__dict__.get("forward") is not None
            or base._backward_hooks
            or base._backward_pre_hooks
        )

    def _siblings(self) -> Iterable[SparseTunerLayer[Any]]:
        """The layers whose weights change together: all of the model where processes exchange, else this one."""
        divided = self.divided
        return (self,) if divided is None or divided.siblings is None else divided.siblings()

    def _may_be_resident(self) -> bool:
        if not self.resident or self._is_partitioned() or self.ledger.is_kept_own:
            return False
        if self._is_sharded():
            return self.divided is not None
        weight = self.base_parameter
        # what follows changes only with the memory itself, and would be asked in every pass
        known = self._writable
        if known is not None and known[0]() is weight and known[1] == weight.data_ptr():
            return known[2]
        if known is not None and (own := known[0]()) is not None and own is not weight and not own.is_meta:
            return False  # another weight has its place for a while: torch.func.functional_call
        self._writable = weakref.ref(weight), weight.data_ptr(), self._is_writable(weight)
        return self._writable[2]

    def _is_writable(self, weight: Tensor) -> bool:
        return (
            (isinstance(weight, nn.Parameter) or self.parallel is not None)
            and weight.dtype in WRITABLE_DTYPES
            and is_dense(weight)
            and not weight.is_inference()
            and not (weight.device.type == "cpu" and weight.is_shared())
            # a view into a larger buffer is somebody else's memory (FSDP's flat parameters, packed checkpoints)
            and weight.untyped_storage().nbytes() == weight.nbytes
        )

    # ------------------------------------------------------------------ forward

    def adapters_step(self, x: Tensor, names: tuple[str, ...], has_more: bool) -> Step:
        self._check_tie()
        delta = self._join(names)
        if self.quantization_backend is not None:
            self._restore_dtypes(delta.names)
        path = self._path_now(x, has_more)
        run = getattr(self, HANDLERS[path])
        return Step(partial(run, delta), delta if path == "resident" else Weight.OWN)

    def _held_pass(self, x: Tensor, has_more: bool) -> Callable[..., Tensor]:
        # what forward_step asks besides holds since the weight was written
        content = self.ledger.content
        is_plain = not (
            has_more
            or self._owner
            or torch._C._are_functorch_transforms_active()
            or self._is_hooked()
            or self._holds_in_products_only()
        )
        if is_plain and isinstance(content, Held) and self._base_is_stock(x):
            return partial(self._resident_forward, content.delta, stamp=content.stamp)
        return super()._held_pass(x, has_more)

    def _check_tie(self) -> None:
        """Refuse a weight that is no longer the owner's.

        Raises:
            RuntimeError: names both layers.
        """
        if self._owner and self.base_parameter is not self.owner.base_parameter:
            raise RuntimeError(
                f"layer {self.name}: its weight was tied to that of {self.owner.name} when the adapter was made, and "
                "is another one now; untie and resize weights before an adapter is added"
            )

    def _path_now(self, x: Tensor, has_more: bool) -> str:
        """``path``, where graphs and transforms that record the pass have one of their own."""
        path = "additive" if has_more else self.path(x)
        if self.parallel is None and path in ("resident", "overlay") and torch._C._are_functorch_transforms_active():
            return "transformed"
        self._refuse_compiling()
        self._refuse_transforms()
        return "traced" if path == "resident" and torch.compiler.is_compiling() else path

    def _refuse_compiling(self) -> None:
        if not torch.compiler.is_compiling():
            return
        if self.resident and self._is_sharded():
            raise NotImplementedError(
                f"layer {self.name}: FSDP and torch.compile go together with resident=False only, since graphs write "
                "nothing; make the adapter with it, or do without torch.compile"
            )
        if self.parallel is not None:
            raise NotImplementedError(
                f"layer {self.name}: tensor parallelism (tp_plan) and adapters are not compiled together; do without "
                "torch.compile, or use FSDP2 or DDP"
            )

    def path(self, x: Tensor | None = None) -> str:
        """How the forward pass of one adapter, or of several that act together, is computed.

        Args:
            x: the input; one in the base's dtype if None.

        Returns:
            ``"product"``, ``"resident"``, ``"overlay"``, ``"gathered"``, ``"dequantised"`` or ``"additive"``; see
            docs/how_it_works.md.
        """
        if self.quantization_backend is not None:
            stock = self.quantization_backend.supports_merge and not self._is_hooked()
            return "dequantised" if stock else "additive"
        if self._is_partitioned():
            return "gathered" if self._gathers() and self._base_is_stock(x) else "additive"
        if self._is_hooked() or not self._base_is_stock(x):
            return "additive"
        # a compiled graph writes nothing: it sets the entries in a transient copy
        if torch.compiler.is_compiling():
            return "resident"
        if not self._may_be_resident():
            return "overlay"
        return "product" if self._holds_in_products_only() else "resident"

    def _holds_in_products_only(self) -> bool:
        """Whether the weight is the base's own again after each product; processes that exchange do so once a step."""
        return self.resident == IN_PRODUCTS and self.training and self.parallel is None and self.divided is None

    def _product(self, x: Tensor, source: LayerSource) -> Tensor:
        dtype, delta, parallel = self._compute_dtype(x), source.delta, self.parallel
        bias = None if self.base_bias is None else self.base_bias.to(dtype)
        values, how = (None, How(dtype=dtype)) if delta is None else self._trained(delta, dtype)
        support = None if delta is None else delta.support
        if parallel is None:
            return support_layer(x, values, bias, source, support, how)
        within = bias if parallel.is_colwise else None
        out = support_layer(parallel.enter(x), values, within, source, support, how)
        return parallel.leave(out, None if parallel.is_colwise else bias)

    def _trained(self, delta: ActiveDelta, dtype: torch.dtype | None) -> tuple[Tensor, How]:
        """What a pass differentiates by, and how: one adapter's values, or the sum of several deltas."""
        state = self.deltas[delta.names[0]]
        if len(delta.names) > 1:
            alike = len({self.deltas[name].compression for name in delta.names}) == 1
            return self.sum_values(delta), How(1.0, dtype, state.compression if alike else None)
        values = state.unscaled()
        if self.parallel is not None:
            (values,) = self._own(delta, [values])
        return values, How(state.value_scale, dtype, state.compression, state.narrows_inputs)

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer without any adapter, such that an adapter may act before this pass's backward."""
        plain = torch.compiler.is_compiling() or args or kwargs or not torch.is_grad_enabled() or not x.requires_grad
        if plain or self.quantization_backend is not None or self._is_hooked():
            return self.base_layer(x, *args, **kwargs)
        if not self._base_is_stock(x) or not self._may_be_resident():
            return self.base_layer(x, *args, **kwargs)
        return self._product(x, ResidentSource(self, None))

    def _resident_forward(self, delta: ActiveDelta, x: Tensor, stamp: Stamp | None = None) -> Tensor:
        trains = self.parallel is not None or (
            torch.is_grad_enabled()
            and (x.requires_grad or any(self.deltas[name].values.requires_grad for name in delta.names))
        )
        return self._product(x, ResidentSource(self, delta, stamp)) if trains else self.base_layer(x)

    def _product_forward(self, delta: ActiveDelta, x: Tensor) -> Tensor:
        return self._product(x, ProductSource(self, delta))

    def _gathered_forward(self, delta: ActiveDelta, x: Tensor) -> Tensor:
        return self._product(x, GatheredSource(self, delta))

    def _overlay_forward(self, delta: ActiveDelta, x: Tensor) -> Tensor:
        log_once(f"layer {self.name}: the base weight cannot be written, its panels are copied in every pass")
        return self._product(x, OverlaySource(self, delta))

    def _traced_forward(self, delta: ActiveDelta, x: Tensor) -> Tensor:
        dtype = self._compute_dtype(x)
        weight, bias, backup = weight_of(self.base_layer), self.base_bias, self.ledger.backup
        return functional_layer(
            x.to(dtype),
            self.sum_values(delta),
            None if bias is None else bias.to(dtype),
            weight,
            backup.originals if isinstance(backup, EntriesBackup) else read_support(weight, delta.support),
            delta.support,
            self.product,
            self.observer_key,
        )

    def _transformed_forward(self, delta: ActiveDelta, x: Tensor) -> Tensor:
        """In ordinary operations on a copy of the weight, for ``torch.func.grad``, ``vmap`` and their like."""
        dtype, bias = self._compute_dtype(x), self.base_bias
        matrix = self._transformed_weight(delta).to(dtype)
        matrix = matrix if self.product.in_dim == 1 else matrix.t()
        bias = None if bias is None else bias.to(dtype)
        return self.product.leave(self.product.multiply(self.product.enter(x.to(dtype)), matrix, bias), x)

    def _transformed_weight(self, delta: ActiveDelta) -> Tensor:
        """The effective weight as a new matrix, in ordinary operations."""
        weight, support = self.base_parameter.reshape(-1), delta.support
        entries = effective_entries(weight.index_select(0, support.indices), self.sum_values(delta))
        return weight.scatter(0, support.indices.long(), entries).view(self.stored_shape)

    def _dequantised_forward(self, delta: ActiveDelta, x: Tensor) -> Tensor:
        dtype = getattr(self.base_layer, "compute_dtype", None) or x.dtype
        return self._product(x.to(dtype), DequantisedSource(self, delta)).to(x.dtype)

    def _additive_forward(self, delta: ActiveDelta, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        log_once(f"layer {self.name}: the base layer's own forward is used, with the delta added to its result")
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        part = self._delta_product(x, self.sum_values(delta), delta.support, self.observer_key)
        return result + part.to(result.dtype)

    def _delta_product(self, x: Tensor, values: Tensor, support: Support, key: int = UNOBSERVED) -> Tensor:
        """What a delta alone makes of the input; both are those of this process's part of the weight."""
        if self.parallel is not None:
            part = delta_matmul(self.parallel.enter(x), values, support, self.product.in_dim, key)
            return self.parallel.leave(part)
        if isinstance(self.product, LinearProduct):
            return delta_matmul(x, values, support, self.product.in_dim, key)
        source = DeltaSource(self.stored_shape, support, values, self.product, key)
        return support_layer(x, values, None, source, support, How(dtype=self._compute_dtype(x)))

    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        delta = self.settled(adapter_name)
        if self.parallel is None:
            return self._delta_product(x, delta(), delta.support)
        support, slots = self.parallel.shard.cut(delta.support)
        return self._delta_product(x, own_entries(delta(), slots, self.parallel.group), support)

    def whole_observer(self, observer: GradientObserver | None) -> GradientObserver | None:
        """An observer that sees the factors of the whole weight's gradient, of which this process forms a part."""
        if observer is None or self.parallel is None:
            return observer
        return WholeObserver(observer, self.parallel, lambda: list(self._joins.values()))

    # ------------------------------------------------------------------ mixed batches

    def _mixed_deltas_(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> None:
        names = tuple(sorted(name for name in set(adapter_names) if name in self.deltas))
        trains = torch.is_grad_enabled() and any(self.deltas[name].values.requires_grad for name in names)
        # FSDP2 gathers values anew in each pass: nothing tells whether they are those that a stack was made of
        stacks = isinstance(self.product, LinearProduct) and not (
            self._is_sharded() or self._is_partitioned() or self.parallel
        )
        if not names or trains or not stacks or self.stack_cls is None:
            super()._mixed_deltas_(result, x, adapter_names)
            return
        numbers = {name: number for number, name in enumerate(names)}
        order = BatchOrder.of(tuple(numbers.get(name, -1) for name in adapter_names), len(names), x.device)
        suits = self.stack_cls.suits(order, x[0, ..., 0].numel())
        stack = self._stacked(self.stack_cls, names, x) if suits else None
        if stack is None:
            super()._mixed_deltas_(result, x, adapter_names)
        else:
            stack.add_(result, x, order)

    def _stacked(self, kind: type[Stack], names: tuple[str, ...], x: Tensor) -> Stack | None:
        stack = self._stack
        if stack is None or not stack.serves(names, x):
            deltas = {name: self.settled(name) for name in names}
            with torch.no_grad(), torch.inference_mode(False):
                stack = self._stack = kind.of(deltas, self.product.in_dim, x.dtype)
        return stack

    # ------------------------------------------------------------------ merging

    def _merge(self, names: tuple[str, ...], safe_merge: bool) -> None:
        if self.quantization_backend is not None or not self.adds_entries_only:
            super()._merge(names, safe_merge)
            return
        delta, divided = self._join(names), self.divided
        if divided is None:
            weight, support, values = self.base_parameter, delta.support, self.sum_values(delta)
        else:
            weight, support = divided.own_rows(), delta.within(divided.shard).support
            values = values_of_own_rows([(self, delta)])[0]
        if safe_merge:
            entries = effective_entries(read_support(weight.detach(), support), values)
            self._check_merged(entries if divided is None else divided.worst_of(entries), names)

        def content(backup: EntriesBackup) -> Content:
            return Merged(names, backup.checksum())

        write_all([Write(self.ledger, weight, support, values.detach(), 1.0, content)])

    def _merges_parts(self) -> bool:
        return super()._merges_parts() or (self.adds_entries_only and self.divided is not None)

    def _add_deltas_(self, weight: Tensor, names: tuple[str, ...]) -> None:
        if not self.adds_entries_only:
            super()._add_deltas_(weight, names)
            return
        delta = self._join(names)
        add_to_support_(weight, delta.support, self.sum_values(delta))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's delta as a dense tensor of the stored weight's shape, in the values' dtype."""
        module = self.settled(adapter)
        dense = module.values.new_zeros(self.stored_shape)
        add_to_support_(dense, module.support, module())
        return dense.view(self.weight_shape)

    # ------------------------------------------------------------------ PEFT's and torch's bookkeeping

    @of_owner
    @transition
    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self._stack = None
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.rejoin()

    @of_owner
    @transition
    def delete_adapter(self, adapter_name: str) -> None:
        self._forget_joins(adapter_name)
        self._stack = None
        super().delete_adapter(adapter_name)

    @transition
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.parallel is not None and self.merged:
            raise RuntimeError(
                f"layer {self.name}: adapters {self.merged_adapters} are merged into a weight that tensor parallelism "
                "divides, which cannot be moved or cast then; unmerge_adapter() before"
            )
        self._stack = self._writable = None
        super()._apply(fn, recurse)
        self.rejoin()
        return self

    @exclusive
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, of the base's own weight, which no entries are written into while the result refers to it."""
        divided = self.divided
        if divided is None:
            self.release()
        state = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        key = f"{prefix}base_layer.weight"
        weight = state.get(key)
        if not isinstance(weight, Tensor) or weight is self.base_layer._parameters.get("weight"):
            return state
        if divided is None:
            self.ledger.keep_own_while(weight)
        elif not self.merged:  # without a transition, which all processes would have to take part in
            backup = self.ledger.backup
            state[key] = divided.own_weight(weight, backup if isinstance(backup, EntriesBackup) else None)
        return state

    @exclusive
    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self.ledger.is_shared() and not self.merged and self.resident and self.quantization_backend is None:
            state["_modules"] = {**self._modules, "base_layer": self._unwritten_base()}
        return {
            **state,
            "_writable": None,
            "_joins": {},
            "_unions": {},
            "_joined": None,
            "_stack": None,
            "_unwritten": None,
        }

    def _unwritten_base(self) -> nn.Module:
        """The base layer as it is copied or pickled while other threads infer, which then write nothing into it."""
        base = self.base_layer
        twin = base.__class__.__new__(base.__class__)
        twin.__dict__ = {**base.__dict__, "_parameters": dict(base._parameters)}
        twin._parameters["weight"] = cast("SparseTunerLayer[DeltaT]", self.owner)._unwritten_weight()
        return twin

    def _unwritten_weight(self) -> nn.Parameter:
        """The base weight as another parameter, in whose memory no entries are written while it is alive.

        Layers of one tied weight get the same parameter.
        """
        known = None if self._unwritten is None else self._unwritten()
        if known is not None:
            return known
        own = weight_of(self.base_layer)
        weight = nn.Parameter(own.detach(), requires_grad=own.requires_grad)
        self.ledger.keep_own_while(weight)
        self._unwritten = weakref.ref(weight)
        return weight

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own_key = new_key(self.matrices)  # a copy must not share the original's gradient observer
