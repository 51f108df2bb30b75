"""Masks in training: they are chosen anew, close, and pull weights to zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dynamics.optimizer_state import add_gradient_
from ...dynamics.protocol import Dynamics, TrainingContext
from ...numerics.bits import count_bits, unpack_bits
from ...ops import MaskedWeight
from ...sparsify import NM
from .config import PruneConfig
from .layer import PruneLinear
from .moments import clear_masked_
from .records import LayerMaskChange, MaskChange
from .state import PrunedState


@dataclass
class _Part:
    """One layer's part.

    Attributes:
        layer: the layer.
        state: the adapter's trained state in it.
        kept: weights that stay.
    """

    layer: PruneLinear
    state: PrunedState
    kept: int

    @property
    def numel(self) -> int:
        outputs, inputs = self.layer.sides
        return outputs * inputs


class PruneDynamics(Dynamics[PruneConfig, PruneLinear]):
    """The dynamics of one [`PruneConfig`][sparse_peft.PruneConfig] adapter.

    Args:
        context: see ``TrainingContext``.

    Raises:
        ValueError: the config needs the length of the run and it is not known.
        NotImplementedError: FSDP2 divides the weights.
    """

    def __init__(self, context: TrainingContext[PruneConfig, PruneLinear]):
        super().__init__(context)
        for layer in self.layers.values():
            layer.check_whole(f"recipe={self.config.recipe!r} chooses masks in training")
        self.timeline = self.config.timeline(context.total_steps)
        self.parts = {name: self._part(layer) for name, layer in self.layers.items()}
        self.numel = sum(part.numel for part in self.parts.values())
        self.in_use = 0  # weights in use, summed over the steps so far
        self.rates: dict[str, float] = {}

    def _part(self, layer: PruneLinear) -> _Part:
        state = layer.settled(self.adapter)
        return _Part(layer, state, count_bits(state.mask))

    # ------------------------------------------------------------------ the course of a step

    def begin_step(self, step: int) -> None:
        for part in self.parts.values():
            part.state.straight = self.timeline.is_straight(step, self.config.is_straight)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        weight = self.timeline.pull_at(step)
        for name, part in self.parts.items():
            if weight and self._shrinks_weights:
                self.rates[name] = self._rate_of(part.state.dense)
            elif weight:
                self._pull(part, weight)

    @property
    def _shrinks_weights(self) -> bool:
        """Whether the pull moves the weights themselves, after the optimizer's step."""
        return self.timeline.recipe.pull == "masked l1" and self.config.trains == "weights"

    def _rate_of(self, parameter: Tensor) -> float:
        groups = self.optimizer.param_groups
        return next(float(group["lr"]) for group in groups if any(p is parameter for p in group["params"]))

    @torch.no_grad()
    def after_step(self, step: int) -> MaskChange | None:
        weight = self.timeline.pull_at(step)
        if weight and self._shrinks_weights:
            for name, part in self.parts.items():
                self._shrink(part, weight * self.rates.get(name, 0.0))
        open_before = self.timeline.beta(step - 1) > 0
        self.in_use += self.numel if open_before else sum(part.kept for part in self.parts.values())
        is_event, beta = self.timeline.is_event(step), self.timeline.beta(step)
        flips = {name: self._choose(part, step) for name, part in self.parts.items()} if is_event else {}
        for part in self.parts.values():
            if is_event or beta != self.timeline.beta(step - 1):
                part.state.put(beta=beta)
            if is_event and beta == 0 and (step == self.timeline.stop or not self.config.is_straight):
                clear_masked_(part.state, self.optimizer)
        return self._record(step, beta, flips) if is_event else None

    def _choose(self, part: _Part, step: int) -> int:
        """Choose a layer's mask; returns how many weights changed sides."""
        pattern, units = self.timeline.wanted(step, part.numel)
        mask = self.collectives.from_first(part.layer.chosen_mask(self.adapter, pattern, units))
        flipped = count_bits(mask ^ part.state.mask)
        if "back_mask" in part.state.own_buffers and isinstance(pattern, NM):
            back = part.layer.chosen_back_mask(self.adapter, pattern)
            part.state.put(back_mask=self.collectives.from_first(back))
        part.state.put(mask=mask)
        part.kept = count_bits(mask)
        return flipped

    # ------------------------------------------------------------------ pulling weights to zero

    def _pull(self, part: _Part, weight: float) -> None:
        """Add the pull to the gradients, a panel at a time."""
        masked = part.layer.masked_weight((self.adapter,))
        own = masked.parts[0].tensors
        trained: list[Mapping[str, Tensor]] = [own]
        (totals,) = masked.zero_grads([{name: tensor for name, tensor in own.items() if name != "dense"}])
        dense = part.state.own_parameters.get("dense")
        if dense is not None:
            if dense.grad is None:
                dense.grad = torch.zeros_like(dense)
            totals["dense"] = dense.grad
            scale = getattr(self.optimizer, "grad_scale", None)
            weight *= 1.0 if scale is None else float(scale)
        for start, stop in masked.bounds(torch.float32):
            rate = self._rate(masked, trained, start, stop).mul_(weight)
            masked.parts[0].reduce_(rate, own, start, stop, totals)
        self._add(part.state, own, totals)

    def _rate(self, masked: MaskedWeight, trained: list[Mapping[str, Tensor]], start: int, stop: int) -> Tensor:
        inside = masked.inside(trained, start, stop)
        pull = self.timeline.recipe.pull
        rate = inside if pull == "decay" else inside.sign()
        if pull == "l1":
            return rate
        return rate.masked_fill_(unpack_bits(masked.parts[0].mask[start:stop], masked.shape[1]), 0)

    def _add(self, state: PrunedState, tensors: Mapping[str, Tensor], totals: Mapping[str, Tensor]) -> None:
        """Add gradients of what the layer multiplies with to those of the parameters."""
        scale = self.config.scale
        names = {"down": "A", "up": "B", "values": "values"}
        for name, own in names.items():
            if name in totals:
                parameter = state.own_parameters[own]
                gradient = totals[name].mul_(scale) if name == "up" else totals[name]
                add_gradient_(self.optimizer, parameter, gradient.to(parameter.dtype))

    def _shrink(self, part: _Part, length: float) -> None:
        """Move masked weights towards zero by this length, and not across (CAST's decoupled form)."""
        masked = part.layer.masked_weight((self.adapter,))
        trained = [masked.parts[0].tensors]
        for start, stop in masked.bounds(torch.float32):
            inside = masked.inside(trained, start, stop)
            shorter = inside.sign() * (inside.abs() - length).clamp_(min=0)
            goal = shorter.sub_(part.layer.base_rows(start, stop))
            kept = unpack_bits(masked.parts[0].mask[start:stop], masked.shape[1])
            own = part.state.dense[start:stop]
            own.copy_(torch.where(kept, own, goal.to(own.dtype)))

    # ------------------------------------------------------------------ reports

    def _record(self, step: int, beta: float, flips: Mapping[str, int]) -> MaskChange:
        layers = {name: LayerMaskChange(part.kept, flips[name], part.numel) for name, part in self.parts.items()}
        kept = sum(part.kept for part in self.parts.values())
        return MaskChange(
            step,
            self.adapter,
            density=kept / self.numel,
            flipped=sum(flips.values()) / self.numel,
            beta=beta,
            masked_norm=self._masked_norm(),
            mean_density=self.in_use / (step * self.numel),
            layers=layers,
        )

    def _masked_norm(self) -> float:
        masked_square = square = 0.0
        for part in self.parts.values():
            weight = part.layer.masked_weight((self.adapter,))
            for start, stop in weight.bounds(torch.float32):
                squares = weight.inside([weight.parts[0].tensors], start, stop).square_()
                square += float(squares.sum())
                kept = unpack_bits(weight.parts[0].mask[start:stop], weight.shape[1])
                masked_square += float(squares.masked_fill_(kept, 0).sum())
        return (masked_square / square) ** 0.5 if square else 0.0

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"in_use": self.in_use}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_use = state["in_use"]
        self.parts = {name: self._part(layer) for name, layer in self.layers.items()}
