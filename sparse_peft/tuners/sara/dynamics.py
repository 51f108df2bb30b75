"""SaRA in training: the nuclear norm's gradient, and the freezing of grown entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dynamics.full_tensor import full_tensor, write_full_tensor_
from ...dynamics.optimizer_state import add_gradient_, mask_gradient_
from ...dynamics.protocol import Dynamics, TrainingContext
from ...numerics import sample_without_replacement
from ...ops import expert_parts, nuclear_norm, read_support
from ...support import Support
from ..delta import SparseDelta
from .config import SaRAConfig
from .model import SaRALinear
from .records import Freezing, LayerFreezing


class _Frozen(NamedTuple):
    """Entries that do not train any more.

    Attributes:
        mask: ``(entries,)`` bool.
        values: ``(frozen entries,)``, in the order of the entries.
    """

    mask: Tensor
    values: Tensor


@dataclass
class _Part:
    """One layer's part.

    Attributes:
        layer, delta: the layer, and the adapter's trained state in it.
        frozen: the entries that do not train any more; None while all train.
    """

    layer: SaRALinear
    delta: SparseDelta
    frozen: _Frozen | None = None

    @property
    def support(self) -> Support:
        return self.delta.support

    def originals(self) -> Tensor:
        """``(entries,)`` float32: the base's own entries."""
        if self.layer.merged:
            raise RuntimeError(
                f"layer {self.layer.name}: its own weights cannot be read while adapters are merged "
                f"({', '.join(self.layer.merged_adapters)}); call unmerge_adapter() before training goes on"
            )
        self.layer.release()
        return read_support(full_tensor(self.layer.dense_base_weight()), self.support).to(torch.float32)

    def weights(self) -> Tensor:
        """``(entries,)`` float32: the effective entries."""
        return self.originals() + self.delta.scaled(full_tensor(self.delta.values).to(torch.float32))

    @property
    def smaller_side(self) -> int:
        """Rows or columns of the weight, or of one expert's, whichever are fewer."""
        rows, cols = self.support.shape
        return min(rows // self.layer.matrices, cols)

    def nuclear_gradient(self, weights: Tensor) -> Tensor:
        """``(entries,)``: the gradient of the nuclear norm of the trained entries, of each expert's by itself."""
        if self.layer.matrices == 1:
            return nuclear_norm(weights, self.support)[1]
        parts = expert_parts(self.support, self.layer.matrices)
        return torch.cat([nuclear_norm(weights[first:last], part)[1] for part, first, last in parts if last > first])

    def freeze(self, mask: Tensor) -> None:
        self.frozen = _Frozen(mask, full_tensor(self.delta.values)[mask].clone()) if bool(mask.any()) else None


class SaRADynamics(Dynamics[SaRAConfig, SaRALinear]):
    """The dynamics of one [`SaRAConfig`][sparse_peft.SaRAConfig] adapter.

    Args:
        context: see ``TrainingContext``.

    Raises:
        ValueError: the config needs the length of the run and it is not known.
    """

    takes_partitions = True

    def __init__(self, context: TrainingContext[SaRAConfig, SaRALinear]):
        super().__init__(context)
        self.freezing_step = self.config.freezing_step(context.total_steps)
        self.parts = {
            name: _Part(layer, layer.deltas[self.adapter])
            for name, layer in self.layers.items()
            if layer.deltas[self.adapter].support.nnz
        }
        # all processes pick the same layers, even with different seeds
        device = next(iter(self.layers.values())).deltas[self.adapter].values.device
        self.seed = int(self.collectives.from_first(torch.tensor([self.config.seed], device=device)))

    # ------------------------------------------------------------------ the course of a step

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        for part in self._regularised(step):
            self._add_nuclear_gradient(part)
        for part in self.parts.values():
            if part.frozen is not None:
                mask_gradient_(self.optimizer, part.delta.values, part.frozen.mask)

    @torch.no_grad()
    def after_step(self, step: int) -> Freezing | None:
        for part in self.parts.values():
            # without a gradient an entry still moves by weight decay and by its momentum
            if part.frozen is not None:
                values = full_tensor(part.delta.values).clone()
                values[part.frozen.mask] = part.frozen.values.to(values.dtype)
                write_full_tensor_(part.delta.values, values)
        return self._freeze(step) if step == self.freezing_step else None

    # ------------------------------------------------------------------ nuclear norm

    def _regularised(self, step: int) -> list[_Part]:
        """The layers with a nuclear norm in this step; the same on every process, and after resuming."""
        if self.config.nuclear_weight == 0 or step % self.config.nuclear_every:
            return []
        eligible = [part for part in self.parts.values() if part.smaller_side > self.config.nuclear_min_size]
        if self.config.nuclear_matrices == "all" or not eligible:
            return eligible
        name = f"nuclear norm of {self.adapter}, step {step}"
        (number,) = sample_without_replacement(len(eligible), 1, seed=self.seed, name=name).tolist()
        return [eligible[number]]

    def _add_nuclear_gradient(self, part: _Part) -> None:
        weights = part.weights()
        if part.frozen is not None:
            weights = weights.masked_fill(part.frozen.mask, 0)
        gradient = part.nuclear_gradient(weights)
        gradient *= self.config.nuclear_weight * self.config.nuclear_every * part.delta.value_scale
        add_gradient_(self.optimizer, part.delta.values, gradient)

    # ------------------------------------------------------------------ freezing

    def _thresholds(self) -> dict[str, float]:
        """Each layer's absolute value from which on entries freeze."""
        if self.config.threshold is not None:
            return dict.fromkeys(self.parts, self.config.threshold)
        # the next number above the largest chosen weight, which is therefore below the threshold
        largest = {name: part.originals().abs().amax() for name, part in self.parts.items()}
        if self.config.allocation == "global":
            most = torch.stack([value.cpu() for value in largest.values()]).amax()
            largest = dict.fromkeys(self.parts, most)
        above = {name: torch.nextafter(value, torch.full_like(value, torch.inf)) for name, value in largest.items()}
        return {name: float(value) for name, value in above.items()}

    def _freeze(self, step: int) -> Freezing:
        changes = {}
        for name, threshold in self._thresholds().items():
            part = self.parts[name]
            part.freeze(part.weights().abs() >= threshold)
            rows, cols = part.support.shape
            frozen = 0 if part.frozen is None else int(part.frozen.mask.sum())
            changes[name] = LayerFreezing(part.support.nnz, frozen, rows * cols, threshold)
        return Freezing(step, self.adapter, changes)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        frozen = {name: part.frozen for name, part in self.parts.items() if part.frozen is not None}
        return {"frozen": {name: {"mask": f.mask.clone(), "values": f.values.clone()} for name, f in frozen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part in self.parts.values():
            part.frozen = None
        for name, saved in state.get("frozen", {}).items():
            if name not in self.parts or saved["mask"].shape != (self.parts[name].support.nnz,):
                raise ValueError(
                    f"layer {name}: the saved state of adapter {self.adapter} has {saved['mask'].numel()} entries "
                    "there, which are not this model's; resume with the config and adapter the run was started with"
                )
            device = self.parts[name].delta.values.device
            self.parts[name].frozen = _Frozen(saved["mask"].to(device), saved["values"].to(device))
