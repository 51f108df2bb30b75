"""SNELLA in training: layers compete for the entries that are kept, by their sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...dynamics.full_tensor import full_tensor
from ...dynamics.optimizer_state import gradient_of
from ...dynamics.protocol import Dynamics, TrainingContext
from ...dynamics.zero import shape_of
from ...support import apportion
from .config import SnellaConfig
from .layer import SnellaLinear
from .records import Allocation, LayerAllocation
from .state import KernelState

# The parameters whose sensitivity is measured.
FACTORS = ("A", "B")


@dataclass
class _Part:
    """One layer's part.

    Attributes:
        state: the adapter's trained state in the layer.
        sensitivity: ``{factor: average of |parameter * gradient|}``, float32.
        uncertainty: ``{factor: average of the absolute deviation of sensitivity}`` (AdaLoRA), float32.
    """

    state: KernelState
    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    uncertainty: dict[str, Tensor] = field(default_factory=dict)

    def score(self) -> Tensor:
        """The mean over each factor of sensitivity times uncertainty, added; 0-d."""
        return torch.stack([(self.sensitivity[name] * self.uncertainty[name]).mean() for name in FACTORS]).sum()


class SnellaDynamics(Dynamics[SnellaConfig, SnellaLinear]):
    """The dynamics of one [`SnellaConfig`][sparse_peft.SnellaConfig] adapter with a target.

    Sensitivity and uncertainty are averaged in every step, from gradients and parameters before the optimizer steps.
    Steps with gradients that are not finite are left out.

    Args:
        context: see ``TrainingContext``.

    Raises:
        ValueError: the config needs the length of the run and it is not known, or the target is below the entries that
            layers keep at least.
    """

    takes_partitions = True

    def __init__(self, context: TrainingContext[SnellaConfig, SnellaLinear]):
        super().__init__(context)
        self.parts: dict[str, _Part] = {}
        for name, layer in self.layers.items():
            state = layer.deltas[self.adapter]
            zeros = {
                which: torch.zeros(shape_of(getattr(state, which)), device=state.A.device, dtype=torch.float32)
                for which in FACTORS
            }
            self.parts[name] = _Part(state, zeros, {which: tensor.clone() for which, tensor in zeros.items()})
        sizes = [part.state.numel for part in self.parts.values()]
        initial = sum(self.config.kept(size) for size in sizes)
        self.schedule = self.config.budget_schedule(initial, sum(sizes), context.total_steps)
        least = sum(min(self.config.at_least, size) for size in sizes)
        if self.schedule.target < least:
            raise ValueError(
                f"target_sparsity={self.config.target_sparsity} of adapter {self.adapter} leaves "
                f"{self.schedule.target} of {sum(sizes)} entries, and at_least={self.config.at_least} of each of "
                f"{len(sizes)} layers are {least}; lower one of them"
            )

    # ------------------------------------------------------------------ the course of a step

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        if step > self.schedule.stop:
            return
        observed: dict[tuple[str, str], Tensor] = {}
        for name, part in self.parts.items():
            for which in FACTORS:
                parameter = getattr(part.state, which)
                gradient = gradient_of(self.optimizer, parameter)
                if gradient is None:
                    gradient = torch.zeros_like(part.sensitivity[which])
                observed[name, which] = (full_tensor(parameter).float() * gradient.float()).abs_()
        if not self._all_finite(list(observed.values())):
            return
        for (name, which), seen in observed.items():
            part = self.parts[name]
            part.sensitivity[which].lerp_(seen, 1 - self.config.beta1)
            off = (seen - part.sensitivity[which]).abs_()
            part.uncertainty[which].lerp_(off, 1 - self.config.beta2)

    def _all_finite(self, tensors: list[Tensor]) -> bool:
        good = torch.stack([tensor.isfinite().all() for tensor in tensors]).all().float()
        return float(self.collectives.mean(good)) == 1.0

    @torch.no_grad()
    def after_step(self, step: int) -> Allocation | None:
        if not self.schedule.is_event(step):
            return None
        budget, scores = self.schedule.at(step), self.scores()
        counts = self.share(scores, budget)
        for name, part in self.parts.items():
            part.state.keep(counts[name])
        layers = {
            name: LayerAllocation(counts[name], part.state.numel, scores[name]) for name, part in self.parts.items()
        }
        return Allocation(step, self.adapter, budget, layers)

    # ------------------------------------------------------------------ sharing

    def scores(self) -> dict[str, float]:
        """Each layer's share of all layers' scores, equal on all processes; zeros if nothing was seen."""
        scores = self.collectives.mean(torch.stack([part.score() for part in self.parts.values()]))
        scores = scores.double()
        total = scores.sum()
        return dict(zip(self.parts, (scores / total if bool(total > 0) else scores * 0).tolist(), strict=True))

    def share(self, scores: dict[str, float], budget: int) -> dict[str, int]:
        """Entries of each layer in proportion to the scores, at most all of it, ``budget`` in all.

        Without any score, all layers are equally sparse.
        """
        sizes = {name: part.state.numel for name, part in self.parts.items()}
        weights: Mapping[str, float] = scores
        if not any(weights.values()):
            weights = sizes
        elif self.config.weigh_by_size:
            weights = {name: score * sizes[name] for name, score in scores.items()}
        counts = apportion(list(weights.values()), list(sizes.values()), budget, self.config.at_least)
        return dict(zip(sizes, counts, strict=True))

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "layers": {
                name: {
                    f"{kind}_{which}": getattr(part, kind)[which].clone()
                    for kind in ("sensitivity", "uncertainty")
                    for which in FACTORS
                }
                for name, part in self.parts.items()
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the saved run was; the adapter, which has the layers' entries, is loaded before.

        Raises:
            ValueError: the state is of other layers or of another rank.
        """
        for name, part in self.parts.items():
            saved = state["layers"].get(name)
            for kind in ("sensitivity", "uncertainty"):
                for which, tensor in getattr(part, kind).items():
                    found = None if saved is None else saved.get(f"{kind}_{which}")
                    if found is None or found.shape != tensor.shape:
                        has = "nothing" if found is None else f"shape {tuple(found.shape)}"
                        raise ValueError(
                            f"layer {name}: the saved state of adapter {self.adapter} has {has} for the {kind} of "
                            f"{which}, this model's has shape {tuple(tensor.shape)}; resume with the config the run "
                            "was started with"
                        )
                    tensor.copy_(found)
