"""What the tuners of all sparse methods share: PEFT's model contract."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops import Combination, is_convolution, kernel_backend
from ..support import Support
from .base_layer import BASE_ADAPTER, TunerLayer
from .base_state import TrainedState
from .combination import Tensors, add_weighted_adapter
from .controller_warning import expect_attendance
from .delta import SparseDelta
from .delta_layer import SparseTunerLayer
from .experts import CURE, bare_weights, check_bare_weights
from .files.card import TAG
from .files.checks import check_adapter_name, check_values
from .four_bit import base_weight, prepare_four_bit
from .residency import hold_layers, release_layers
from .selection import SupportRecipe


class Plan(Protocol):
    """What one layer's new adapter will be."""

    def make_delta(self, name: str) -> TrainedState:
        """The trained state of the layer of this name."""
        ...


@dataclass(frozen=True)
class LayerPlan:
    """A sparse delta's."""

    shape: tuple[int, int]
    entries: int
    recipe: SupportRecipe
    support: Support | None

    def make_delta(self, name: str) -> TrainedState:
        return SparseDelta(self.shape, self.entries, name, self.recipe, self.support)


def base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def stored_shape(module: nn.Module) -> tuple[int, int]:
    """``(rows, cols)`` of a target's weight as stored.

    Quantised layers count unpacked, ``(out, in)``; a convolution's weight as ``(out, in / groups * taps)``.
    """
    base = base_of(module)
    if is_convolution(base):
        return base.weight.shape[0], base.weight[0].numel()
    if isinstance(base, Conv1D) or not hasattr(base, "out_features"):
        return tuple(base.weight.shape)
    return base.out_features, base.in_features


def in_dim_of(module: nn.Module) -> int:
    """Which dimension of a target's stored weight is the input's."""
    return 0 if isinstance(base_of(module), Conv1D) else 1


def dense_weight(module: nn.Module) -> Tensor:
    """The base weight of a target in floats, as the matrix that is stored."""
    if isinstance(module, TunerLayer):
        return module.dense_base_weight()
    base = base_of(module)
    backend = resolve_quantization_backend(base)
    return base.weight.detach().reshape(stored_shape(module)) if backend is None else base_weight(base, backend)


def configs_of(model: nn.Module) -> dict[str, Any]:
    """The adapters' configs, wherever in the model (or in what wraps it) PEFT keeps them."""
    found: dict[str, Any] = {}
    for module in model.modules():
        configs = module.__dict__.get("peft_config") or {}
        if isinstance(configs, dict):
            found.update(configs)
    return found


def modules_beside_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The model's modules in their order, without those of its adapters, of which there may be hundreds."""
    seen, waiting = set(), [model]
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        if isinstance(module, TunerLayer):
            waiting.append(module._modules.get("base_layer"))
        else:
            waiting.extend(reversed(module._modules.values()))


class BaseSparseModel(BaseTuner):
    """Base of the sparse methods' tuners.

    A method's subclass names its ``layer_cls``, from which PEFT's class attributes are derived, and says in
    ``plan_layers`` what each target layer trains.
    """

    layer_cls: ClassVar[type[TunerLayer]]
    takes_groups = True  # whether convolutions of several groups, which are no one matrix, can be targets
    counted_tensor = "values"  # which of a layer's tensors in a file says by its size what the layer trains
    needs_base_weights = False  # whether what an adapter adds is a function of its base's weights as well
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "layer_cls" in cls.__dict__:
            cls.tuner_layer_cls = cls.layer_cls
            cls.prefix = cls.layer_cls.config_cls.prefix()

    @abstractmethod
    def plan_layers(
        self, config, targets: dict[str, nn.Module], adapter_name: str, file_entries: dict[str, int] | None
    ) -> dict[str, Plan]:
        """What each target layer trains.

        Args:
            config: the new adapter's config; what is resolved here is recorded in it.
            targets: ``{layer name: module}``.
            adapter_name: the new adapter's name.
            file_entries: ``{layer name: entries}`` of the adapter file the layers are made for, if that is known.
        """

    @classmethod
    def resolve_sizes(cls, config, model: nn.Module) -> None:
        """Record in the config how much each layer trains, where that is long before what it trains is known.

        An adapter made from it then waits for its positions, as one whose file is still to come: for plans on models
        without weights. Methods that choose whole structures have nothing to gain from it.
        """

    def _cloned_supports(self, config, targets: dict[str, nn.Module], adapter_name: str) -> dict[str, Support]:
        """TRL adds its reference adapter with the policy's own config object: it trains the policy's positions."""
        twins = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        supports = {}
        for name, module in targets.items():
            if isinstance(module, SparseTunerLayer) and twins and twins[0] in module.deltas:
                supports[name] = module.support(twins[0])
        return supports if len(supports) == len(targets) else {}

    @staticmethod
    def _check_names(config, given: set[str], targets: set[str], what: str) -> None:
        if given != targets:
            missing, extra = sorted(targets - given), sorted(given - targets)
            raise ValueError(
                f"{what} other layers than the config targets in this model: missing {missing[:3]}, not in the model "
                f"{extra[:3]} (and {max(0, len(missing) - 3) + max(0, len(extra) - 3)} more). Use the base model the "
                f"adapter was made for, or a new {type(config).__name__} for a new adapter."
            )

    @staticmethod
    def _check_shapes(config, shapes: dict[str, tuple[int, int]]) -> None:
        for name, shape in shapes.items():
            made_for = (config.weight_shapes or {}).get(name)
            if made_for is not None and tuple(made_for) != shape:
                raise ValueError(
                    f"weight_shapes: the adapter was made for a weight of shape {tuple(made_for)} in layer {name}, "
                    f"this model's is {shape}; load it on the base model it was made for "
                    f"({config.base_model_name_or_path or 'see its adapter_config.json'})"
                )

    @classmethod
    def choose_from_data(
        cls,
        model: nn.Module,
        config,
        targets: dict[str, nn.Module],
        data: Iterable | None,
        gradients: dict[str, Tensor] | None,
        *,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None,
        oversample: float,
    ) -> dict[str, Support]:
        """Each target's positions; the arguments are those of [`select_support`][sparse_peft.select_support], checked.

        For methods that have criteria which look at data.
        """
        raise NotImplementedError

    @classmethod
    def select_support(
        cls,
        model: nn.Module,
        config,
        data: Iterable | None,
        *,
        gradients: dict[str, Tensor] | None = None,
        **options: Any,
    ):
        """See [`select_support`][sparse_peft.select_support], which copies the config first."""
        if config.selection_needs not in ("gradient", "activation"):
            raise ValueError(
                f"selection={config.selection!r} needs no data; pass the config to get_peft_model as it is"
            )
        if (data is None) == (gradients is None):
            raise ValueError("select_support needs either data (batches) or gradients={name: tensor}, and not both")
        targets = cls.checked_targets(config, model)
        for name, module in targets.items():
            if is_convolution(base_of(module)):
                raise TypeError(
                    f"Target module {name} of type {type(base_of(module)).__name__}: selection={config.selection!r} "
                    "looks at data for linear layers only; leave convolutions out with exclude_modules, or choose a "
                    "selection that needs no data"
                )
        prepare_four_bit(modules_beside_adapters(model))
        # not a field: positions are saved with the adapter's values, not in its config
        config.supports = cls.choose_from_data(model, config, targets, data, gradients, **options)
        return config

    # ------------------------------------------------------------------ injection

    def _prepare_adapter_config(self, peft_config, model_config: dict):
        # diffusers' models have no model_type; their class does as well
        kind = model_config.get("model_type", type(self.model).__name__)
        return super()._prepare_adapter_config(peft_config, {"model_type": kind})

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name)
        self._injection = (adapter_name, kwargs.get("state_dict"))
        self._plans: dict[str, Plan] = {}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del self._injection, self._plans

    def _prepare_model(self, peft_config, model: nn.Module) -> None:
        # budgets are shared between layers, so all of them are planned before PEFT creates the first
        adapter_name, state_dict = self._injection
        targets = self.find_targets(peft_config, model, state_dict)
        check_bare_weights(peft_config, model, bool(targets))
        self.check_targets(model, targets)
        prepare_four_bit(modules_beside_adapters(model))
        self.release()
        if targets:
            self._plans = self.plan_layers(peft_config, targets, adapter_name, self._file_entries(state_dict))

    @classmethod
    def checked_targets(cls, config, model: nn.Module) -> dict[str, nn.Module]:
        """The layers that PEFT will adapt for this config, whose default target modules are filled in.

        Raises:
            TypeError, ValueError: there are none, or some that cannot be.
        """
        if config.target_modules is None:
            model_type = BaseTuner.get_model_config(model).get("model_type")
            config.target_modules = cls.target_module_mapping.get(model_type)
            if config.target_modules is None:
                raise ValueError(f"target_modules: none given, and none is known for model type {model_type!r}")
        targets = cls.find_targets(config, model)
        if not targets:
            raise ValueError(f"target_modules={config.target_modules!r} match no layer of {type(model).__name__}")
        cls.check_targets(model, targets)
        return targets

    @classmethod
    def find_targets(
        cls, config, model: nn.Module, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, nn.Module]:
        """The layers that PEFT will adapt for this config, by name, in the model's order."""
        config = _maybe_include_all_linear_layers(config, model)
        if state_dict is not None:
            wanted = {key.rsplit(f".{cls.prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
        targets, inside = {}, ()
        for name, module in model.named_modules():
            if not name or (inside and name.startswith(inside)):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")
            if name in wanted if state_dict is not None else cls._check_target_module_exists(config, name):
                targets[name] = module
        return targets

    @classmethod
    def _file_entries(cls, state_dict: dict[str, Tensor] | None) -> dict[str, int] | None:
        if state_dict is None:
            return None
        return {
            key.rsplit(f".{cls.prefix}", 1)[0].removeprefix("_orig_mod."): value.numel()
            for key, value in state_dict.items()
            if key.endswith(f".{cls.counted_tensor}") and f".{cls.prefix}" in key
        }

    @classmethod
    def check_targets(cls, model: nn.Module, targets: dict[str, nn.Module]) -> None:
        """Refuse layers of other kinds, and weights that something else uses too.

        Raises:
            TypeError: a target is no linear layer, or is quantised in a way that PEFT has no backend for.
            ValueError: a target's weight is shared.
        """
        owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        kwargs = get_quantization_kwargs(model)
        for name, module in targets.items():
            base = base_of(module)
            backend = resolve_quantization_backend(base, **kwargs)
            weight = getattr(base, "weight", None)
            if backend is None and not isinstance(base, (nn.Linear, Conv1D)) and not is_convolution(base):
                fused = f"Its weights are {CURE}. " if bare_weights(base) else ""
                raise TypeError(
                    f"Target module {name} of type {type(base).__name__} is not supported. {fused}{cls.__name__} "
                    "trains `torch.nn.Linear`, `Conv1d`, `Conv2d`, `Conv3d`, transformers' `Conv1D` and the quantised "
                    "linear layers that PEFT has a backend for; name other target_modules, or leave this one out with "
                    "exclude_modules."
                )
            if is_convolution(base) and base.groups > 1 and not cls.takes_groups:
                raise TypeError(
                    f"Target module {name}: a convolution of {base.groups} groups has no low-rank form; leave it out "
                    "with exclude_modules"
                )
            if backend is None and isinstance(weight, Tensor) and not weight.is_floating_point():
                raise TypeError(
                    f"Target module {name} of type {type(base).__module__}.{type(base).__name__} holds {weight.dtype} "
                    "weights and PEFT has no quantisation backend for it; use a base quantised with bitsandbytes, HQQ "
                    "or torchao, or one in float16, bfloat16 or float32."
                )
            names = owners.get(id(weight), [])
            if len(names) > 1:
                others = ", ".join(other for other in names if other != f"{name}.weight")
                raise ValueError(
                    f"Target module {name} shares its weight with {others} (tied weights): training one would change "
                    "the other. Leave it out with exclude_modules, or untie the weights first (load the model with "
                    "tie_word_embeddings=False and copy the weight)."
                )

    @staticmethod
    def layer_options(config) -> dict[str, Any]:
        """Arguments of the layer class besides base layer and name."""
        return {"resident": config.resident}

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        plan = self._plans[current_key]
        layer = target
        if not isinstance(target, TunerLayer):
            layer = self.layer_cls(
                target, current_key, **self.layer_options(peft_config), **get_quantization_kwargs(self.model)
            )
            layer._active_adapter = adapter_name
        layer.add_delta(
            adapter_name,
            plan.make_delta(current_key),
            init_weights=peft_config.init_weights,
            inference_mode=peft_config.inference_mode,
        )
        if peft_config.changes_in_training and not peft_config.inference_mode:
            expect_attendance(layer.deltas[adapter_name], peft_config.attendance_needed_for)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter is not trained before it is made active
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # PEFT's version also assigns the child's weight to whatever replaces it, which fails for a child whose weight
        # is computed (a trained token embedding being merged); a replacement here is a layer or a base, with its own
        setattr(parent, child_name, new_module)

    def _post_injection_hook(self, model: nn.Module, config, adapter_name: str) -> None:
        tags = list(getattr(model, "model_tags", None) or [])
        if TAG not in tags:
            model.model_tags = [*tags, TAG]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for layer in self.sparse_layers(self.model):
            if adapter_name in layer.deltas:
                layer.deltas[adapter_name].keep_dtype()

    @staticmethod
    def sparse_layers(model: nn.Module) -> Iterator[TunerLayer]:
        return (module for module in modules_beside_adapters(model) if isinstance(module, TunerLayer))

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
                known = name in module._adapters
                module.set_adapter(name if known else [], inference_mode=inference_mode)
        self.active_adapter = adapter_name

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
        try:
            if names is None and self._writes_together():
                self.make_resident()
            with self._mixed_batch(names, kwargs.get("num_beams") or 1):
                yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give every base weight its own entries back; the next forward pass writes the adapter's anew."""
        release_layers(self.sparse_layers(self.model))

    def make_resident(self) -> None:
        """Write the active adapters' entries into the base weights now instead of in the next forward pass.

        For servers that want a switch to be over before the next request; layers that cannot hold entries are left.
        """
        hold_layers(self.sparse_layers(self.model))

    def _writes_together(self) -> bool:
        """Whether a kernel writes the entries of many layers in one launch, which beats one for each layer."""
        layer = next(self.sparse_layers(self.model), None)
        if not isinstance(layer, SparseTunerLayer) or layer.quantization_backend is not None:
            return False
        weight = layer.base_parameter
        return kernel_backend("write_many", weight.dtype, weight.device) is not None

    @contextmanager
    def _mixed_batch(self, names: list[str] | None, beams: int) -> Iterator[None]:
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names={names!r}: a list with one adapter name for each input is expected")
        known = {name for layer in self.sparse_layers(self) for name in layer.deltas}
        unknown = sorted(set(names) - known - {BASE_ADAPTER})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        # beam search repeats each input in the decoder; the encoder still sees it once
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        in_encoder = set() if encoder is None or encoder is self.model else set(encoder.modules())
        repeated = [name for name in names for _ in range(beams)]
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, (TunerLayer, AuxiliaryTrainingWrapper)):
                    given = list(names) if module in in_encoder else repeated
                    handle = module.register_forward_pre_hook(
                        lambda _, args, kwargs, given=given: (args, {**kwargs, "adapter_names": given}),
                        with_kwargs=True,
                    )
                    stack.callback(handle.remove)
            yield

    # ------------------------------------------------------------------ after training

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.release()
        return super()._unload_and_optionally_merge(*args, **kwargs)

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
    def combined_config(cls, configs: Sequence[Any], tensors: Tensors) -> Any:
        """The config of an adapter made of others.

        Args:
            configs: the others', the first of which gives what is not resolved anew.
            tensors: what each layer has become, ``{layer: {name: tensor}}``; it may be filled up to fit the config.
        """
        shapes = {name: shape for config in configs for name, shape in (config.weight_shapes or {}).items()}
        resolved = cls.combined_fields(configs, tensors)
        return replace(
            configs[0],
            target_modules=set(tensors),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            init_weights=True,
            save_dtype="float32",
            weight_shapes={name: list(shapes[name]) for name in tensors},
            **resolved,
        )

    @classmethod
    def combined_fields(cls, configs: Sequence[Any], tensors: Tensors) -> dict[str, Any]:
        """The method's own fields of ``combined_config``; the arguments are its."""
        raise NotImplementedError(f"{cls.__name__} has states that can be combined but does not say their config")

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def _named_deltas(cls, model: nn.Module, adapter_name: str) -> Iterator[tuple[str, TunerLayer, TrainedState]]:
        """``(state dict key prefix, layer, trained state)`` of one adapter."""
        for name, module in model.named_modules():
            if isinstance(module, TunerLayer) and adapter_name in module.deltas:
                name = name.removeprefix("_fsdp_wrapped_module.")
                key = f"{module.delta_container}.{adapter_name}."
                yield f"{name}.{key}" if name else key, module, module.deltas[adapter_name]

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        dtype = getattr(torch, config.save_dtype)
        for key, layer, delta in cls._named_deltas(model, adapter_name):
            found = {name: entries[f"{key}{name}"].detach() for name in delta._parameters if f"{key}{name}" in entries}
            if not found:
                continue
            for name, tensor in found.items():
                check_values(tensor, layer.name, "save")
                if tensor.dtype == torch.float32 and name not in delta.full_precision:
                    entries[f"{key}{name}"] = tensor.to(dtype)
            # positions that no file brought are chosen now; the state dict was taken before
            for name in delta.position_names:
                entries.pop(f"{key}{name}", None)
            files = layer.settled(adapter_name).file_tensors()
            entries.update({f"{key}{name}": tensor for name, tensor in files.items()})
        return entries

    @classmethod
    def _fit(cls, config, delta: TrainedState, parameters: dict[str, Tensor]) -> None:
        """Make room for what the file has, for methods that change their layers' sizes in training."""

    @classmethod
    def _pop_positions(
        cls, entries: dict[str, Tensor], key: str, adapter_name: str, names: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Take one layer's positions out of a file's tensors, whose keys PEFT maps only where the model has them."""
        found = {}
        for name in names:
            in_file = cls._remove_adapter_name_from_key(f"{key}{name}", adapter_name)
            for candidate in (f"{key}{name}", in_file, f"base_model.model.{in_file}"):
                if candidate in entries:
                    found[name] = entries.pop(candidate)
        return found

    @classmethod
    def saves_base_weights(cls, config) -> bool:
        """Whether the adapter's file has the whole model in it."""
        return False

    @staticmethod
    def _check_no_base_weights(model: nn.Module, config, adapter_name: str, entries: dict[str, Tensor]) -> None:
        """Refuse a file that would replace weights of the base: without the adapter the model must be the base.

        What PEFT saves of the base, where asked to, is let pass: biases, embeddings, modules to save. Biases that were
        not asked for are taken, as PEFT takes them, with a warning.
        """
        biases = []
        for name in model.state_dict():
            parts = name.split(".")
            if name not in entries or adapter_name in parts or set(parts) & set(EMBEDDING_LAYER_NAMES):
                continue
            if parts[-1] == "bias":
                biases.append(name)
                continue
            raise ValueError(
                f"the adapter file has {name}, a weight of the base model, which such an adapter leaves as it is "
                f"(modules_to_save={config.modules_to_save!r}); the file is damaged, or written to change the base "
                "unnoticed"
            )
        if biases and config.bias == "none":
            warnings.warn(
                f"the adapter file has biases of the base model, such as {biases[0]}, though its config says "
                "bias='none'; they are put in the place of the base's own, and stay there without the adapter",
                stacklevel=2,
            )

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        entries = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if not cls.saves_base_weights(config):
            cls._check_no_base_weights(model, config, adapter_name, entries)
        for key, layer, delta in cls._named_deltas(model, adapter_name):
            parameters = {name: entries[f"{key}{name}"] for name in delta._parameters if f"{key}{name}" in entries}
            cls._fit(config, delta, parameters)
            found = cls._pop_positions(entries, key, adapter_name, delta.position_names)
            positions = delta.take_file(found, parameters)
            entries.update({f"{key}{name}": tensor for name, tensor in positions.items()})
            layer.release()
        return entries


@contextmanager
def base_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the base weights hold their own entries only, and may be read, compared, saved and changed.

    Adapters that were merged by ``merge_adapter`` stay merged. No forward pass with an active adapter may run inside.
    """
    release_layers(BaseSparseModel.sparse_layers(model))
    yield model
