"""The controller: drives the changes of adapters during training, in any loop."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..dynamics.collectives import Collectives
from ..dynamics.optimizer_state import inner_optimizer, scaler_of
from ..dynamics.protocol import Dynamics, TrainingContext
from ..dynamics.records import Record, record_from_dict
from ..registry import method_of
from ..tuners.base_model import BaseSparseModel
from ..tuners.base_state import TrainedState
from ..tuners.changes import stepped_by
from ..tuners.controller_warning import mark_controlled
from ..tuners.traversal import configs_of
from .rates import check_rates, suited_rates

# Under this key of the first parameter group the state travels with the optimizer's own.
STATE_KEY = "sparse_peft"
# Calls of step() without a step of the optimizer after which something is wrong: a loss scale is halved each time.
MAX_SKIPPED = 64


class SparsityController:
    """Changes a model's adapters during training, as their configs say: positions, ranks, budgets.

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

    Attributes:
        completed_steps: number of optimizer steps taken.
        history: records of changes, such as reselections, oldest first.
        suited_rates: ``{adapter: {"scale": ..., "recommended_rate": ...}}`` of the trained adapters; a learning rate
            that is ten times off causes a warning.

    Raises:
        TypeError: the optimizer is none of torch's.
        ValueError: the optimizer does not train an adapter that it should, or ``total_steps`` is missing.
        NotImplementedError: the model is wrapped in FSDP1.

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
    ):
        self.optimizer = inner_optimizer(optimizer)
        self._scaler = scaler_of(optimizer) if scaler is None else scaler
        self.completed_steps = completed_steps
        self.history: list[Record] = []
        self._stepped = False
        self._skipped = 0
        self._collectives = Collectives(process_group)
        self._dynamics = self._find(model, total_steps)
        self.suited_rates = suited_rates(model, self.optimizer)
        check_rates(model, self.optimizer)
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            self.optimizer.register_state_dict_post_hook(self._add_state),
            self.optimizer.register_load_state_dict_post_hook(self._take_state),
        ]
        self._take_state(self.optimizer)
        self._begin_step()

    def _find(self, model: nn.Module, total_steps: int | None) -> dict[str, Dynamics[Any, Any]]:
        """The dynamics of the adapters that train and change."""
        layers = list(BaseSparseModel.sparse_layers(model))
        found = {}
        for adapter, config in configs_of(model).items():
            mine = {layer.name: layer for layer in layers if adapter in layer.deltas}
            states = [layer.deltas[adapter] for layer in mine.values()]
            trains = any(state.watched.requires_grad for state in states)
            if not trains or not getattr(config, "changes_in_training", False):
                continue
            self._check(model, adapter, states)
            context = TrainingContext(
                adapter, config, mine, self.optimizer, total_steps, self._collectives, self._scaler
            )
            found[adapter] = method_of(config).dynamics_class(context)
            for unreached in config.unreached_events(total_steps):
                warnings.warn(f"adapter {adapter!r}: {unreached}", UserWarning, stacklevel=3)
            for state in states:
                mark_controlled(state)
        return found

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

    # ------------------------------------------------------------------ steps

    def step(self) -> list[Record]:
        """Complete a step; call it after each ``optimizer.step()``, on every process.

        A step that a loss scaler skipped, because gradients were not finite, does not count.

        Returns:
            Records of what changed.
        """
        if not self._stepped:
            self._note_skip()
            return []
        self._stepped, self._skipped = False, 0
        self.completed_steps += 1
        found = [dynamics.after_step(self.completed_steps) for dynamics in self._dynamics.values()]
        records = [record for record in found if record is not None]
        self.history.extend(records)
        self._begin_step()
        return records

    def discard_step(self) -> None:
        """Forget the backward passes since the last step.

        Call it where a loop of your own discards gradients without ``optimizer.step()``.
        """
        for dynamics in self._dynamics.values():
            dynamics.discard_step()

    def close(self) -> None:
        """Remove all hooks; training may go on without the controller."""
        for handle in self._handles:
            handle.remove()
        for dynamics in self._dynamics.values():
            dynamics.close()
        self._dynamics = {}

    def _note_skip(self) -> None:
        self.discard_step()
        self._skipped += 1
        if self._skipped == MAX_SKIPPED and self._dynamics:
            warnings.warn(
                f"SparsityController.step() was called {MAX_SKIPPED} times in a row without a step of the "
                f"{type(self.optimizer).__name__} it was made for, so no positions change; make the controller with "
                "the optimizer that is stepped, and call optimizer.step() first",
                UserWarning,
                stacklevel=3,
            )

    def _begin_step(self) -> None:
        for dynamics in self._dynamics.values():
            dynamics.begin_step(self.completed_steps + 1)

    def _before_step(self, *_: Any) -> None:
        for dynamics in self._dynamics.values():
            dynamics.before_step(self.completed_steps + 1)

    def _after_step(self, *_: Any) -> None:
        self._stepped = True

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, between two steps: tensors, numbers, strings, lists and dicts."""
        return {
            "completed_steps": self.completed_steps,
            "history": [record.to_dict() for record in self.history],
            # torch's distributed state dicts lose empty lists and dicts, and an adapter must not get lost with them
            "adapters": {
                adapter: {"completed_steps": self.completed_steps, **dynamics.state_dict()}
                for adapter, dynamics in self._dynamics.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict``; load the adapter and the optimizer's state before.

        Raises:
            ValueError: the state is of other adapters, layers or positions.
        """
        if set(state["adapters"]) != set(self._dynamics):
            raise ValueError(
                f"the saved state is of the adapters {sorted(state['adapters'])}, but those that change during this "
                f"training are {sorted(self._dynamics)}"
            )
        for adapter, dynamics in self._dynamics.items():
            dynamics.load_state_dict(state["adapters"][adapter])
        self.completed_steps = state["completed_steps"]
        self.history = [record_from_dict(record) for record in state.get("history", [])]
        self._begin_step()

    def _add_state(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if self._dynamics:
            state_dict["param_groups"][0][STATE_KEY] = self.state_dict()
        return state_dict

    def _take_state(self, optimizer: torch.optim.Optimizer) -> None:
        state = optimizer.param_groups[0].pop(STATE_KEY, None)
        if not self._dynamics:
            return
        # a full distributed checkpoint is read by one process, and torch does not send the others this entry
        state = self._collectives.first_not_none(state)
        if state is not None:
            self.load_state_dict(state)
