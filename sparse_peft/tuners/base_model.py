"""The base of all methods' tuners: PEFT's model contract."""

from __future__ import annotations

import copy
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import _ExcludedModule
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, _get_submodules
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..calibrate.weights import check_no_shared_weights
from ..compat import BaseTuner, get_quantization_kwargs
from ..ops import Combination, kernel_backend, kernels_possible
from ..support import Support
from .base_config import BaseSparseConfig
from .base_layer import TunerLayer
from .base_state import TrainedState
from .combination import Tensors, add_weighted_adapter
from .controller_warning import require_controller
from .delta_layer import SparseTunerLayer
from .experts import check_bare_weights, is_named
from .files.accepted_tensors import accept_tensors, named_states
from .files.adapter_file import check_claimed_sizes, loaded_config_fields
from .files.adapter_state import put_states, take_states
from .files.card import TAG
from .files.checks import check_adapter_name
from .forms import LoraFactors, weightless_layer
from .four_bit import prepare_four_bit
from .mixed_batches import mixed_batch
from .parallel import check_made_before_sharding
from .residency import hold_layers, release_layers
from .shared_memory import check_no_other_model, note_adapted, note_unloaded
from .targets import (
    Targets,
    base_of,
    check_is_base,
    check_names,
    check_target,
    experts_among,
    find_targets,
    hold_experts,
    layer_of,
    own_weights,
    release_empty_experts,
    which_layers,
)
from .tensor_parallel import TensorParallel
from .ties import check_not_saved_whole, owners_of, tied_layers
from .traversal import first_parameter, modules_beside_adapters, tuner_layers
from .zeros import warn_of_filled_zeros, zeros_of_layers


class StatePlan(Protocol):
    """How one layer's trained state is made."""

    def make_delta(self, name: str) -> TrainedState:
        """The trained state of the layer of this name."""
        ...


ConfigT = TypeVar("ConfigT", bound=BaseSparseConfig)
StateT = TypeVar("StateT", bound=TrainedState)


def _divided_layers_of(reference: weakref.ref[BaseSparseModel[Any, Any]]) -> list[SparseTunerLayer[Any]]:
    model = reference()
    return [] if model is None else model._divided_layers()


def _hold_early(
    reference: weakref.ref[BaseSparseModel[Any, Any]], module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    """Before FSDP2's outermost module gathers its weights."""
    model, layers = reference(), _divided_layers_of(reference)
    if model is not None and layers:
        model._hold_before_gathering(layers, kwargs.get("adapter_names"))


class BaseSparseModel(BaseTuner, Generic[ConfigT, StateT]):
    """Base of the sparse methods' tuners, generic in the method's config and trained state.

    A method's subclass names its ``layer_cls``, from which PEFT's class attributes are derived, and says in
    ``plan_layers`` what each target layer trains.
    """

    layer_cls: ClassVar[type[TunerLayer[Any]]]
    embedding_cls: ClassVar[type[TunerLayer[Any]] | None] = None  # None: the method trains no embeddings
    takes_groups = True  # whether convolutions of several groups, which are no one matrix, can be targets
    why_no_convolutions: ClassVar[str | None] = None  # None: the method trains convolutions
    counted_tensor = "values"  # which of a layer's tensors in a file says by its size what the layer trains
    _called_by: int | None = None  # FSDP2's outermost module, which lets this model write before it gathers
    needs_base_weights = False  # whether what an adapter adds is a function of its base's weights as well
    target_module_mapping: dict[str, list[str]] = cast(
        "dict[str, list[str]]", TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "layer_cls" in cls.__dict__:
            cls.tuner_layer_cls = cls.layer_cls
            cls.prefix = cls.layer_cls.config_cls.prefix()

    @abstractmethod
    def plan_layers(
        self, config: ConfigT, targets: Targets, adapter_name: str, file_entries: dict[str, int] | None
    ) -> Mapping[str, StatePlan]:
        """What each target layer trains.

        Args:
            config: the new adapter's config; what is resolved here is recorded in it.
            targets: ``{layer name: module}``.
            adapter_name: the new adapter's name.
            file_entries: ``{layer name: entries}`` of the adapter file the layers are made for, if that is known.
        """

    @classmethod
    def resolve_sizes(cls, config: ConfigT, model: nn.Module) -> None:
        """Record in the config how much each layer trains, where that is long before what it trains is known.

        An adapter made from it then waits for its positions, as one whose file is still to come: for plans on models
        without weights. Methods that choose whole structures have nothing to gain from it.
        """

    @property
    def configs(self) -> dict[str, ConfigT]:
        """``{adapter name: config}`` of the model's adapters."""
        return cast("dict[str, ConfigT]", self.peft_config)

    def check_configs(self) -> None:
        """Refuse configs that one model cannot have together, the new adapter's among them.

        Raises:
            ValueError: names the field.
        """

    def twin_of(self, config: BaseSparseConfig, adapter_name: str) -> str | None:
        """The adapter that was made with the very same config object: it trains the same positions.

        TRL adds its reference adapter with the policy's own config.
        """
        names = (name for name, other in self.configs.items() if other is config and name != adapter_name)
        return next(names, None)

    def twin_supports(self, config: BaseSparseConfig, targets: Targets, adapter_name: str) -> dict[str, Support]:
        """The positions of such an adapter; none where it has not all targets."""
        twin = self.twin_of(config, adapter_name)
        supports = {
            name: module.support(twin)
            for name, module in targets.items()
            if isinstance(module, SparseTunerLayer) and twin is not None and twin in module.deltas
        }
        return supports if len(supports) == len(targets) else {}

    def first_sizes(
        self,
        config: ConfigT,
        targets: Targets,
        adapter_name: str,
        *,
        in_file: dict[str, int] | None,
        recorded: str,
        choose: Callable[[], tuple[dict[str, int], Mapping[str, Support]]],
        size: Callable[[Any], int] = attrgetter("nnz"),
    ) -> tuple[dict[str, int], Mapping[str, Support]]:
        """How much each layer trains, and what, from the first source that there is.

        The sources: the adapter's twin, positions given with the config, a file, sizes recorded in the config, a new
        choice.

        Args:
            config: of the new adapter.
            targets: its layers.
            adapter_name: its name.
            in_file: ``{layer name: size}`` in the file that the layers are made for.
            recorded: the config's field with ``{layer name: size}``.
            choose: gives sizes and, where they can be known now, supports.
            size: of a layer, given its support.

        Returns:
            ``{layer name: size}`` and ``{layer name: support}``, empty where positions come later.

        Raises:
            ValueError: a source is for other layers than the targets.
        """
        given = self.twin_supports(config, targets, adapter_name) or config.supports
        if given:
            check_names(config, set(given), set(targets), "the positions chosen by select_support are for")
            return {name: size(given[name]) for name in targets}, given
        if in_file is not None:
            return {name: in_file[name] for name in targets}, {}
        sizes = getattr(config, recorded)
        if sizes is not None:
            check_names(config, set(sizes), set(targets), f"{recorded} is for")
            return {name: sizes[name] for name in targets}, {}
        return choose()

    @classmethod
    def choose_from_data(
        cls,
        model: nn.Module,
        config: ConfigT,
        targets: Targets,
        data: Iterable[Any] | None,
        gradients: dict[str, Tensor] | None,
        *,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None,
        oversample: float,
    ) -> Mapping[str, Support]:
        """Each target's positions; the arguments are those of [`select_support`][sparse_peft.select_support], checked.

        For methods with criteria that look at data.
        """
        raise TypeError(f"{cls.__name__} chooses nothing from data")

    # ------------------------------------------------------------------ injection

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        # diffusers' models have no model_type; their class does as well
        kind = model_config.get("model_type", type(self.model).__name__)
        if peft_config.names_experts and peft_config.target_modules is None and kind not in self.target_module_mapping:
            peft_config.target_modules = []
        return super()._prepare_adapter_config(peft_config, {"model_type": kind})

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name)
        self._injection = (adapter_name, kwargs.get("state_dict"))
        self._plans: Mapping[str, StatePlan] = {}
        self._ties: list[Targets] = []
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del self._injection, self._plans, self._ties
            release_empty_experts(model)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # budgets are shared between layers, so all of them are planned before PEFT creates the first
        check_is_base(model)
        self.check_configs()
        adapter_name, state_dict = self._injection
        targets = self.find_targets(peft_config, model, state_dict)
        self._ties = self._tied_layers(model)
        check_bare_weights(peft_config, model, targets)
        if not peft_config.inference_mode:
            for name, module in targets.items():
                if isinstance(module, TunerLayer):
                    check_made_before_sharding(name, module, adapter_name)
        self.check_targets(model, targets)
        new = {name: module for name, module in targets.items() if not isinstance(module, TunerLayer)}
        check_no_other_model(model, own_weights(new), bool(self.layer_options(peft_config).get("resident")))
        prepare_four_bit(modules_beside_adapters(model))
        self.release()
        check_claimed_sizes(peft_config, targets)
        if targets:
            self._plans = self.plan_layers(peft_config, targets, adapter_name, self.file_sizes(state_dict))
            peft_config.recommended_rate = peft_config.suited_rate()
            check_claimed_sizes(peft_config, targets)  # sizes that the config left open are resolved now
            if peft_config.target_experts:
                peft_config.target_parameters = experts_among(targets)
            hold_experts(model, targets)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        # PEFT warns of tied targets, which are one target here; tied modules that are saved whole remain
        if self.embedding_cls is not None:
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = []
        super()._check_tied_modules(model, peft_config)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return super()._get_tied_target_modules(model) if self.embedding_cls is None else []

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]  # static there
        found = super()._check_target_module_exists(peft_config, key)
        return found if isinstance(found, _ExcludedModule) else key in self._plans

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        # experts' parameters were injected as layers
        names = [name for name in self._plans if is_named(peft_config.target_parameters, name)]
        self.targeted_parameter_names += [name for name in names if name not in self.targeted_parameter_names]
        return names

    @classmethod
    def checked_targets(cls, config: ConfigT, model: nn.Module) -> Targets:
        """The layers that PEFT will adapt for this config, whose default target modules are filled in.

        Raises:
            TypeError, ValueError: there are none, some that cannot be, or the model has an adapter already.
        """
        check_is_base(model)
        if config.target_modules is None:
            model_type = BaseTuner.get_model_config(model).get("model_type")
            none: list[str] | None = [] if config.names_experts else None
            config.target_modules = cls.target_module_mapping.get(str(model_type), none)
            if config.target_modules is None:
                raise ValueError(f"target_modules: none given, and none is known for model type {model_type!r}")
        targets = cls.find_targets(config, model)
        if not targets:
            raise ValueError(
                f"target_modules={config.target_modules!r} match no layer of {type(model).__name__}"
                f"{which_layers(config, model)}"
            )
        cls.check_targets(model, targets)
        return targets

    @classmethod
    def find_targets(
        cls, config: BaseSparseConfig, model: nn.Module, state_dict: dict[str, Tensor] | None = None
    ) -> Targets:
        """The layers that PEFT will adapt for this config, by name, in the model's order.

        Layers with one tied weight are one target, under the name of the first, where the method trains embeddings.
        """
        targets, ties = find_targets(config, model, cls.prefix, state_dict), cls._tied_layers(model)
        check_not_saved_whole(config, model, targets, ties)
        return owners_of(config, model, targets, ties)

    @classmethod
    def _tied_layers(cls, model: nn.Module) -> list[Targets]:
        """The layers that may have one weight in common."""
        return [] if cls.embedding_cls is None else tied_layers(model)

    @classmethod
    def check_targets(cls, model: nn.Module, targets: Targets) -> None:
        """Refuse layers of other kinds, and weights that something else uses too.

        Raises:
            TypeError: a target is no linear layer, or is quantised in a way that PEFT has no backend for.
            ValueError: a target's weight is shared.
        """
        for name, module in targets.items():
            check_target(
                name,
                module,
                model,
                cls.layer_class_of(module),
                cls.__name__,
                takes_groups=cls.takes_groups,
                why_no_convolutions=cls.why_no_convolutions,
                takes_embeddings=cls.embedding_cls is not None,
            )
        check_no_shared_weights(model, own_weights(targets), cls._tied_layers(model))

    @classmethod
    def file_sizes(cls, state_dict: dict[str, Tensor] | None) -> dict[str, int] | None:
        """``{layer name: entries of its counted_tensor}`` in an adapter file; None without one."""
        if state_dict is None:
            return None
        return {
            layer_of(key, cls.prefix): value.numel()
            for key, value in state_dict.items()
            if key.endswith(f".{cls.counted_tensor}") and f".{cls.prefix}" in key
        }

    @classmethod
    def layer_class_of(cls, target: nn.Module) -> type[TunerLayer[Any]]:
        """The class of a target's layer."""
        takes_it = cls.embedding_cls is not None and isinstance(base_of(target), nn.Embedding)
        return cast("type[TunerLayer[Any]]", cls.embedding_cls) if takes_it else cls.layer_cls

    @classmethod
    def layer_options(cls, config: ConfigT) -> dict[str, Any]:
        """Arguments of the layer class besides base layer and name."""
        return {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        plan = self._plans[current_key]
        if isinstance(target, TunerLayer):
            layer = target
        else:
            layer = self._new_layer(peft_config, target, current_key)
            layer._active_adapter = adapter_name
            note_adapted(layer)
        state = plan.make_delta(current_key)
        peft_config.equip(state)
        layer.add_delta(
            adapter_name,
            state,
            init_weights=peft_config.init_weights,
            inference_mode=peft_config.inference_mode,
        )
        if peft_config.changes_in_training and not peft_config.inference_mode:
            require_controller(layer.deltas[adapter_name], peft_config.controller_role)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter is not trained before it is made active
            self._replace_module(parent, target_name, layer, target)
            self._tie(peft_config, layer)

    def _new_layer(
        self, config: Any, base: nn.Module, name: str, owner: TunerLayer[Any] | None = None
    ) -> TunerLayer[Any]:
        kind, options = self.layer_class_of(base), self.layer_options(config)
        parallel = TensorParallel.of(self.model, name, base)
        if parallel is not None and config.bias != "none":
            raise NotImplementedError(
                f"bias={config.bias!r}: tensor parallelism (tp_plan) divides the biases of layer {name} and others, "
                'which stay frozen then; use bias="none", FSDP2 or DDP'
            )
        return kind(base, name, owner=owner, parallel=parallel, **options, **get_quantization_kwargs(self.model))

    def _tie(self, config: Any, owner: TunerLayer[Any]) -> None:
        """Put the other layers with the owner's weight into layers that compute with its adapters."""
        for name, base in next((group for group in self._ties if owner.name in group), {}).items():
            if name != owner.name:
                parent, _, attribute = _get_submodules(self.model, name)
                setattr(parent, attribute, self._new_layer(config, base, name, owner))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version also assigns the child's weight to whatever replaces it, which fails for a child whose weight
        # is computed (a trained token embedding being merged); a replacement here is a layer or a base, with its own
        for module in child.modules():  # experts have several layers in one module
            if isinstance(module, TunerLayer):
                note_unloaded(module)
        setattr(parent, child_name, new_module)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        tags = list(getattr(model, "model_tags", None) or [])
        if TAG not in tags:
            cast("Any", model).model_tags = [*tags, TAG]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for layer in self.sparse_layers(self.model):
            if adapter_name in layer.deltas:
                layer.deltas[adapter_name].keep_dtype()

    sparse_layers = staticmethod(tuner_layers)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters, which add up, or none for an empty list.

        Args:
            adapter_name: one, several, or none.
            inference_mode: leave them frozen.
        """
        self.release()
        for module in modules_beside_adapters(self.model):
            if isinstance(module, TunerLayer):
                if module.merged:
                    warnings.warn(
                        f"layer {module.name}: adapters {module.merged_adapters} are merged; they are unmerged, and "
                        f"{adapter_name!r} is activated beside the base weight",
                        stacklevel=2,
                    )
                    module.unmerge()
                module.set_adapter(adapter_name, inference_mode=inference_mode)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                name = module.check_set_adapter(adapter_name) if adapter_name else None
                known: str | list[str] = [] if name is None or name not in module._adapters else name
                module.set_adapter(known, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of the model. As PEFT's, but it asks nothing of the model's other adapters.

        Raises:
            ValueError: there is no such adapter, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        modules = list(modules_beside_adapters(self.model))
        layers = [module for module in modules if isinstance(module, TunerLayer)]
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        del self.peft_config[adapter_name]
        for layer in layers:
            layer.delete_adapter(adapter_name)
        active = layers[0].active_adapters[:] if layers else []
        for module in modules:
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, new_active_adapters=active)
        self.active_adapter = active

    # ------------------------------------------------------------------ mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` of a mixed batch to the layers, for the duration of one call.

        A call that fails leaves no base weight holding an adapter's entries.
        """
        names = kwargs.pop("adapter_names", None)
        if torch.compiler.is_compiling() and names is None:
            yield
            return
        divided = self._divided_layers()
        try:
            if divided:
                self._hold_before_gathering(divided, names)
            elif names is None and self._writes_together():
                self.make_resident()
            with nullcontext() if names is None else mixed_batch(self, names, kwargs.get("num_beams") or 1):
                yield
        except BaseException:
            if not divided:  # else all processes would have to take part
                self.release()
            raise

    def _divided_layers(self) -> list[SparseTunerLayer[Any]]:
        """The layers whose weights FSDP2 divides."""
        if not (dist.is_available() and dist.is_initialized()):
            return []
        layers = (layer for layer in tuner_layers(self.model) if isinstance(layer, SparseTunerLayer))
        return [layer for layer in layers if layer.divided is not None]

    def _hold_before_gathering(self, layers: list[SparseTunerLayer[Any]], names: list[str] | None) -> None:
        """Make the processes' parts of weights hold what a pass is going to gather.

        A module that gathered weights before this model's own pass began calls this itself from then on.

        Args:
            layers: ``_divided_layers()``.
            names: of a mixed batch.
        """
        reference = weakref.ref(self)
        for layer in layers:
            assert layer.divided is not None
            layer.divided.siblings = partial(_divided_layers_of, reference)
        assert layers[0].divided is not None
        root = layers[0].divided.root_in_a_pass()
        if root is not None and self._called_by != id(root):
            self._called_by = id(root)
            for module in root._modules:
                module.register_forward_pre_hook(partial(_hold_early, reference), prepend=True, with_kwargs=True)
        if names is None:
            hold_layers(layers)
        else:
            release_layers(layer.ledger for layer in layers)

    def release(self) -> None:
        """Give every base weight its own entries back; the next forward pass writes the adapter's anew."""
        release_layers(layer.ledger for layer in tuner_layers(self.model))

    def make_resident(self) -> None:
        """Write the active adapters' entries into the base weights now instead of in the next forward pass.

        For servers that want a switch to be over before the next request; layers that cannot hold entries are left.
        """
        hold_layers(layer for layer in tuner_layers(self.model) if isinstance(layer, SparseTunerLayer))

    def _writes_together(self) -> bool:
        """Whether the entries of all layers are written before the first layer's pass.

        In training, that is one transition of the weights in place of one for each layer; on a GPU it is one launch.
        In inference on a CPU there is nothing to write, as a rule, and each layer sees that for itself.
        """
        first = first_parameter(self.model)
        if first is None or not (torch.is_grad_enabled() or kernels_possible(first.device)):
            return False
        layer = next(self.sparse_layers(self.model), None)
        if not isinstance(layer, SparseTunerLayer) or layer.quantization_backend is not None:
            return False
        if torch._C._are_functorch_transforms_active():
            return False  # passes that are transformed compute with copies
        weight = layer.base_parameter
        return torch.is_grad_enabled() or kernel_backend("write_many", weight.dtype, weight.device) is not None

    # ------------------------------------------------------------------ after training

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        self.release()
        zeros = zeros_of_layers(self.model) if merge else {}
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)  # None in PEFT's annotation
        warn_of_filled_zeros(model, zeros)
        return model

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        *,
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int = 0,
    ) -> None:
        """Add an adapter that is made of others, as LoRA's method of this name does, on the union of their supports.

        The new adapter is one like the others: it can be activated, trained, saved and combined again. It is not
        made active.

        Args:
            adapters: names of adapters of the model.
            weights: one number for each, also negative.
            adapter_name: the new one's.
            combination_type, svd_rank, density, majority_sign_method, seed: see
                [`Combination`][sparse_peft.ops.Combination]. Sparse deltas have ``"linear"``, ``"ties"``,
                ``"dare_linear"``, ``"dare_ties"`` and ``"magnitude_prune"``; what has low-rank factors has
                ``"linear"`` (which is ``"cat"``) and ``"svd"``.

        Raises:
            ValueError: names, weights or a combination that do not fit; nothing is added then.
        """
        how = Combination(combination_type, density, majority_sign_method, seed, svd_rank)
        add_weighted_adapter(self, adapters, weights, adapter_name, how)

    @classmethod
    def combined_fields(cls, configs: Sequence[ConfigT], tensors: Tensors) -> dict[str, Any]:
        """The method's own fields in the config of an adapter made of others; see ``combined_config``."""
        return {}

    # ------------------------------------------------------------------ forms

    @classmethod
    def skeleton_layer(
        cls, config: ConfigT, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> nn.Module:
        """A layer without memory that a file's tensors fit, to read an adapter without its base model.

        Args:
            config: the adapter's.
            name: the layer's.
            shape: ``(rows, cols)`` of the stored weight.
            tensors: the layer's, from the file.

        Raises:
            ValueError: tensors of sizes that fit no such layer.
        """
        return weightless_layer(shape)

    @classmethod
    def from_lora(cls, factors: Mapping[str, LoraFactors], fan_in_fan_out: bool) -> tuple[dict[str, Any], Tensors]:
        """The adapter of this method that computes the same as a LoRA adapter.

        Args:
            factors: ``{layer name: LoRA's factors}``.
            fan_in_fan_out: whether linear layers store their weight as ``(inputs, outputs)``.

        Returns:
            The config's fields, and what each layer has in a file, ``{layer: {name: tensor}}``.

        Raises:
            ValueError: there is no such adapter.
        """
        raise ValueError(f"{cls.__name__} adapters cannot be made from a LoRA adapter")

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def saves_base_weights(cls, config: ConfigT) -> bool:
        """Whether the adapter's file has the whole model in it."""
        return False

    @classmethod
    def fit_state(cls, config: ConfigT, state: StateT, parameters: dict[str, Tensor]) -> None:
        """Give a state the sizes that a file has, for methods that change sizes in training.

        Args:
            config: the adapter's.
            state: of one layer.
            parameters: the state's parameters in the file, not checked yet.
        """

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        put_states(entries, model, config, adapter_name)
        return entries

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        entries = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        cls.accept_tensors(entries, model, config, adapter_name)
        name_in_file = partial(cls._remove_adapter_name_from_key, adapter_name=adapter_name)
        take_states(entries, model, adapter_name, partial(cls.fit_state, config), name_in_file)
        saved = loaded_config_fields()
        if saved is not None:
            config.follow_file(saved, [state for _, _, state in named_states(model, adapter_name)])
        return entries

    @classmethod
    def accept_tensors(cls, entries: dict[str, Tensor], model: nn.Module, config: Any, adapter_name: str) -> None:
        """Refuse a file with tensors that saving the adapter would not write.

        Args:
            entries: the file's tensors under the names that they have in the model; what repeats the base is removed.
            model: that has the adapter.
            config: the adapter's.
            adapter_name: its name.

        Raises:
            ValueError: names such a tensor, and says what it is.
        """
        biases = {} if config.bias == "none" else cls._get_learnable_bias_state_dict(model, model.state_dict(), config)
        name_in_file = partial(cls._remove_adapter_name_from_key, adapter_name=adapter_name)
        whole_model = cls.saves_base_weights(config)
        accept_tensors(entries, model, config, adapter_name, name_in_file, biases=biases, whole_model=whole_model)
