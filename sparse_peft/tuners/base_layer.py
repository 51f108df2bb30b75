"""What the layers of all methods share: PEFT's layer contract."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops import CONVOLUTIONS, ConvProduct, LayerProduct, LinearProduct, is_convolution
from .base_config import BaseSparseConfig
from .base_state import TrainedState
from .files.checks import BASE_ADAPTER
from .four_bit import base_weight
from .layer_parts import bias_of, weight_of
from .packed_weight import PackedWeight

if TYPE_CHECKING:
    from .residency import Residency, Write

STOCK_FORWARDS = {nn.Linear.forward, Conv1D.forward, *(kind.forward for kind in CONVOLUTIONS)}
SET_ASIDE = "set_aside"  # the module that what stands in a weight's place is kept as, while a merged weight does

StateT = TypeVar("StateT", bound=TrainedState)


class TunerLayer(BaseTunerLayer, nn.Module, Generic[StateT]):
    """A base layer with the trained state of its adapters, whose parts are added to its output.

    Args:
        base_layer: ``nn.Linear``, ``nn.Conv1d`` to ``nn.Conv3d``, transformers' ``Conv1D``, or a quantised linear
            layer that PEFT has a backend for.
        name: the layer's full name in the model, for errors and for what is drawn at random.

    A method's subclass names its ``config_cls``, from which the name of the container of trained states is derived,
    and defines an adapter's output and its weight.
    """

    config_cls: ClassVar[type[BaseSparseConfig]]
    resident: bool = False  # whether the base weight may hold adapters' entries between steps
    delta_container: ClassVar[str]  # the attribute with the adapters' states; starts with the method's prefix
    product: LayerProduct
    weight_shape: tuple[int, ...]  # of the base weight, (rows, cols) or a convolution's
    stored_shape: tuple[int, int]  # (rows, cols) of the base weight as a matrix

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "config_cls" in cls.__dict__:
            cls.delta_container = f"{cls.config_cls.prefix()}adapter"
            cls.adapter_layer_names = (cls.delta_container,)

    def __init__(self, base_layer: nn.Module, name: str, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        setattr(self, self.delta_container, nn.ModuleDict())
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        inputs, outputs = _get_in_out_features(base)
        assert inputs is not None and outputs is not None  # unknown only of layers that no method accepts
        self.in_features, self.out_features = inputs, outputs
        if is_convolution(base):
            self.product = ConvProduct.of(base)
            self.weight_shape = tuple(base.weight.shape)
            self.stored_shape = (self.weight_shape[0], base.weight[0].numel())
        else:
            in_dim = 0 if isinstance(base, Conv1D) else 1
            self.product = LinearProduct(in_dim)
            self.weight_shape = self.stored_shape = (outputs, inputs) if in_dim == 1 else (inputs, outputs)
        self._disable_adapters = False
        self.merged_adapters = []
        self._packed: PackedWeight | None = None
        self._unmerged: Tensor | None = None

    # ------------------------------------------------------------------ adapters

    @property
    def deltas(self) -> Mapping[str, StateT]:
        """``{adapter name: trained state}`` of the adapters."""
        return cast("Mapping[str, StateT]", self._modules[self.delta_container])

    @property
    def base_parameter(self) -> Tensor:
        # the usual case without get_base_layer's search, which every layer would pay for several times a pass
        base = self._modules["base_layer"]
        assert base is not None
        return weight_of(base if "base_layer" not in base._modules else self.get_base_layer())

    @property
    def base_bias(self) -> Tensor | None:
        return bias_of(self.base_layer)

    def add_delta(self, adapter_name: str, delta: StateT, *, init_weights: bool, inference_mode: bool) -> None:
        """Add an adapter's trained state to this layer and make it active if its name is."""
        self.release()
        if not init_weights:
            delta.randomise()
        getattr(self, self.delta_container)[adapter_name] = delta
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def settled(self, adapter_name: str) -> StateT:
        """An adapter's trained state, of which nothing is left to be chosen."""
        return self.deltas[adapter_name]

    def _active_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.active_adapters if name in self.deltas)

    # What layers do that let the base weight hold adapters' entries; see SparseTunerLayer.

    def held_weight(self) -> tuple[Residency, Tensor] | None:
        return None

    def pending_write(self) -> Write | None:
        return None

    def release(self) -> None:
        """Give the base weight its own entries back; merged adapters stay merged."""

    # ------------------------------------------------------------------ the base layer

    def _is_hooked(self) -> bool:
        """Whether more happens in the base layer than its own forward: hooks, offloading, another tuner's layer."""
        base = self.base_layer
        return bool(
            "forward" in base.__dict__
            or base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
            or isinstance(base, BaseTunerLayer)
        )

    def _base_is_stock(self, x: Tensor | None = None) -> bool:
        """Whether the base layer's forward (on ``x``) is a plain product with a frozen, ordinary weight."""
        base = self.base_layer
        if type(base).forward not in STOCK_FORWARDS:
            return False
        weight = weight_of(base)
        return (
            type(weight) in (nn.Parameter, Tensor)
            and not (weight.requires_grad and torch.is_grad_enabled())
            and (x is None or x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
        )

    def _is_sharded(self) -> bool:
        """Whether FSDP2 shards the weight: what is gathered for a pass is a copy that comes and goes."""
        return getattr(self.base_layer, "_is_fsdp_managed_module", False)

    def dense_base_weight(self) -> Tensor:
        """The base weight in floats as a matrix in its stored layout, for criteria to look at."""
        if self.quantization_backend is not None:
            return self.dequantised()
        return self.base_parameter.detach().reshape(self.stored_shape)

    def get_base_weight(self) -> Tensor:
        backend = self.quantization_backend
        return super().get_base_weight() if backend is None else base_weight(self.get_base_layer(), backend)

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

    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """What one adapter adds to the layer's output for this input."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        names = () if self.merged else self._active_names()
        if names and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
            self._restore_dtypes(names)
        for name in names:
            result = result + self.adapter_output(x, name).to(result.dtype)
        return result

    def _restore_dtypes(self, names: tuple[str, ...]) -> None:
        if self.training and torch.is_grad_enabled():
            for name in names:
                self.deltas[name].restore_dtype()

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        self.release()
        result = self.base_layer(x, *args, **kwargs).clone(memory_format=torch.contiguous_format)
        self._mixed_deltas_(result, x, adapter_names)
        return result

    def _mixed_deltas_(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> None:
        """Add to each item's result what its adapter makes of its input."""
        for name in dict.fromkeys(adapter_names):
            if name == BASE_ADAPTER or name not in self.deltas:
                continue
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            part = self.adapter_output(x.index_select(0, rows), name)
            result.index_add_(0, rows, part.to(result.dtype))

    # ------------------------------------------------------------------ merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's delta as a dense tensor of the stored weight's shape, in its parameters' dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight; ``unmerge`` gives every bit of it back.

        Args:
            safe_merge: check that the merged weights are finite before anything is written.
            adapter_names: adapters to merge; the active ones if None.

        Raises:
            ValueError: ``safe_merge`` found a value that is not finite, or the base's backend cannot be written.
        """
        names = tuple(name for name in check_adapters_to_merge(self, adapter_names) if name in self.deltas)
        if not names:
            return
        self.release()
        with torch.inference_mode(False), torch.no_grad():
            self._merge(names, safe_merge)
        self.merged_adapters.extend(names)

    def _merge(self, names: tuple[str, ...], safe_merge: bool) -> None:
        """Merge, besides those that are merged already. Keeps the base weight as it was: sums of floats round."""
        if self.quantization_backend is not None:
            return self._merge_packed(self.quantization_backend, names, safe_merge)
        weight = self.base_parameter
        own = weight.detach() if self._unmerged is None else self._unmerged
        merged = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
        for name in (*self.merged_adapters, *names):
            merged += self.get_delta_weight(name).to(merged)
        if safe_merge:
            self._check_merged(merged, names)
        if self._unmerged is None:
            self._unmerged = weight.detach().clone()
        weight.copy_(merged)

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
        if self._packed is not None:
            self._packed.restore(self)
        buffer = self.dequantised()
        self._add_deltas_(buffer, (*self.merged_adapters, *names))
        if safe_merge:
            self._check_merged(buffer, names)
        warnings.warn(
            f"Merging into a {backend.backend_name} base rounds the merged weight to the base's quantisation again; "
            "outputs may differ slightly from the unmerged adapter's. Unmerging gives the packed weight back exactly.",
            stacklevel=5,
        )
        self._packed = self._packed or PackedWeight(self)
        self.set_base_weight(buffer)

    def _add_deltas_(self, weight: Tensor, names: tuple[str, ...]) -> None:
        """Add adapters' deltas to a dense copy of the base weight."""
        for name in names:
            weight += self.get_delta_weight(name).to(weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base weight back as it was before any merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        if self._packed is not None:
            self._packed.restore(self)
            self._packed = None
        if self._unmerged is not None:
            self.base_parameter.copy_(self._unmerged)
            self._unmerged = None
        self.release()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # a sparse delta has full rank in general

    # ------------------------------------------------------------------ PEFT's and torch's bookkeeping

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters of the layer the active ones, and (unless ``inference_mode``) the only trainable ones.

        Any that it does not have are none of its business. PEFT's own asks every module below every adapter, which
        whoever serves many adapters would pay for in each switch.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for container in self.adapter_layer_names:
            for name, state in getattr(self, container)._modules.items():
                trains = name in names and not inference_mode
                for parameter in state.parameters() if state._modules else state._parameters.values():
                    if parameter.requires_grad != trains and parameter.is_leaf:
                        parameter.requires_grad_(trains)
        self._active_adapter = names

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        module = super()._apply(fn, recurse)
        if self._unmerged is not None:
            self._unmerged = fn(self._unmerged)
        return module

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return f"sparse_peft.{super().__repr__()}"
