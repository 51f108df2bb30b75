"""Adapters that need a controller in training: a word of warning where there is none."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .base_state import TrainedState

_unattended: weakref.WeakKeyDictionary[TrainedState, str] = weakref.WeakKeyDictionary()
_hook = None


def expect_attendance(delta: TrainedState, what: str) -> None:
    """Warn, once, if an optimizer steps these values and no controller, which does ``what``, was made by then."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_check)
    _unattended[delta] = what


def attend(delta: TrainedState) -> None:
    """A controller looks after these values."""
    _unattended.pop(delta, None)


def _check(optimizer: Optimizer, *_: Any) -> None:
    if not _unattended:
        return
    # a learning rate of 0 trains nothing: so torch makes an optimizer's state before it loads a distributed checkpoint
    groups = [group for group in optimizer.param_groups if float(group.get("lr", 1.0))]
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    alone = [delta for delta in _unattended if id(delta.watched) in stepped]
    if not alone:
        return
    what = _unattended[alone[0]]
    _unattended.clear()
    warnings.warn(
        f"the adapter in layer {alone[0].name} (and {len(alone) - 1} more) is trained, but nothing {what} as "
        "its config asks for. With a Trainer or a TRL trainer add "
        "`callbacks=[sparse_peft.SparsityCallback()]`; in a loop of your own make "
        "`controller = sparse_peft.SparsityController(model, optimizer, total_steps=...)` and call "
        "`controller.step()` after each `optimizer.step()`.",
        UserWarning,
        stacklevel=3,
    )
