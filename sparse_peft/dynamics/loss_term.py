"""The gradient of a term of the loss, added during the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LossTerm:
    """Adds a term's gradient once per optimizer step, in the first backward pass that reaches a parameter.

    Clipping therefore includes the term, as if it were part of the loss, and gradient accumulation counts it once.
    The hooks run before DDP averages a gradient and after FSDP2 has averaged it; both leave the term as it is.

    Args:
        parameters: those the term depends on; frozen ones are skipped.
        gradient: ``gradient(parameter)``, with the parameter's shape and sharding.
        scaler: the loss scaler whose scale multiplies all gradients until the optimizer steps; None without one.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        gradient: Callable[[Tensor], Tensor],
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.gradient, self.scaler = gradient, scaler
        self._handles: dict[int, Any] = {}
        self._reached: set[int] = set()
        for parameter in parameters:
            if parameter.requires_grad:
                self._watch(parameter)

    def _watch(self, parameter: Tensor) -> None:
        self._handles[id(parameter)] = parameter.register_post_accumulate_grad_hook(self._add)

    @torch.no_grad()
    def _add(self, parameter: Tensor) -> None:
        if id(parameter) in self._reached:
            return
        self._reached.add(id(parameter))
        assert parameter.grad is not None  # the hook runs after accumulation
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        assert parameter.grad is not None  # the hook runs after accumulation
        parameter.grad.add_(self.gradient(parameter), alpha=scale)

    def misses(self, parameter: Tensor) -> bool:
        """Whether no backward pass has reached a watched parameter in this step."""
        return id(parameter) in self._handles and id(parameter) not in self._reached

    def begin_step(self) -> None:
        """Add the gradient anew from the next backward pass on."""
        self._reached.clear()

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Watch another parameter in place of one."""
        handle = self._handles.pop(id(old), None)
        if handle is not None:
            handle.remove()
            self._watch(new)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
