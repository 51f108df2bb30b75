"""The tuner of S2FT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate import ModelPass, Side, channel_squares, given_gradients, weight_squares
from ...ops import is_convolution
from ...support import ChannelSupport, ExpertColumns, Support
from ..base_model import BaseSparseModel
from ..combination import Tensors
from ..delta_layer import SparseTunerLayer
from ..expert_weights import ExpertWeight
from ..forms import LoraFactors
from ..targets import (
    Targets,
    base_of,
    check_shapes,
    dense_weight,
    experts_of,
    in_dim_of,
    layer_views,
    stored_shape,
)
from .budget import UnitChoice, choose_units
from .config import S2FTConfig
from .delta import BUFFERS, ChannelDelta, Channels
from .experts import Gate, expert_side
from .forms import channels_of_lora, skeleton_of_channels
from .layer import S2FTLinear
from .members import Structure
from .roles import DEFAULT_TARGETS
from .structures import Heads, build, side_of


@dataclass(frozen=True)
class ChannelPlan:
    """What one layer's new adapter will be."""

    side: Side
    count: int
    support: Support | None
    selection: str
    scale: float

    def make_delta(self, name: str) -> ChannelDelta:
        """The trained state of the layer of this name."""
        side, draw = self.side, partial(_not_chosen, name, self.selection)
        return ChannelDelta(
            side.shape, side.dim, self.count, side.width, side.matrices, name, draw, self.support, self.scale
        )


def _not_chosen(name: str, selection: str, *_: Any) -> Support:
    """Channels are chosen for all layers together, or come with a file: a layer that has none cannot draw its own."""
    raise ValueError(
        f"selection={selection!r}: the channels of layer {name} were neither chosen nor loaded; call `config = "
        "sparse_peft.select_support(model, config, dataloader)` before `get_peft_model(model, config)`, or load the "
        "adapter's file"
    )


class S2FTModel(BaseSparseModel[S2FTConfig, ChannelDelta]):
    """Creates a model that trains some channels of its target layers (S2FT, https://arxiv.org/abs/2412.06289).

    A layer's state has ``values``, ``(rows, k)`` or ``(k, cols)`` flattened, and ``k`` numbers of ``columns`` or
    ``rows``.

    Args:
        model (torch.nn.Module): the model to adapt.
        peft_config (sparse_peft.S2FTConfig): the adapter's config.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a target is no layer that the method trains, or has another method's adapter.
        ValueError: there is no target, a target shares its weight, or a field contradicts the model.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import S2FTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, S2FTConfig(ratio=0.25, target_modules=["0"]))
        >>> model.base_model.model[0].deltas["default"]
        ChannelDelta(columns=16, entries=512, shape=(32, 64), density=0.25, scale=4)
    """

    layer_cls = S2FTLinear
    target_module_mapping = DEFAULT_TARGETS

    def plan_layers(
        self,
        config: S2FTConfig,
        targets: Targets,
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> dict[str, ChannelPlan]:
        sides = self._sides(config, targets)
        check_shapes(config, {name: side.shape for name, side in sides.items()})
        counts, supports = self.first_sizes(
            config,
            targets,
            adapter_name,
            in_file=None if file_entries is None else {n: file_entries[n] // side.cost for n, side in sides.items()},
            recorded="num_channels",
            choose=lambda: self._new_choice(config, targets, sides),
            size=attrgetter("count"),
        )
        if not supports and file_entries is None and self._may_choose(config):
            chosen = self._choose(config, self.model, targets, sides)
            # others than a saved adapter's were not chosen by this config: they come with its file
            supports = chosen if counts == {name: support.count for name, support in chosen.items()} else {}
        for name, count in counts.items():
            if not 0 <= count <= sides[name].size:
                raise ValueError(
                    f"num_channels: {count} channels for layer {name}, which has {sides[name].size} on the side that "
                    "trains; load the adapter on the base model it was made for"
                )
        config.num_channels = counts
        config.sides = {name: "in" if side.is_input else "out" for name, side in sides.items()}
        config.weight_shapes = {name: list(side.shape) for name, side in sides.items()}
        config.resolve_scale(sum(counts[name] * side.cost for name, side in sides.items()))
        return {
            name: ChannelPlan(side, counts[name], supports.get(name), config.selection, config.value_scale)
            for name, side in sides.items()
        }

    @classmethod
    def combined_fields(cls, configs: Sequence[S2FTConfig], tensors: Tensors) -> dict[str, Any]:
        counts = {name: next(found[b].numel() for b in BUFFERS if b in found) for name, found in tensors.items()}
        sides = {name: side for config in configs for name, side in (config.sides or {}).items()}
        entries = sum(found["values"].numel() for found in tensors.values())
        configs[0].divide_by_scale_(tensors)
        budget: dict[str, Any] = {"ratio": None, "k": None, "r": None, "num_params": entries, "ratio_pattern": {}}
        # further channels would not be chosen as these were
        choice = {"selection": "random", "largest": None, "avoid": None, "coupled": False, "granularity": "channel"}
        return {**budget, **choice, "num_channels": counts, "sides": {name: sides[name] for name in tensors}}

    def _new_choice(
        self, config: S2FTConfig, targets: Targets, sides: dict[str, Side]
    ) -> tuple[dict[str, int], dict[str, Channels]]:
        if not self._may_choose(config):
            _not_chosen(next(iter(targets)), config.selection)
        supports = self._choose(config, self.model, targets, sides)
        return {name: support.count for name, support in supports.items()}, supports

    @classmethod
    def layer_options(cls, config: S2FTConfig) -> dict[str, Any]:
        return {"resident": config.resident}

    def _may_choose(self, config: S2FTConfig) -> bool:
        """Whether channels can be chosen now; a saved adapter's may need data, or adapters that are not here."""
        if config.num_channels is None:
            return config.selection_needs in ("none", "weight")
        return config.selection_needs == "none" and not config.avoid

    @staticmethod
    def _expert_side(config: S2FTConfig, name: str, module: nn.Module) -> Side:
        wanted, in_dim = (config.sides or {}).get(name) or config.side, in_dim_of(module)
        dim = in_dim if expert_side(name, wanted) == "in" else 1 - in_dim
        return Side(stored_shape(module), dim, in_dim, matrices=experts_of(module))

    @classmethod
    def _sides(cls, config: S2FTConfig, targets: Targets) -> dict[str, Side]:
        sides = {}
        for name, module in targets.items():
            if isinstance(base_of(module), ExpertWeight):
                sides[name] = cls._expert_side(config, name, module)
                continue
            base, shape, in_dim = base_of(module), stored_shape(module), in_dim_of(module)
            taps = 1
            if is_convolution(base):
                taps = base.weight[0, 0].numel()
                if base.groups > 1:
                    raise TypeError(
                        f"Target module {name} is a {type(base).__name__} of {base.groups} groups, whose channels do "
                        "not stand alone; leave it out with exclude_modules, or use SparseConfig or SaRAConfig for it"
                    )
            wanted = (config.sides or {}).get(name) or config.side
            is_input = side_of(name, (shape[0], shape[1] // taps), in_dim, wanted) == "in"
            dim = in_dim if is_input else 1 - in_dim
            sides[name] = Side(shape, dim, in_dim, taps if dim == 1 else 1)
        return sides

    @classmethod
    def _choose(
        cls,
        config: S2FTConfig,
        model: nn.Module,
        targets: Targets,
        sides: dict[str, Side],
        squares: dict[str, Tensor] | None = None,
    ) -> dict[str, Channels]:
        """Every layer's channels, by squared scores ``{layer: (channels,)}``, or by weights, or at random."""
        bases = {name: base_of(module) for name, module in targets.items()}
        experts = {name: base for name, base in bases.items() if isinstance(base, ExpertWeight)}
        structures = build(
            sides,
            granularity=config.granularity,
            coupled=config.coupled,
            heads=Heads.of(getattr(model, "config", None)),
            gates={name: Gate.of(base.holder, base.parameter) for name, base in experts.items()},
        )
        if squares is None and config.selection == "weight":
            squares = {name: weight_squares(dense_weight(module), sides[name]) for name, module in targets.items()}
        taken = cls._taken(config, targets, sides)
        choice = UnitChoice(
            config.seed,
            squares=None if squares is None else lambda structure: _unit_squares(structure, squares, config.selection),
            largest=config.trains_largest,
            free=(lambda structure: _free_units(structure, taken)) if taken else None,
            avoided=", ".join(map(repr, config.avoid or [])),
        )
        units = choose_units(structures, config.budget(), choice)
        chosen: dict[str, list[Tensor]] = {}
        for structure in structures:
            for member in structure.members:
                chosen.setdefault(member.name, []).append(member.units[units[structure.name]].reshape(-1))
        return {
            name: _support_of(name, sides[name], torch.cat(chosen[name]).sort().values, bases[name].weight.device)
            for name in targets
        }

    @staticmethod
    def _taken(config: S2FTConfig, targets: Targets, sides: dict[str, Side]) -> dict[str, Tensor] | None:
        """``{layer: (channels,) bool}``: what the adapters in ``avoid`` train."""
        if not config.avoid:
            return None
        known = {name for module in targets.values() if isinstance(module, SparseTunerLayer) for name in module.deltas}
        unknown = [name for name in config.avoid if name not in known]
        if unknown:
            raise ValueError(
                f"avoid={config.avoid!r}: the target layers have no adapter {', '.join(map(repr, unknown))}; those "
                f"they have are {', '.join(map(repr, sorted(known))) or 'none'}"
            )
        taken = {}
        for name, module in targets.items():
            side = sides[name]
            taken[name] = torch.zeros(side.size, dtype=torch.bool)
            for other in config.avoid:
                if not (isinstance(module, SparseTunerLayer) and other in module.deltas):
                    continue
                support = module.support(other)
                if not isinstance(support, Channels) or (support.dim, support.width) != (side.dim, side.width):
                    raise ValueError(
                        f"avoid={config.avoid!r}: in layer {name} adapter {other!r} does not train "
                        f"{'input' if side.is_input else 'output'} channels as this one does, so their entries cannot "
                        "be kept apart; use the same side"
                    )
                taken[name][support.channels.cpu().long()] = True
        return taken

    @classmethod
    def choose_from_data(
        cls,
        model: nn.Module,
        config: S2FTConfig,
        targets: Targets,
        data: Iterable[Any] | None,
        gradients: dict[str, Tensor] | None,
        *,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None,
        oversample: float,
    ) -> dict[str, Channels]:
        sides = cls._sides(config, targets)
        if gradients is not None:
            if config.selection != "gradient":
                raise ValueError(f"gradients= with selection={config.selection!r}: give data, or selection='gradient'")
            found = given_gradients({name: side.shape for name, side in sides.items()}, gradients)
            squares = {name: weight_squares(gradient, sides[name]) for name, gradient in found.items()}
        else:
            batches = ModelPass(model, data or (), loss_fn)
            squares = channel_squares(config.selection, batches, layer_views(targets), sides)
        return cls._choose(config, model, targets, sides, squares)

    @classmethod
    def skeleton_layer(
        cls, config: S2FTConfig, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> nn.Module:
        return skeleton_of_channels(config, name, shape, tensors)

    @classmethod
    def from_lora(cls, factors: Mapping[str, LoraFactors], fan_in_fan_out: bool) -> tuple[dict[str, Any], Tensors]:
        return channels_of_lora(factors, fan_in_fan_out)


def _support_of(name: str, side: Side, channels: Tensor, device: torch.device) -> Channels:
    support: Channels
    if side.dim == 1 and side.matrices > 1:
        support = ExpertColumns(side.shape, side.matrices, channels, name=name)
    else:
        support = ChannelSupport(side.shape, side.dim, channels, side.width, name=name)
    return support if device.type == "meta" else support.to(device)


def _unit_squares(structure: Structure, squares: dict[str, Tensor], selection: str) -> Tensor:
    """``(units,)`` sums over the unit's channels.

    Activations are looked at where the structure ends, at the input of ``down`` or ``o``, if it has such a layer.
    """
    members = structure.members
    if selection in ("activation", "product"):
        members = tuple(member for member in members if member.side.is_input) or members
    return reduce(torch.add, (squares[member.name].cpu()[member.units].sum(1) for member in members))


def _free_units(structure: Structure, taken: dict[str, Tensor]) -> Tensor:
    """``(units,)`` bool: no channel of the unit is taken in any layer."""
    return ~reduce(torch.logical_or, (taken[member.name][member.units].any(1) for member in structure.members))
