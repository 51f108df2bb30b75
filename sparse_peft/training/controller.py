"""The controller: drives the changes of adapters during training, in any loop."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..dynamics.collectives import Collectives
from ..dynamics.optimizer_state import scaler_of
from ..dynamics.protocol import Dynamics, TrainingContext
from ..dynamics.records import Record
from ..dynamics.zero import ZeroOptimizer, keep_whole
from ..procedures.driver import StepDriver
from ..procedures.procedure import Procedure, TrainingRun, started
from ..registry import method_of
from ..tuners.agreement import check_agreement
from ..tuners.base_model import BaseSparseModel
from ..tuners.base_state import TrainedState
from ..tuners.changes import stepped_by
from ..tuners.controller_warning import mark_controlled
from ..tuners.tensor_parallel import averaging_processes
from ..tuners.traversal import configs_of
from .rates import check_rates, suited_rates


class SparsityController(StepDriver):
    """Changes a model's adapters during training, as their configs say: positions, ranks, budgets; runs procedures.

    Make it after the optimizer, and call ``step`` after each ``optimizer.step()``. Its state is saved and restored
    with the optimizer's: ``optimizer.state_dict()`` holds it. A controller made for an optimizer whose state was
    loaded continues from there. Load the adapter before.

    Args:
        model: the PEFT model, wrapped or not (DDP, accelerate, ``fully_shard``).
        optimizer: a torch optimizer, or accelerate's wrapper of one.
        total_steps: optimizer steps of the whole run; needed where a config gives start or stop as shares.
        completed_steps: steps done before, where the optimizer's state does not say.
        process_group: the processes whose gradients are averaged; None for all of them.
        scaler: the ``GradScaler`` of a loop of your own, needed with SoRA's ``l1_weight``; accelerate's optimizer
            brings its own.
        procedures: what acts around the training of any PEFT adapter, such as
            [`LayerSampling`][sparse_peft.procedures.LayerSampling].

    Attributes:
        completed_steps: number of optimizer steps taken.
        history: records of changes, such as reselections, oldest first.
        suited_rates: ``{adapter: {"scale": ..., "recommended_rate": ...}}`` of the trained adapters; a learning rate
            that is ten times off causes a warning.

    Raises:
        TypeError: the optimizer is none of torch's.
        RuntimeError: processes have different positions.
        ValueError: the optimizer does not train an adapter that it should, or ``total_steps`` is missing.
        NotImplementedError: the model is wrapped in FSDP1, or an adapter came after FSDP.

    Example:
        >>> import torch
        >>> from peft import get_peft_model

        >>> from sparse_peft import SparseConfig, SparsityController
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> config = SparseConfig(selection="rigl", density=0.05, reselect_every=2, target_modules=["0"])
        >>> model = get_peft_model(base, config)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> controller = SparsityController(model, optimizer, total_steps=4)
        >>> for _ in range(4):
        ...     model(torch.ones(8, 64)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = controller.step()
        ...     optimizer.zero_grad()
        >>> len(controller.history), controller.history[-1].step
        (2, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        total_steps: int | None = None,
        *,
        completed_steps: int = 0,
        process_group: dist.ProcessGroup | None = None,
        scaler: torch.amp.GradScaler | None = None,
        procedures: Sequence[Procedure] = (),
    ):
        super().__init__(optimizer, completed_steps, process_group)
        self.collectives = averaging_processes(model, process_group)
        self._processes = Collectives(process_group)  # which must have the same positions
        self._trained: dict[str, dict[str, TrainedState]] = {}
        self._scaler = scaler_of(optimizer) if scaler is None else scaler
        dynamics = self._find(model, total_steps)
        self.suited_rates = suited_rates(model, self.optimizer)
        check_rates(model, self.optimizer)
        run = TrainingRun(model, self.optimizer, total_steps, self.collectives, self._scaler, self.discard_step)
        around = started(procedures, run)
        self.drive({"adapters": dynamics, **({"procedures": around} if around else {})})

    def _find(self, model: nn.Module, total_steps: int | None) -> dict[str, Dynamics[Any, Any]]:
        """The dynamics of the adapters that train and change."""
        layers = list(BaseSparseModel.sparse_layers(model))
        found = {}
        for adapter, config in configs_of(model).items():
            mine = {layer.name: layer for layer in layers if adapter in layer.deltas}
            states = [layer.deltas[adapter] for layer in mine.values()]
            trains = any(state.watched.requires_grad for state in states)
            if trains:
                for layer in mine.values():
                    layer.check_trainable(adapter)
                keep_whole(parameter for state in states for parameter in state.parameters())
                self._trained[adapter] = {layer.name: layer.deltas[adapter] for layer in mine.values()}
                check_agreement(adapter, self._trained[adapter], self._processes)
            if not trains or not getattr(config, "changes_in_training", False):
                continue
            self._check(model, adapter, states)
            context = TrainingContext(
                adapter, config, mine, self.optimizer, total_steps, self.collectives, self._scaler
            )
            kind = method_of(config).dynamics_class
            if isinstance(self.optimizer, ZeroOptimizer):
                self._check_partitions(adapter, kind, config, states)
            found[adapter] = kind(context)
            for unreached in config.unreached_events(total_steps):
                warnings.warn(f"adapter {adapter!r}: {unreached}", UserWarning, stacklevel=3)
            for state in states:
                mark_controlled(state)
        return found

    def _check_partitions(self, adapter: str, kind: type[Dynamics[Any, Any]], config: Any, states: Any) -> None:
        """Refuse changes that an optimizer with a partitioned state does not let a method make."""
        optimizer = cast("ZeroOptimizer", self.optimizer)
        if not kind.takes_partitions:
            raise NotImplementedError(
                f"adapter {adapter!r}: {type(config).__name__} changes parameters or the optimizer's state during "
                f"training in a way that {optimizer.kind} of DeepSpeed, which partitions them, does not let it; use "
                "DDP or FSDP2"
            )
        parameters = [parameter for state in states for parameter in state.parameters()]
        optimizer.watch({id(parameter): parameter for parameter in parameters if parameter.requires_grad})

    def step(self) -> list[Record]:
        records = super().step()
        if records and not self._processes.alone:
            for adapter, states in self._trained.items():
                check_agreement(adapter, states, self._processes)
        return records

    def _check(self, model: nn.Module, adapter: str, states: Sequence[TrainedState]) -> None:
        """Refuse an optimizer and a wrapped model that the adapter cannot change with."""
        trained = stepped_by(self.optimizer)
        if not all(id(state.watched) in trained for state in states):
            raise ValueError(
                f"the optimizer does not train the values of adapter {adapter!r}: make it from the parameters the "
                "model has now, after get_peft_model, load_adapter and any wrapping, and the controller after it"
            )
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise NotImplementedError(
                f"adapter {adapter!r} changes its positions during training, which FSDP1's flat parameters do not "
                "let it; use FSDP2 (fully_shard, or fsdp_version: 2), DDP, or a static selection"
            )
