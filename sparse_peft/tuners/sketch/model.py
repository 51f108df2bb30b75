"""The tuner of SketchTune."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...calibrate.codebooks import Sketch
from ...ops import Combination, check_weights
from ..base_model import BaseSparseModel
from ..combination import check_combination, combinable_configs
from ..files.adapter_state import named_states
from ..four_bit import FourBit
from ..low_rank import factor_sizes
from ..targets import Targets, base_of, check_names, check_shapes, in_dim_of, stored_shape
from ..traversal import tuner_layers
from .config import SketchConfig
from .layer import SketchLinear
from .sidecar import read_sketches
from .sketched import SketchedLinear
from .state import SketchState


@dataclass(frozen=True)
class SketchPlan:
    """What one layer's new adapter will be: arguments of ``SketchState``."""

    shape: tuple[int, int]
    groups: int
    config: SketchConfig
    sketch: Sketch | None
    has_tables: bool
    is_fresh: bool

    def make_delta(self, name: str) -> SketchState:
        return SketchState(
            self.shape, self.groups, name, self.config, self.sketch, self.has_tables, is_fresh=self.is_fresh
        )


class SketchModel(BaseSparseModel[SketchConfig, SketchState]):
    """Creates a model with trained tables beside the weights of its target layers, or in their place.

    SketchTune, https://arxiv.org/abs/2410.06364. A layer's state has the tables, ``codebook``
    ``(out, groups, 2**bits)``, and the codes of its weights.

    Args:
        model (torch.nn.Module): the model to adapt; of mode ``"replace"`` the target layers lose their weights.
        peft_config (sparse_peft.SketchConfig): the adapter's config.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a target is no layer that the method trains, or has another method's adapter.
        ValueError: there is no target, a target shares its weight, or a field contradicts the model.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SketchConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SketchConfig(bits=3, target_modules=["0"]))
        >>> model.base_model.model[0].deltas["default"]
        SketchState(rows=32, cols=64, bits=3, groups=1)
    """

    layer_cls = SketchLinear
    counted_tensor = "codebook"
    why_no_convolutions = "a sketch has tables for the rows of linear layers only"
    needs_base_weights = True

    @classmethod
    def layer_options(cls, config: SketchConfig) -> dict[str, Any]:
        return {"keep_base": config.keep_base}

    def check_configs(self) -> None:
        modes = [config.mode for config in self.configs.values()]
        if len(set(modes)) > 1:
            raise ValueError(
                f"mode={modes[-1]!r}: the model has adapters of the other mode; 'replace' takes the weights "
                "away that 'delta' is added to, so one model has adapters of one mode"
            )

    @classmethod
    def check_targets(cls, model: nn.Module, targets: Targets) -> None:
        super().check_targets(model, {n: m for n, m in targets.items() if not isinstance(base_of(m), SketchedLinear)})

    def plan_layers(
        self,
        config: SketchConfig,
        targets: Targets,
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> dict[str, SketchPlan]:
        if config.mode == "replace":
            self._check_replaceable(targets)
        shapes = {name: stored_shape(module) for name, module in targets.items()}
        check_shapes(config, shapes)
        sketches = self._twins_sketches(config, targets, adapter_name) or config.__dict__.get("sketches") or {}
        is_fresh = bool(sketches) or not config.is_resolved
        if config.index_storage is None:
            config.index_storage = "sidecar" if sketches or config.sketch is not None else "recompute"
        if config.index_storage == "sidecar" and not sketches:
            sketches = read_sketches(config.sidecar_path(), config.sketch_sha256)
        if sketches:
            check_names(config, set(sketches), set(targets), "the given sketches are for")
        plans = {}
        for name, module in targets.items():
            sides = factor_sizes(shapes[name], in_dim_of(module))[::-1]
            groups = config.groups_of(name)
            if groups > sides[1]:
                raise ValueError(f"groups={groups}: layer {name} has {sides[1]} inputs, which are a row's weights")
            shares = config.bits == 4 and not sketches and FourBit.of(base_of(module)) is not None
            plans[name] = SketchPlan(sides, groups, config, sketches.get(name), not shares, is_fresh)
        config.weight_shapes = {name: list(shape) for name, shape in shapes.items()}
        if config.base_dtype is None:
            config.base_dtype = next((str(base_of(m).weight.dtype).partition(".")[2] for m in targets.values()), None)
        return plans

    @staticmethod
    def _check_replaceable(targets: Targets) -> None:
        for name, module in targets.items():
            base = base_of(module)
            if type(base) not in (nn.Linear, Conv1D, SketchedLinear):
                raise TypeError(
                    f"Target module {name} of type {type(base).__name__}: mode='replace' puts codes in the place of "
                    "plain `torch.nn.Linear` and transformers' `Conv1D`; use mode='delta', which on a base in "
                    "bitsandbytes' 4 bits trains tables for the codes that are there"
                )

    def _twins_sketches(self, config: SketchConfig, targets: Targets, adapter_name: str) -> dict[str, Sketch]:
        """The codes of an adapter that was made with the same config object."""
        twin = self.twin_of(config, adapter_name)
        if twin is None:
            return {}
        layers = {name: m for name, m in targets.items() if isinstance(m, SketchLinear) and twin in m.deltas}
        return self._sketches(layers, twin) if len(layers) == len(targets) else {}

    @staticmethod
    def _sketches(layers: dict[str, SketchLinear], adapter_name: str) -> dict[str, Sketch]:
        """The layers' codes; none of layers whose base has them."""
        return {
            name: layer.sketch(adapter_name) for name, layer in layers.items() if layer.deltas[adapter_name].has_tables
        }

    def _layers(self) -> Iterator[SketchLinear]:
        return (layer for layer in tuner_layers(self.model) if isinstance(layer, SketchLinear))

    # ------------------------------------------------------------------ several adapters

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        **options: Any,
    ) -> None:
        """Add an adapter that is a weighted sum of others, exact because tables of the same codes add up.

        The adapters' changes are summed: with mode ``"replace"``, ``c0 + sum of w_i (c_i - c0)``.

        Args:
            adapters: names of adapters that have the same codes in the same layers.
            weights: one number for each.
            adapter_name: the new adapter's name.
            combination_type: ``"linear"``, the only one.
            options: arguments of the other combinations, which are refused.

        Raises:
            ValueError: names or weights that do not fit, another combination, or adapters whose layers or codes
                differ.
        """
        configs = combinable_configs(self, adapters, adapter_name)
        check_weights(weights, len(adapters))
        check_combination(SketchState, type(self).__name__, Combination(combination_type, **options))
        layers = {m.name: m for m in self._layers() if any(name in m.deltas for name in adapters)}
        for layer in layers.values():
            self._check_same_codes(layer, adapters)
        config = copy.copy(configs[0])
        config.sketches = self._sketches(layers, adapters[0])
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        config.__dict__.pop("sketches")
        for layer in layers.values():
            state, parts = layer.settled(adapter_name), [layer.settled(name).codebook for name in adapters]
            origin = state.first_tables().to(parts[0]) if state.replaces else torch.zeros_like(parts[0])
            changes = (weight * (part - origin) for weight, part in zip(weights, parts, strict=True))
            state.codebook.copy_(origin + reduce(torch.add, changes))

    @staticmethod
    def _check_same_codes(layer: SketchLinear, adapters: Sequence[str]) -> None:
        for name in adapters:
            if adapters[0] not in layer.deltas or name not in layer.deltas:
                raise ValueError(
                    f"layer {layer.name}: only some of the adapters {', '.join(adapters)} have tables for it; a "
                    "weighted sum needs adapters of the same layers"
                )
            first, other = layer.settled(adapters[0]), layer.settled(name)
            if first.codebook.shape != other.codebook.shape or not torch.equal(first.checksum, other.checksum):
                raise ValueError(
                    f"layer {layer.name}: the adapters {adapters[0]!r} and {name!r} have other codes, so their tables "
                    "do not add up; activate both with `model.base_model.set_adapter([...])`, which adds what they do"
                )

    # ------------------------------------------------------------------ after training

    def unload(self) -> nn.Module:
        """As PEFT's; dense weights that were dropped cannot come back."""
        for layer in self._layers():
            if layer.replaced is not None and not layer.replaced.keeps_original:
                raise RuntimeError(
                    f"layer {layer.name}: its dense weight was dropped, so unload() cannot give it back; "
                    "merge_and_unload() gives the trained one, keep_base='cpu' in the config keeps it"
                )
        return super().unload()

    # ------------------------------------------------------------------ checkpoints

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
        sketches = {}
        for key, layer in _named_layers(model, adapter_name):
            state = layer.deltas[adapter_name]
            if state.has_tables and config.index_storage == "embed":
                entries[f"{key}codes"] = layer.sketch(adapter_name).codes
            elif state.has_tables and config.index_storage == "sidecar":
                sketches[layer.name] = layer.sketch(adapter_name)
        if sketches:
            config.give_codes_to_save(sketches)
        return entries

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        entries = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for _, layer in _named_layers(model, adapter_name):
            layer.receive(adapter_name)
        return entries


def _named_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SketchLinear]]:
    """``(prefix of its tensors' names, layer)`` of each layer of an adapter."""
    for key, layer, _ in named_states(model, adapter_name):
        if isinstance(layer, SketchLinear):
            yield key, layer
