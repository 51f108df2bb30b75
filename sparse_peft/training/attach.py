"""Controllers for training loops that take neither a callback nor a call after each step."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..dynamics.optimizer_state import inner_optimizer
from ..dynamics.records import Record
from ..support.schedules import ENDLESS
from ..tuners.base_model import BaseSparseModel
from ..tuners.base_state import TrainedState
from ..tuners.changes import stepped_by
from ..tuners.controller_warning import end_attachment, lacks_controller, mark_controlled, require_controller
from ..tuners.traversal import configs_of
from .controller import SparsityController

# Training passes in which an optimizer is looked for; a loop may make it after its first pass.
SEARCHES = 3


class Attachment:
    """A controller that is made at a model's first training pass and steps with its optimizer; see ``attach``.

    Attributes:
        controller: the [`SparsityController`][sparse_peft.SparsityController]; None before the first training pass,
            and where another controller or a callback is in charge.
    """

    def __init__(
        self, model: nn.Module, total_steps: int | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self.controller: SparsityController | None = None
        self._total_steps, self._scaler = total_steps, scaler
        self._states = list(_moving_states(model))
        self._searches = 0
        self._step_handle: Any = None
        self._forward_handle = model.register_forward_pre_hook(self._before_forward)

    @property
    def history(self) -> list[Record]:
        """Records of changes, oldest first."""
        return [] if self.controller is None else self.controller.history

    def close(self) -> None:
        """Remove all hooks; training may go on without changes."""
        self._forward_handle.remove()
        if self.controller is not None:
            self._step_handle.remove()
            self.controller.close()

    # ------------------------------------------------------------------ moments of training

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, _: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        if self.controller is None:
            self._begin(model)
        elif self._gradients_are_gone():
            # after a step this changes nothing; else a loss scaler or the loop has thrown them away
            self.controller.discard_step()

    def _begin(self, model: nn.Module) -> None:
        if not any(map(lacks_controller, self._states)):
            self._forward_handle.remove()
            return
        optimizer = _optimizer_of(self._states)
        self._searches += 1
        if optimizer is not None:
            self._control(model, optimizer)
        elif self._searches == SEARCHES:
            self._forward_handle.remove()

    def _control(self, model: nn.Module, optimizer: Optimizer) -> None:
        steps = ENDLESS if self._total_steps is None else self._total_steps
        self.controller = SparsityController(model, optimizer, steps, scaler=self._scaler)
        # after the controller's own hook, as hooks run in the order of their registration
        self._step_handle = inner_optimizer(optimizer).register_step_post_hook(self._after_step)
        for state in self._states:
            mark_controlled(state, self.close)

    def _after_step(self, *_: Any) -> None:
        assert self.controller is not None
        self.controller.step()

    def _gradients_are_gone(self) -> bool:
        gradients = [state.watched.grad for state in self._states]
        return all(gradient is None or not gradient.any() for gradient in gradients)


def attach(
    model: nn.Module, total_steps: int | None = None, *, scaler: torch.amp.GradScaler | None = None
) -> Attachment:
    """Let a model's adapters change during training in any loop, without a callback and without calls in the loop.

    Call it once before training, for a loop that is not yours. At the first training pass it finds the optimizer that
    trains the adapter and makes a [`SparsityController`][sparse_peft.SparsityController] for it, which acts after each
    of the optimizer's steps. A run equals one with the callback bit for bit, and its state is part of the optimizer's.
    Where there is a callback or a controller, it stands back.

    The first training pass is a call of ``model`` itself, wrapped or not, with gradients. Steps of the loop's loss
    scaler that are skipped do not count.

    Args:
        model: with an adapter: a PEFT model, or one of transformers or diffusers.
        total_steps: optimizer steps of the run. Without it ``reselect_stop`` as a share is never reached, and the rate
            of replacement stays what it is at first, which a warning says; other shares of the run are refused.
        scaler: the ``GradScaler`` of the loop, needed with SoRA's ``l1_weight``.

    Returns:
        The attachment, with its ``history`` and ``close()``.

    Raises:
        ValueError: the model has no adapter that changes during training.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig, attach
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> config = SparseConfig(selection="rigl", density=0.05, reselect_every=2, target_modules=["0"])
        >>> model = get_peft_model(base, config)
        >>> attached = attach(model, total_steps=4)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> for _ in range(4):  # somebody else's loop
        ...     model(torch.ones(8, 64)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> len(attached.history)
        2
    """
    configs = {name: config for name, config in configs_of(model).items() if _moves(config)}
    if not configs:
        names = ", ".join(configs_of(model)) or "none"
        raise ValueError(
            f"no adapter of the model changes during training (its adapters: {names}); leave attach out, or choose a "
            "selection or schedule that does"
        )
    for layer in BaseSparseModel.sparse_layers(model):
        for adapter in configs.keys() & layer.deltas.keys():
            _take_back(layer.deltas[adapter], configs[adapter].controller_role)
    return Attachment(model, total_steps, scaler)


def _moves(config: Any) -> bool:
    return bool(getattr(config, "changes_in_training", False))


def _moving_states(model: nn.Module) -> list[TrainedState]:
    moving = {name for name, config in configs_of(model).items() if _moves(config)}
    layers = BaseSparseModel.sparse_layers(model)
    return [layer.deltas[adapter] for layer in layers for adapter in moving & layer.deltas.keys()]


def _take_back(state: TrainedState, role: str) -> None:
    """End the controller of an earlier attachment, whose training is over."""
    if end_attachment(state):
        require_controller(state, role)


def _optimizer_of(states: list[TrainedState]) -> Optimizer | None:
    """The optimizer that trains one of the values: the outermost if one wraps another, and none if several may be it.

    Nothing leads from a parameter to its optimizer but the interpreter's list of all objects.
    """
    watched = {id(state.watched) for state in states if state.watched.requires_grad}
    found = [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and not watched.isdisjoint(stepped_by(o))]
    inside = {id(getattr(optimizer, "optimizer", None)) for optimizer in found}
    outermost = [optimizer for optimizer in found if id(optimizer) not in inside]
    if len(outermost) > 1:  # those of earlier trainings have a state
        outermost = [o for o in outermost if watched.isdisjoint(map(id, inner_optimizer(o).state))]
    return outermost[0] if len(outermost) == 1 else None
