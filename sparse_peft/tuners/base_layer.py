"""The base of all methods' layers: PEFT's layer contract, and forward passes that know what the weight holds."""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any, ClassVar, Concatenate, Generic, NamedTuple, ParamSpec, Self, TypeVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calibrate.partitions import is_partitioned
from ..compat import QuantizationBackend, quantization_extra_repr, resolve_quantization_backend
from ..dynamics.full_tensor import full_tensor
from ..dynamics.zero import keep_whole
from ..ops import CONVOLUTIONS, ConvProduct, EmbeddingProduct, LayerProduct, LinearProduct, is_convolution
from .active_delta import ActiveDelta
from .backups import SET_ASIDE, LayerBackup, PackedBackup, WeightBackup
from .base_config import BaseSparseConfig
from .base_state import TrainedState
from .delta_config import Resident
from .expert_weights import ExpertWeight
from .files.checks import BASE_ADAPTER
from .four_bit import base_weight
from .fully_sharded import FullySharded, LastingParameters
from .layer_parts import bias_of, weight_of
from .ledger import READERS, Ledger, Merged, Weight, transition
from .parallel import check_made_before_sharding, check_mergeable, check_not_partitioned
from .tensor_parallel import LocalParameters, TensorParallel, local_part
from .transitions import exclusive, exclusively

STOCK_FORWARDS = {nn.Linear.forward, nn.Embedding.forward, Conv1D.forward, *(kind.forward for kind in CONVOLUTIONS)}

StateT = TypeVar("StateT", bound=TrainedState)


class Step(NamedTuple):
    """One pass of a layer.

    Attributes:
        run: computes the output, from the arguments of ``forward``.
        wanted: what the base weight must hold for that.
    """

    run: Callable[..., Tensor]
    wanted: ActiveDelta | Weight


P = ParamSpec("P")
Layer = TypeVar("Layer", bound="TunerLayer[Any]")


def of_owner(method: Callable[Concatenate[Layer, P], None]) -> Callable[Concatenate[Layer, P], None]:
    """A method that changes a layer's adapters: nothing is left to do in other layers of the same tied weight."""

    @functools.wraps(method)
    def owners_method(layer: Layer, *args: P.args, **kwargs: P.kwargs) -> None:
        if layer.owner is layer:
            method(layer, *args, **kwargs)

    return owners_method


class TunerLayer(BaseTunerLayer, nn.Module, Generic[StateT]):
    """A base layer with the trained state of its adapters, whose parts are added to its output.

    Layers of one tied weight, as an embedding and the head, have common adapters: those of the first layer, the
    *owner*. The others compute with its adapters and its ledger, and PEFT's calls change the owner alone.

    Args:
        base_layer: ``nn.Linear``, ``nn.Conv1d`` to ``nn.Conv3d``, transformers' ``Conv1D``, a quantised linear layer
            that PEFT has a backend for, or ``nn.Embedding`` in layers that train it.
        name: the layer's full name in the model, for errors and for what is drawn at random.
        owner: the layer that has the adapters, if this one's weight is tied to that layer's.
        parallel: the part of the weight that this process has; None for the whole.

    A method's subclass names its ``config_cls``, from which the name of the container of trained states is derived,
    and defines an adapter's output and its weight.
    """

    config_cls: ClassVar[type[BaseSparseConfig]]
    resident: Resident = False  # whether the base weight may hold adapters' entries
    delta_container: ClassVar[str]  # the attribute with the adapters' states; starts with the method's prefix
    product: LayerProduct
    weight_shape: tuple[int, ...]  # of the base weight, (rows, cols) or a convolution's
    stored_shape: tuple[int, int]  # (rows, cols) of the base weight as a matrix
    takes_partitions: ClassVar[bool] = False  # whether ZeRO stage 3 may have partitioned the weight of a linear layer
    parallel: TensorParallel | None  # the part of it that this process has, where tensor parallelism divides it

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "config_cls" in cls.__dict__:
            cls.delta_container = f"{cls.config_cls.prefix()}adapter"
            cls.adapter_layer_names = (cls.delta_container,)

    def __init__(
        self,
        base_layer: nn.Module,
        name: str,
        owner: TunerLayer[StateT] | None = None,
        parallel: TensorParallel | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.base_layer = base_layer
        self.name = name
        self._owner = () if owner is None else (owner,)  # in a tuple: it is no submodule
        self.ledger: Ledger = Ledger(name) if owner is None else owner.ledger
        setattr(self, self.delta_container, nn.ModuleDict())
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        inputs, outputs = base.features if isinstance(base, ExpertWeight) else _get_in_out_features(base)
        assert inputs is not None and outputs is not None  # unknown only of layers that no method accepts
        self.in_features, self.out_features = inputs, outputs
        if isinstance(base, ExpertWeight):
            self.product = LinearProduct(base.in_dim)
            self.weight_shape = tuple(base.weight.shape)
            self.stored_shape = base.stored_shape
        elif isinstance(base, nn.Embedding):
            self.product = EmbeddingProduct.of(base)
            self.weight_shape = self.stored_shape = (inputs, outputs)
        elif is_convolution(base):
            self.product = ConvProduct.of(base)
            self.weight_shape = tuple(base.weight.shape)
            self.stored_shape = (self.weight_shape[0], base.weight[0].numel())
        else:
            in_dim = 0 if isinstance(base, Conv1D) else 1
            self.product = LinearProduct(in_dim)
            self.weight_shape = self.stored_shape = (outputs, inputs) if in_dim == 1 else (inputs, outputs)
        self._disable_adapters = False
        # whether set_adapter has frozen all adapters, and none was made to train since
        self._is_serving = False

    # ------------------------------------------------------------------ adapters

    @property
    def owner(self) -> TunerLayer[StateT]:
        """The layer that has the weight's adapters: itself, unless its weight is tied to another layer's."""
        return self._owner[0] if self._owner else self

    @property
    def deltas(self) -> Mapping[str, StateT]:
        """The adapters' trained state, ``{adapter name: state}``."""
        return cast("Mapping[str, StateT]", self.owner._modules[self.delta_container])

    @property
    def active_adapter(self) -> str | list[str]:
        return self.owner._active_adapter

    @property
    def disable_adapters(self) -> bool:
        return self.owner._disable_adapters

    @property
    def base_parameter(self) -> Tensor:
        """The base layer's weight, or what this process has of it."""
        # the usual case without get_base_layer's search, which every layer would pay for several times a pass
        base: Any = self._modules["base_layer"]
        weight = base._parameters.get("weight")
        if weight is not None:
            return cast("Tensor", weight if self.parallel is None else weight._local_tensor)
        return weight_of(base if "base_layer" not in base._modules else self.get_base_layer())

    @property
    def matrices(self) -> int:
        """The number of matrices that the weight consists of: its experts, one above the other; else 1."""
        base = self.base_layer
        return base.experts if isinstance(base, ExpertWeight) else 1

    @property
    def base_bias(self) -> Tensor | None:
        """The base layer's bias, or what this process has of it."""
        return bias_of(self.base_layer) if self.parallel is None else local_part(bias_of(self.base_layer))

    @property
    def held_shape(self) -> tuple[int, int]:
        """``(rows, cols)`` of ``base_parameter`` as a matrix."""
        return self.stored_shape if self.parallel is None else self.parallel.shard.local_shape

    @property
    def base_parameters(self) -> Mapping[str, Tensor | None]:
        """The parameters of the module that has the base weight, which is called ``"weight"`` here."""
        base: Any = self._modules["base_layer"]
        if self.parallel is not None:
            return LocalParameters(base)
        return base.by_name if isinstance(base, ExpertWeight) else cast("dict[str, Tensor | None]", base._parameters)

    @transition
    def add_delta(self, adapter_name: str, delta: StateT, *, init_weights: bool, inference_mode: bool) -> None:
        """Add an adapter's trained state to this layer and make it active if its name is."""
        self.release()
        if not init_weights:
            delta.randomise()
        if inference_mode:
            delta.requires_grad_(False)
        cast("nn.ModuleDict", self.deltas)[adapter_name] = delta
        self._place(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT moves again after a load with low_cpu_mem_usage; in the base's dtype float32 values would lose bits
        if adapter_name in self.deltas:
            self._place(adapter_name, device, self.deltas[adapter_name].trained_dtype)

    def _place(self, adapter_name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Move an adapter's state to a device and a dtype, those of the base layer by default.

        A state without memory stays on the meta device.
        """
        state = self.deltas[adapter_name]
        own_device, own_dtype = self.placement()
        if dtype is None and own_dtype is not None and own_dtype.is_floating_point:
            dtype = own_dtype
        waits = any(parameter.is_meta for parameter in state.parameters())
        state.to(device=None if waits else device or own_device, dtype=dtype)

    def placement(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype of the base layer, for adapters' states; None leaves them as they are."""
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if weight is None:
            weight = getattr(base, "qweight", None)  # GPTQ's
        dtype = getattr(base, "compute_dtype", getattr(weight, "dtype", None))
        return getattr(weight, "device", None), dtype

    def settled(self, adapter_name: str) -> StateT:
        """An adapter's trained state, of which nothing is left to be chosen."""
        return self.deltas[adapter_name]

    def _active_names(self) -> tuple[str, ...]:
        owner = self._owner[0] if self._owner else self
        active, deltas = owner._active_adapter, cast("Any", owner._modules[self.delta_container])._modules
        if isinstance(active, str):
            return (active,) if active in deltas else ()
        return tuple([name for name in active if name in deltas])

    # ------------------------------------------------------------------ the base layer

    def _is_hooked(self) -> bool:
        """Whether more happens in the base layer than its own forward: hooks, offloading, another tuner's layer."""
        base: Any = self._modules["base_layer"]
        return bool(
            base.__dict__.get("forward") is not (None if self.parallel is None else self.parallel.forward)
            or base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
            or isinstance(base, BaseTunerLayer)
        )

    def _base_is_stock(self, x: Tensor | None = None) -> bool:
        """Whether the base layer's forward (on ``x``) is a plain product with a frozen, ordinary weight."""
        base: Any = self._modules["base_layer"]
        if type(base).forward not in STOCK_FORWARDS:
            return False
        weight = base._parameters.get("weight")
        if weight is None:
            weight = weight_of(base)
        return (
            (type(weight) in (nn.Parameter, Tensor) or self.parallel is not None or self.divided is not None)
            and not (weight.requires_grad and torch.is_grad_enabled())
            and (
                x is None
                or x.dtype == weight.dtype
                or not x.is_floating_point()  # ids
                or torch.is_autocast_enabled(x.device.type)
            )
        )

    def _is_sharded(self) -> bool:
        """Whether FSDP shards the weight: what is gathered for a pass is a copy that comes and goes."""
        base: Any = self._modules["base_layer"]
        return base.__dict__.get("_is_fsdp_managed_module", False)

    def _is_partitioned(self) -> bool:
        """Whether ZeRO stage 3 has partitioned the weight: it is whole inside the base layer's own forward only."""
        base: Any = self._modules["base_layer"]
        return is_partitioned(base._parameters.get("weight"))

    def _enter_partitioned(self) -> None:
        """Refuse what cannot work with a partitioned weight; gather the adapters' parameters, which stay whole.

        Raises:
            NotImplementedError: this kind of layer.
            RuntimeError: DeepSpeed's engine, which gathers the weight, is not there.
        """
        base = self.base_layer
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"layer {self.name}: ZeRO stage 3 and adapters are not compiled together; do without torch.compile, "
                "or use ZeRO stage 1 or 2"
            )
        check_not_partitioned(self.name, base, type(self), type(self).__name__)
        if not base._forward_pre_hooks and weight_of(base).numel() == 0:
            raise RuntimeError(
                f"layer {self.name}: ZeRO stage 3 has partitioned its weight, which only DeepSpeed's engine gathers; "
                "call the engine that deepspeed.initialize or accelerator.prepare returns"
            )
        keep_whole(parameter for name in self.deltas for parameter in self.deltas[name].parameters())

    @property
    def divided(self) -> FullySharded | None:
        """The weight as FSDP2 divides it; None for a weight that is whole, or divided otherwise."""
        if not self._is_sharded() or self.parallel is not None:
            return None
        ledger = self.ledger
        if not ledger.knows_division:
            ledger.divided, ledger.knows_division = FullySharded.of(self.base_layer, self.stored_shape), True
        return ledger.divided

    def dense_base_weight(self) -> Tensor:
        """The base weight in floats as a matrix in its stored layout, for criteria to look at; whole."""
        if self.quantization_backend is not None:
            return self.dequantised()
        if self.parallel is not None:  # other processes have the other parts of this shape
            return full_tensor(weight_of(self.base_layer))
        if self._is_partitioned():
            return full_tensor(weight_of(self.base_layer)).reshape(self.stored_shape)
        return self.base_parameter.detach().reshape(self.stored_shape)

    def get_base_weight(self) -> Tensor:
        backend = self.quantization_backend
        return self.base_parameter.data if backend is None else base_weight(self.get_base_layer(), backend)

    def dequantised(self) -> Tensor:
        """The base weight as a fresh float tensor ``(out_features, in_features)``."""
        weight = self.get_base_weight()
        packed = getattr(self.get_base_layer(), "weight", None)
        return weight.clone() if packed is not None and weight.data_ptr() == packed.data_ptr() else weight

    # ------------------------------------------------------------------ forward

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype a plain linear layer would multiply in: autocast's where it is on."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
            return torch.get_autocast_dtype(kind)
        return x.dtype

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The layer's output; by the base layer alone where its weight holds all that the active adapters add."""
        if torch.compiler.is_compiling():
            return self.forward_step(x, adapter_names, bool(args or kwargs)).run(x, *args, **kwargs)
        ledger, me = self.ledger, get_ident()
        try:
            ledger.readers[me] = True  # from here on no other thread changes the weight or the adapters' flags
            if adapter_names is None and ledger.gives_output():
                if torch.is_grad_enabled():
                    run: Callable[..., Tensor] = self._held_pass(x, bool(args or kwargs))
                else:
                    run = self.base_layer
            else:
                run = self._next_step(x, adapter_names, bool(args or kwargs)).run
            result = run(x, *args, **kwargs)
            ledger.readers[me] = False
            return result
        except BaseException:
            ledger.readers[me] = False
            raise

    def _held_pass(self, x: Tensor, has_more: bool) -> Callable[..., Tensor]:
        """What a pass with gradients computes, where the weight holds all that the active adapters add."""
        return self._next_step(x, None, has_more).run

    def _next_step(self, x: Tensor, adapter_names: list[str] | None, has_more: bool) -> Step:
        """The step of a pass, with the weight as it wants it."""
        ledger, step = self.ledger, None
        turn = ledger.turn
        if not ledger.is_closed:
            step = self.forward_step(x, adapter_names, has_more)
            if ledger.holds(step.wanted):
                return step
        return exclusively(self._prepared_step, step, turn, x, adapter_names, has_more)

    def _prepared_step(
        self, step: Step | None, turn: int, x: Tensor, adapter_names: list[str] | None, has_more: bool
    ) -> Step:
        if step is None or turn != self.ledger.turn:  # another thread had the lock first
            step = self.forward_step(x, adapter_names, has_more)
        if not self.ledger.holds(step.wanted):
            self._prepare(step.wanted)
        return step

    def _prepare(self, wanted: ActiveDelta | Weight) -> None:
        """Make the weight hold what a step wants; called with the transitions' lock."""
        self.ledger.release()

    def forward_step(self, x: Tensor, adapter_names: list[str] | None, has_more: bool) -> Step:
        """What a pass computes now.

        Args:
            x: the input.
            adapter_names: of its items, in a mixed batch.
            has_more: whether the base layer is called with more than the input.
        """
        if self._is_partitioned():
            self._enter_partitioned()
        if self.disable_adapters:
            return Step(self._base_forward, Weight.OWN)
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
            return Step(partial(self._mixed_forward, adapter_names), Weight.OWN)
        if self.ledger.is_merged:
            return Step(self.base_layer, Weight.MERGED)
        names = self._active_names()
        return self.adapters_step(x, names, has_more) if names else Step(self._base_forward, Weight.OWN)

    def adapters_step(self, x: Tensor, names: tuple[str, ...], has_more: bool) -> Step:
        """What a pass of active adapters computes."""
        return Step(partial(self._added_forward, names), Weight.OWN)

    def _refuse_transforms(self) -> None:
        """Refuse ``torch.func``'s transforms, where a layer computes with operations that have none.

        Raises:
            RuntimeError: one is active.
        """
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"layer {self.name}: {type(self).__name__} has no torch.func.grad, vmap or other transform here; use "
                "autograd (loss.backward()) and batches, or merge_and_unload() the adapter"
            )

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer without any adapter."""
        return self.base_layer(x, *args, **kwargs)

    def _added_forward(self, names: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output and, added to it, what the adapters make of the input."""
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
            self._restore_dtypes(names)
        for name in names:
            result = result + self.adapter_output(x, name).to(result.dtype)
        return result

    @abstractmethod
    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """The part of the layer's output that one adapter adds for this input."""

    def _restore_dtypes(self, names: tuple[str, ...]) -> None:
        if self.training and torch.is_grad_enabled():
            for name in names:
                self.deltas[name].restore_dtype()

    def _check_mixed_batch(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_forward(self, adapter_names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with what each item's own adapter adds to it."""
        result = self.base_layer(x, *args, **kwargs).clone(memory_format=torch.contiguous_format)
        self._mixed_deltas_(result, x, adapter_names)
        return result

    def _mixed_deltas_(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> None:
        """Add to each item's result what its adapter makes of its input."""
        for name, rows in self._items_of(adapter_names, x.device):
            part = self.adapter_output(x.index_select(0, rows), name)
            result.index_add_(0, rows, part.to(result.dtype))

    def _replace_items_(
        self, result: Tensor, x: Tensor, adapter_names: list[str], output: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Put the whole output of each item's adapter in the place of its result, which is so rounded once."""
        for name, rows in self._items_of(adapter_names, x.device):
            result.index_copy_(0, rows, output(name, x.index_select(0, rows)).to(result.dtype))

    def _items_of(self, adapter_names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """The adapters of a mixed batch, each with the places of its items."""
        for name in dict.fromkeys(adapter_names):
            if name != BASE_ADAPTER and name in self.deltas:
                places = [i for i, other in enumerate(adapter_names) if other == name]
                yield name, torch.tensor(places, device=device)

    # ------------------------------------------------------------------ what the weight holds

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]  # an attribute in PEFT
        """The adapters in the base weight, in the order in which they were merged."""
        content = self.ledger.content
        return list(content.names) if isinstance(content, Merged) else []

    @exclusive
    def release(self) -> None:
        """Give the base weight its own entries back; merged adapters stay merged."""
        if not self.ledger.is_merged:
            self.ledger.release()

    @abstractmethod
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's delta as a dense tensor of the stored weight's shape, in its parameters' dtype."""

    @of_owner
    @transition
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight; ``unmerge`` gives every bit of it back.

        Args:
            safe_merge: check that the merged weights are finite before anything is written.
            adapter_names: adapters to merge; the active ones if None.

        Raises:
            ValueError: ``safe_merge`` found a value that is not finite, or the base's backend cannot be written.
            RuntimeError: something else wrote to the weight while other adapters were merged.
            NotImplementedError: other processes hold parts of the weight.
        """
        if self.quantization_backend is None and not self._merges_parts():
            check_mergeable(self.name, self.get_base_layer())
        new = tuple(name for name in check_adapters_to_merge(self, adapter_names) if name in self.deltas)
        if not new:
            return
        with torch.inference_mode(False), torch.no_grad(), self._unmerged() as merged:
            self._merge((*merged, *new), safe_merge)

    def _merges_parts(self) -> bool:
        """Whether processes merge into their parts of the weight."""
        return self.parallel is not None

    @contextmanager
    def _unmerged(self) -> Iterator[tuple[str, ...]]:
        """The base's own weight, into which after an error what was merged before is merged again."""
        merged = tuple(self.merged_adapters)
        self.ledger.check_merge()
        self.ledger.release()
        try:
            yield merged
        except Exception:
            if merged:
                self._merge(merged, safe_merge=False)
            raise

    def _merge(self, names: tuple[str, ...], safe_merge: bool) -> None:
        """Merge into the base's own weight. Keeps a copy of that: sums of floats round."""
        if self.quantization_backend is not None:
            self._merge_packed(self.quantization_backend, names, safe_merge)
            return
        layer = self.merged_layer(names)
        if layer is not None:
            self._merge_layer(layer, names, safe_merge)
            return
        weight, merged = self.base_parameter, self.merged_weight(names)
        if safe_merge:
            self._check_merged(merged, names)
        backup = WeightBackup(weight, weight.detach().clone())
        self.ledger.merge(backup, lambda: weight.detach().copy_(merged), names)

    def merged_weight(self, names: tuple[str, ...]) -> Tensor:
        """The base's own weight plus these adapters' deltas, as a new tensor in float32 or wider."""
        weight = self.base_parameter.detach()
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for name in names:
            merged += self.get_delta_weight(name).to(merged)
        return merged

    def merged_layer(self, names: tuple[str, ...]) -> nn.Module | None:
        """The ordinary layer that merging puts in place of a base layer without a weight; None if it has a weight."""
        return None

    def _merge_layer(self, merged: nn.Module, names: tuple[str, ...], safe_merge: bool) -> None:
        base = self.base_layer
        if safe_merge:
            self._check_merged(weight_of(merged).detach(), names)

        def replace() -> None:
            self._modules[SET_ASIDE] = base
            self._modules["base_layer"] = merged

        self.ledger.merge(LayerBackup(self, base), replace, names)

    def _check_merged(self, entries: Tensor, names: tuple[str, ...]) -> None:
        if not torch.isfinite(entries).all():
            broken = [
                name for name in names if not all(torch.isfinite(p).all() for p in self.deltas[name].parameters())
            ]
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(broken or names)} seems to be broken: "
                f"layer {self.name} has values that are not finite; use an earlier checkpoint"
            )

    def _merge_packed(self, backend: QuantizationBackend, names: tuple[str, ...], safe_merge: bool) -> None:
        if not backend.supports_merge:
            raise ValueError(
                f"layer {self.name}: a {backend.backend_name} base cannot be merged into; keep the adapter unmerged, "
                "or load the base in float16, bfloat16 or float32 to merge"
            )
        buffer = self.dequantised()
        self._add_deltas_(buffer, names)
        if safe_merge:
            self._check_merged(buffer, names)
        warnings.warn(
            f"Merging into a {backend.backend_name} base rounds the merged weight to the base's quantisation again; "
            "outputs may differ slightly from the unmerged adapter's. Unmerging gives the packed weight back exactly.",
            stacklevel=9,
        )
        backup = PackedBackup(self, self.get_base_layer())
        self.ledger.merge(backup, lambda: backend.set_base_weight(self, buffer), names)

    def _add_deltas_(self, weight: Tensor, names: tuple[str, ...]) -> None:
        """Add adapters' deltas to a dense copy of the base weight."""
        for name in names:
            weight += self.get_delta_weight(name).to(weight)

    @of_owner
    @transition
    def unmerge(self) -> None:
        """Give the base weight back as it was before any merge, bit for bit.

        Raises:
            RuntimeError: something else wrote to the weight while adapters were merged.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.ledger.check_merge()
        self.ledger.release()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # a sparse delta has full rank in general

    # ------------------------------------------------------------------ PEFT's and torch's bookkeeping

    @of_owner
    @transition
    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters of the layer the active ones, and (unless ``inference_mode``) the only trainable ones.

        Names of other layers' adapters are ignored. PEFT's own asks every module below every adapter, which costs too
        much where a model has many of them. From one call with ``inference_mode`` to the next, only adapters that
        were or become active are asked.
        """
        self.release()
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        is_serving = self._is_serving and inference_mode
        self._is_serving = False  # should this be interrupted
        for container in self.adapter_layer_names:
            states = getattr(self, container)._modules
            for name in {*self.active_adapters, *names} if is_serving else tuple(states):
                trains, state = name in names and not inference_mode, states.get(name)
                if state is None:
                    continue
                trains = trains and not self._is_left_out(state)
                for parameter in self._flagged(state):
                    if parameter.requires_grad != trains and parameter.is_leaf:
                        parameter.requires_grad_(trains)
        self._active_adapter = names
        self._is_serving = inference_mode

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self._is_serving = False
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names if requires_grad else ():
            self.check_trainable(name)
        super().set_requires_grad(adapter_names, requires_grad)

    def check_trainable(self, adapter_name: str) -> None:
        """Refuse to train an adapter that came after FSDP.

        Raises:
            NotImplementedError: names the adapter, the layer and the alternative.
        """
        if adapter_name in self.deltas and self._is_left_out(self.deltas[adapter_name]):
            check_made_before_sharding(self.name, self, adapter_name)

    def _is_left_out(self, state: nn.Module) -> bool:
        """Whether an adapter came after FSDP, which averages none of its gradients."""
        return self._is_sharded() and not state.__dict__.get("_is_fsdp_managed_module", False)

    def _flagged(self, state: nn.Module) -> Iterable[Tensor]:
        """The parameters that say whether they need gradients: of FSDP2's the gathered and the divided ones."""
        if not self._is_sharded():
            return state.parameters() if state._modules else state._parameters.values()  # type: ignore[return-value]
        lasting = [part for module in state.modules() for part in LastingParameters(module).values()]
        return [*state.parameters(), *(parameter for parameter in lasting if parameter is not None)]

    @of_owner
    @transition
    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's; merged adapters that are disabled are unmerged."""
        if not enabled and self.merged:
            self.unmerge()
        self.release()
        if enabled or not self._is_sharded():
            super().enable_adapters(enabled)
        else:  # FSDP takes the flags of its parameters from one another when it gathers them
            self._disable_adapters = True

    @of_owner
    @transition
    def delete_adapter(self, adapter_name: str) -> None:
        self.release()
        super().delete_adapter(adapter_name)

    @transition
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.release()
        was_unchanged = self.ledger.begin_move()
        super()._apply(fn, recurse)
        self.ledger.moved(was_unchanged)
        return self

    def _replicate_for_data_parallel(self) -> Self:
        # replicas have copies of weights that may hold entries, and one ledger, which knows the original only
        raise RuntimeError(
            f"layer {self.name}: nn.DataParallel cannot replicate layers with adapters of this package; start one "
            "process for each GPU (torchrun or accelerate launch, for DistributedDataParallel), or let the process "
            "see one GPU only (CUDA_VISIBLE_DEVICES=0)"
        )

    @transition
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    @exclusive
    def __getstate__(self) -> dict[str, Any]:
        self.release()
        return self.__dict__.copy()

    def extra_repr(self) -> str:
        return f"weight of {self.owner.name}" if self._owner else quantization_extra_repr(self)

    def __repr__(self) -> str:
        return f"sparse_peft.{super().__repr__()}"


READERS.add(TunerLayer.forward.__code__)
