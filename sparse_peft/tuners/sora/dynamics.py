"""SoRA in training: the gates' proximal step, a budget of ranks, and the removal of dead ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dynamics.full_tensor import full_tensor, write_full_tensor_
from ...dynamics.loss_term import LossTerm
from ...dynamics.optimizer_state import add_gradient_, replace_parameter
from ...dynamics.protocol import Dynamics, TrainingContext
from ...dynamics.step_param_group import StepParamGroup
from ...ops import PROXIMAL_OPERATORS, log_once
from ...support import steps_of
from .config import SoRAConfig
from .layer import SoRALinear
from .records import LayerRanks, Ranks
from .state import GatedLowRank

# How fast the penalty follows the number of ranks: by this power of e per step if all ranks are in excess.
GAIN = 0.3
MOST = 1e3
# Names of the second moment in the state of optimizers like Adam.
SECOND_MOMENTS = ("exp_avg_sq", "state2")
# The ranks' dimension of each parameter.
RANK_DIMS = {"A": 0, "B": 1, "gate": 0}


@dataclass
class _Part:
    """One layer's part.

    Attributes:
        state: the adapter's trained state in the layer.
        initial: ranks it began with.
        locked: ``(rank,)`` bool, the ranks that stay zero; None for none.
        dead_for: ``(rank,)`` int64, number of steps that each rank has been zero for.
    """

    state: GatedLowRank
    initial: int
    dead_for: Tensor
    locked: Tensor | None = None

    @property
    def gate(self) -> Tensor:
        return self.state.gate

    def strengths(self, gate: Tensor) -> Tensor:
        a, b = full_tensor(self.state.A).float(), full_tensor(self.state.B).float()
        return gate.abs() * a.norm(dim=1) * b.norm(dim=0)


class SoRADynamics(Dynamics[SoRAConfig, SoRALinear]):
    """The dynamics of one [`SoRAConfig`][sparse_peft.SoRAConfig] adapter.

    Args:
        context: see ``TrainingContext``.

    Raises:
        ValueError: the config needs the length of the run and it is not known.
        NotImplementedError: ``compact_every`` in a distributed run.
    """

    def __init__(self, context: TrainingContext[SoRAConfig, SoRALinear]):
        super().__init__(context)
        config = self.config
        self.schedule = config.penalty_schedule(context.total_steps)
        self.target_step = None
        if config.target_rank is not None:
            self.target_step = max(1, steps_of(config.target_step, context.total_steps, "target_step"))
        if config.compact_every is not None and not self.collectives.alone:
            raise NotImplementedError(
                f"compact_every={config.compact_every} of adapter {self.adapter} in a run of "
                f"{self.collectives.size} processes: DDP and FSDP fix the parameters' sizes when they wrap the "
                "model; use compact_every=None, or train in one process"
            )
        self.operator = PROXIMAL_OPERATORS[config.operator]
        self.multiplier = 1.0
        self.parts: dict[str, _Part] = {}
        for name, layer in self.layers.items():
            state = layer.deltas[self.adapter]
            dead_for = torch.zeros(state.rank, dtype=torch.int64, device=state.gate.device)
            self.parts[name] = _Part(state, (config.ranks or {}).get(name, state.rank), dead_for)
        self.total = sum(part.initial for part in self.parts.values())
        gates = [part.gate for part in self.parts.values()]
        self.group = StepParamGroup(self.optimizer, gates, config.gate_lr_scale)
        self.l1_term = LossTerm(gates if config.l1_weight else (), self._l1_gradient, context.scaler)

    # ------------------------------------------------------------------ the course of a step

    def begin_step(self, step: int) -> None:
        self.l1_term.begin_step()

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        for part in self.parts.values():
            if self.l1_term.misses(part.gate):
                add_gradient_(self.optimizer, part.gate, full_tensor(self._l1_gradient(part.gate)))

    def _l1_gradient(self, gate: Tensor) -> Tensor:
        return gate.detach().sign() * (self.config.l1_weight / self.total)

    @torch.no_grad()
    def after_step(self, step: int) -> Ranks | None:
        before = {name: full_tensor(part.gate) for name, part in self.parts.items()}
        self._check(before)
        penalty = self._penalty(step)
        gates = self._shrunk(before, penalty, step)
        target = self.config.target_of(self.total)
        if target is not None and self.target_step is not None and step <= self.target_step:
            gates = self._towards_target(before, gates, step, target, self.target_step)
        for name, part in self.parts.items():
            gate = gates[name]
            if part.locked is not None:
                gate = gate.masked_fill(part.locked, 0)
            if gate is not before[name]:
                write_full_tensor_(part.gate, gate)
            part.dead_for = torch.where(gate == 0, part.dead_for + 1, 0)
        if self.config.compact_every is not None:
            self._compact(self.config.compact_every)
        return self._report(step, penalty) if self._reports(step) else None

    def discard_step(self) -> None:
        self.l1_term.begin_step()

    def close(self) -> None:
        self.group.close()
        self.l1_term.close()

    def _check(self, gates: dict[str, Tensor]) -> None:
        for name, gate in gates.items():
            if gate.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"layer {name}: the gate of adapter {self.adapter} is {gate.dtype}, too coarse for a proximal "
                    "step; keep gates in float32: cast the model before the adapter is made, or call "
                    "`layer.deltas[name].gate.data = gate.float()`"
                )

    # ------------------------------------------------------------------ the proximal step

    def _penalty(self, step: int) -> float:
        if self.target_step is not None and step >= self.target_step:
            return 0.0
        return self.schedule.at(step) * self.multiplier

    def _shrunk(self, gates: dict[str, Tensor], penalty: float, step: int) -> dict[str, Tensor]:
        if penalty == 0:
            return dict(gates)
        return {name: self.operator(gate, self._threshold(name, penalty)) for name, gate in gates.items()}

    def _threshold(self, name: str, penalty: float) -> Tensor | float:
        if self.config.prox == "constant":
            return penalty
        gate = self.parts[name].gate
        threshold = self.group.rates.get(id(gate), 0.0) * penalty
        if self.config.prox == "lr":
            return threshold
        return (threshold / self._root_of_second_moment(name, gate)).clamp_(max=self.config.max_threshold)

    def _root_of_second_moment(self, name: str, gate: Tensor) -> Tensor:
        """The root that Adam divides the gate's steps by, without its bias."""
        state = self.optimizer.state.get(gate) or {}
        group = next(group for group in self.optimizer.param_groups if any(p is gate for p in group["params"]))
        moment = next((state[key] for key in SECOND_MOMENTS if key in state), None)
        if moment is None or moment.shape != gate.shape or not moment.is_floating_point():
            raise ValueError(
                f"prox='adam' of adapter {self.adapter}: {type(self.optimizer).__name__} keeps no second moment "
                f"in floats of the gate of layer {name}; use Adam or AdamW, or prox='lr'"
            )
        corrected = full_tensor(moment).float() / (1 - group["betas"][1] ** float(state["step"]))
        return corrected.sqrt().add_(group["eps"])

    # ------------------------------------------------------------------ a budget of ranks

    def _towards_target(
        self, before: dict[str, Tensor], after: dict[str, Tensor], step: int, target: int, end: int
    ) -> dict[str, Tensor]:
        """Adapt the penalty; keep at least the target's ranks, and exactly these at step ``end``."""
        alive = sum(int((gate != 0).sum()) for gate in after.values())
        if alive < target:
            after = self._keep_strongest(before, after, target)
        elif step == end:
            after = self._keep_strongest(after, after, target)
        if step == end:
            for name, part in self.parts.items():
                part.locked = after[name] == 0
        start = self.schedule.start
        if start < step < end:
            wanted = target + (self.total - target) * (1 - (step - start) / (end - start)) ** 3
            change = math.exp(GAIN * (alive - wanted) / self.total)
            self.multiplier = min(MOST, max(1 / MOST, self.multiplier * change))
        return after

    def _keep_strongest(self, gates: dict[str, Tensor], shrunk: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """Keep the ``count`` strongest gates that are not zero; ``shrunk`` has their values where it is not zero."""
        names = list(gates)
        strengths = torch.cat([self.parts[name].strengths(gates[name]) for name in names])
        alive = torch.cat([gates[name] != 0 for name in names])
        # ranks that are zero come last: in a new adapter all strengths are zero
        order = torch.where(alive, strengths, strengths.new_full((), -1.0)).argsort(descending=True, stable=True)
        kept = torch.zeros_like(alive)
        kept[order[:count]] = True
        kept &= alive
        result = {}
        for name, mask in zip(names, kept.split([gates[name].numel() for name in names]), strict=True):
            gate = torch.where(shrunk[name] == 0, gates[name], shrunk[name])
            result[name] = gate.masked_fill(~mask, 0)
        return result

    # ------------------------------------------------------------------ compaction

    def _compact(self, dead_for: int) -> None:
        """Cut out ranks that were zero for ``dead_for`` steps."""
        for name, part in self.parts.items():
            keep = (part.dead_for < dead_for).nonzero().squeeze(1)
            if keep.numel() == part.dead_for.numel():
                continue
            if not self._can_slice(part):
                log_once(
                    f"compact_every: {type(self.optimizer).__name__} keeps its state in a form that cannot be cut; "
                    f"dead ranks stay where they are, as in layer {name}"
                )
                return
            self._slice(part, keep)
            self.config.ranks = {**(self.config.ranks or {}), name: keep.numel()}

    def _can_slice(self, part: _Part) -> bool:
        return all(
            not isinstance(tensor, Tensor) or tensor.numel() == 1 or tensor.shape == parameter.shape
            for name, parameter in part.state.own_parameters.items()
            for tensor in (self.optimizer.state.get(parameter) or {}).values()
        )

    def _slice(self, part: _Part, keep: Tensor) -> None:
        """Cut the other ranks out of the parameters and of the optimizer's state."""
        state = part.state
        old = state.own_parameters
        state.resize(keep.numel())
        for name, new in state.own_parameters.items():
            dim = RANK_DIMS[name]
            new.copy_(old[name].index_select(dim, keep))
            replace_parameter(self.optimizer, old[name], new)
            moments = self.optimizer.state.get(new) or {}
            for key, tensor in list(moments.items()):
                if isinstance(tensor, Tensor) and tensor.shape == old[name].shape and tensor.numel() > 1:
                    moments[key] = tensor.index_select(dim, keep)
        self.group.replace(old["gate"], state.gate)
        self.l1_term.replace(old["gate"], state.gate)
        part.dead_for = part.dead_for[keep]
        part.locked = None if part.locked is None else part.locked[keep]

    # ------------------------------------------------------------------ reports

    def _reports(self, step: int) -> bool:
        return step % self.config.report_every == 0 or step == self.target_step

    def _report(self, step: int, penalty: float) -> Ranks:
        layers = {
            name: LayerRanks(int((full_tensor(part.gate) != 0).sum()), part.state.rank, part.initial)
            for name, part in self.parts.items()
        }
        return Ranks(step, self.adapter, penalty, layers)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "multiplier": self.multiplier,
            "layers": {
                name: {
                    "initial": part.initial,
                    "dead_for": part.dead_for.clone(),
                    **({} if part.locked is None else {"locked": part.locked.clone()}),
                }
                for name, part in self.parts.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            saved = state["layers"].get(name)
            if saved is None or saved["dead_for"].shape != (part.state.rank,):
                has = "none" if saved is None else saved["dead_for"].numel()
                raise ValueError(
                    f"layer {name}: the saved state of adapter {self.adapter} has {has} ranks there, this model's has "
                    f"{part.state.rank}; resume with the config and adapter the run was started with"
                )
            device = part.gate.device
            part.initial, part.dead_for = saved["initial"], saved["dead_for"].to(device)
            part.locked = saved["locked"].to(device) if "locked" in saved else None
        self.multiplier = state["multiplier"]
        self.total = sum(part.initial for part in self.parts.values())
