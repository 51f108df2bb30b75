"""An anchor: a pull to the start, weighted by Fisher information, and entries given back (PSMT, EWC)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from ..constraints import Count, Limits, PositiveOrZero
from ..dynamics.loss_term import LossTerm
from ..dynamics.optimizer_state import add_gradient_, gradient_of
from ..dynamics.protocol import Moments
from ..numerics import order_statistics
from ..tuners.traversal import configs_of
from .procedure import LossFn, Procedure, TrainingRun

Quantile = Annotated[float, Limits(least=0, below=1, noun="a share")]


@dataclass(frozen=True)
class FisherAnchor(Procedure):
    """Hold what old data need near its start, and give entries back that new data hardly use.

    The loss gets the term ``weight * sum F (p - p0)^2`` over the adapters' parameters ``p``, as in elastic weight
    consolidation (https://arxiv.org/abs/1612.00796): ``p0`` is the start of the run and ``F`` the Fisher information,
    here the mean of the squared gradients of old batches. After each step the entries whose gradient is at most the
    quantile ``restore`` over all adapters return to ``p0`` (PSMT, https://arxiv.org/abs/2407.02253). With a sparse
    delta that started at zero these are entries of the base weight itself.

    Fisher information is a mean over samples: with batches of several samples it is that of their mean gradients,
    which is smaller. It and ``p0`` are two copies of the adapters' parameters, in checkpoints too.

    Args:
        batches: of old data, each used once at the start; none are needed with ``weight=0``.
        loss_fn: ``loss_fn(model, batch) -> scalar``; by default ``model(**batch).loss``.
        weight: of the pull.
        restore: share of the entries, by their gradients, that return to the start; 0 for none.
        every: optimizer steps from one return to the next.

    Raises:
        ValueError: a weight without batches, or neither weight nor restore.

    Example:
        >>> from sparse_peft import SparsityCallback
        >>> from sparse_peft.procedures import FisherAnchor
        >>> callback = SparsityCallback(procedures=[FisherAnchor(weight=0, restore=0.03)])  # of any trainer
    """

    batches: Iterable[Any] | None = None
    loss_fn: LossFn | None = None
    weight: PositiveOrZero = 500.0
    restore: Quantile = 0.03
    every: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight and self.batches is None:
            raise ValueError(
                f"weight={self.weight:g} without batches: the pull is weighted by gradients of old data; pass "
                "batches=[...], or weight=0"
            )
        if not self.weight and not self.restore:
            raise ValueError("weight=0 with restore=0: nothing is held and nothing returns; give one of them")

    def start(self, run: TrainingRun) -> Anchor:
        moving = [name for name, config in configs_of(run.unwrapped).items() if _moves(config)]
        if moving:
            raise ValueError(
                f"FisherAnchor: adapter {moving[0]!r} changes what its parameters mean during training, so they have "
                "no start to return to; use a static selection"
            )
        return Anchor(self, run)


def _moves(config: Any) -> bool:
    return bool(getattr(config, "changes_in_training", False))


class Anchor(Moments):
    """The anchor of one training.

    Attributes:
        start: ``{parameter name: its values at the start}``.
        fisher: ``{parameter name: Fisher information}``; empty without a weight.
    """

    def __init__(self, config: FisherAnchor, run: TrainingRun):
        self.config, self.run = config, run
        self.parameters = run.parameters()
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.start: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}
        self._returns: dict[str, Tensor] = {}
        self.term = LossTerm(self.parameters.values() if config.weight else (), self._pull, run.scaler)

    def begin_step(self, step: int) -> None:
        self.term.begin_step()
        if not self.start:
            self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            self.fisher = self._measure() if self.config.weight else {}

    def _measure(self) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        count = 0
        for gradients in self.run.gradients(self.config.batches or (), self.config.loss_fn, self.parameters):
            count += 1
            for name, gradient in gradients.items():
                sums[name] += gradient.square()
        if count == 0:
            raise ValueError("FisherAnchor: batches has none (left); pass a list or a loader that can be read again")
        return {name: self.run.collectives.mean(total) / count for name, total in sums.items()}

    def _pull(self, parameter: Tensor) -> Tensor:
        name = self.names[id(parameter)]
        return 2 * self.config.weight * self.fisher[name] * (parameter.detach() - self.start[name])

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        for parameter in self.parameters.values():
            if parameter.requires_grad and self.term.misses(parameter):
                add_gradient_(self.run.optimizer, parameter, self._pull(parameter))
        self._returns = self._weakest() if self.config.restore and step % self.config.every == 0 else {}

    def _weakest(self) -> dict[str, Tensor]:
        """Masks of the entries whose gradient is at most the quantile."""
        found = {name: gradient_of(self.run.optimizer, p) for name, p in self.parameters.items()}
        sizes = {name: gradient.abs().float() for name, gradient in found.items() if gradient is not None}
        total = sum(size.numel() for size in sizes.values())
        rank = int(self.config.restore * total)
        if rank == 0:
            return {}
        (threshold,) = order_statistics(lambda: sizes.values(), [rank])
        # ties of the quantile go, too: many gradients may be zero, and their entries are used least
        return {name: size <= threshold.to(size.device) for name, size in sizes.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for name, mask in self._returns.items():
            parameter = self.parameters[name]
            parameter.copy_(torch.where(mask, self.start[name], parameter))
        self._returns = {}

    def discard_step(self) -> None:
        self.term.begin_step()

    def close(self) -> None:
        self.term.close()

    def state_dict(self) -> dict[str, Any]:
        copies = {name: tensor.clone() for name, tensor in self.fisher.items()}
        start = {name: tensor.clone() for name, tensor in self.start.items()}
        return {"start": start, **({"fisher": copies} if copies else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        if {name: tensor.shape for name, tensor in state["start"].items()} != shapes:
            raise ValueError(
                f"the saved state of {self.config.name} is of other parameters than the {len(shapes)} that train now; "
                "resume with the config the run was started with"
            )
        self.start, self.fisher = (self._placed(state.get(kind, {})) for kind in ("start", "fisher"))

    def _placed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.parameters[name]) for name, tensor in tensors.items()}
