"""Adapters that need a controller in training: a warning where there is none."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .base_state import TrainedState

# {state: what the controller that it lacks would do}
_uncontrolled: weakref.WeakKeyDictionary[TrainedState, str] = weakref.WeakKeyDictionary()
# {state: what ends the controller of an attachment, which stands back for any other}
_replaceable: weakref.WeakKeyDictionary[TrainedState, weakref.WeakMethod[Callable[[], None]]] = (
    weakref.WeakKeyDictionary()
)


def require_controller(state: TrainedState, role: str) -> None:
    """Warn, once, if an optimizer steps a state's values before a controller is made.

    Args:
        state: of the new adapter in one layer.
        role: what the controller does.
    """
    _uncontrolled[state] = role


def mark_controlled(state: TrainedState, stand_back: Callable[[], None] | None = None) -> None:
    """A controller looks after these values.

    Args:
        state: of an adapter in one layer.
        stand_back: a method that ends this controller once there is another one; None for one that stays.
    """
    _uncontrolled.pop(state, None)
    end_attachment(state)
    if stand_back is not None:
        _replaceable[state] = weakref.WeakMethod(stand_back)


def end_attachment(state: TrainedState) -> bool:
    """End the attachment that controls a state; returns whether there was one."""
    earlier = _replaceable.pop(state, None)
    end = None if earlier is None else earlier()
    if end is not None:
        end()
    return end is not None


def lacks_controller(state: TrainedState) -> bool:
    """Whether a state needs a controller and has none."""
    return state in _uncontrolled


def _check(optimizer: Optimizer, *_: Any) -> None:
    if not _uncontrolled:
        return
    # a learning rate of 0 trains nothing: so torch makes an optimizer's state before it loads a distributed checkpoint
    groups = [group for group in optimizer.param_groups if float(group.get("lr", 1.0))]
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    alone = {state: role for state, role in list(_uncontrolled.items()) if id(state.watched) in stepped}
    if not alone:
        return
    for state in alone:
        mark_controlled(state)
    first, role = next(iter(alone.items()))
    warnings.warn(
        f"the adapter in layer {first.name} (and {len(alone) - 1} more) is trained, but nothing {role} as "
        "its config asks for. With a Trainer or a TRL trainer add "
        "`callbacks=[sparse_peft.SparsityCallback()]`; for a loop that is not yours call "
        "`sparse_peft.attach(model, total_steps=...)` before training; in a loop of your own make "
        "`controller = sparse_peft.SparsityController(model, optimizer, total_steps=...)` and call "
        "`controller.step()` after each `optimizer.step()`.",
        UserWarning,
        stacklevel=3,
    )


register_optimizer_step_post_hook(_check)
