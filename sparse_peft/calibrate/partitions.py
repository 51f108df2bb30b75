"""Parameters that ZeRO stage 3 has partitioned, and passes before DeepSpeed's engine is there to gather them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_partitioned(parameter: Tensor | None) -> bool:
    """Whether ZeRO stage 3 has partitioned a parameter, which may be whole for the moment."""
    if parameter is None or torch.compiler.is_compiling():
        return hasattr(parameter, "ds_id")
    return "ds_id" in parameter.__dict__  # hasattr takes ten times as long to say no, in every pass of every layer


def gather_missing(parameters: Iterable[Any]) -> list[Any]:
    """Make partitioned parameters whole, and return those that were not; all processes call this together."""
    missing = [parameter for parameter in parameters if parameter.numel() != parameter.ds_numel]
    if missing:
        missing[0].all_gather(missing)
    return missing


class _Gathering:
    """Gathers the parameters of a module for its own forward and backward pass.

    Args:
        model: that has it.
    """

    def __init__(self, model: nn.Module):
        self._gathered: dict[int, list[Any]] = {}
        self._handles: list[Any] = []
        for module in model.modules():
            if any(map(is_partitioned, module._parameters.values())):
                self._handles += [
                    module.register_forward_pre_hook(self._gather),
                    module.register_forward_hook(self._release, always_call=True),
                    module.register_full_backward_pre_hook(self._gather),
                    module.register_full_backward_hook(self._release_after_backward),
                ]

    def _gather(self, module: nn.Module, *_: Any) -> None:
        missing = gather_missing(filter(is_partitioned, module._parameters.values()))
        if missing:
            self._gathered[id(module)] = missing

    def _release(self, module: nn.Module, *_: Any) -> None:
        gathered = self._gathered.pop(id(module), [])
        if gathered:
            gathered[0].partition(param_list=gathered, has_been_updated=False)

    def _release_after_backward(self, module: nn.Module, grad_input: Any, _: Any) -> None:
        # torch calls this too early where no input has a gradient
        if any(gradient is not None for gradient in grad_input):
            self._release(module)

    def release_all(self) -> None:
        """Release what a pass has left."""
        for gathered in self._gathered.values():
            gathered[0].partition(param_list=gathered, has_been_updated=False)
        self._gathered.clear()

    def close(self) -> None:
        """Remove the hooks."""
        self.release_all()
        for handle in self._handles:
            handle.remove()


@contextmanager
def gathered_by_layer(model: nn.Module) -> Iterator[_Gathering]:
    """Inside the block a partitioned model can be run; one layer is whole at a time.

    All processes run it on as many batches. DeepSpeed's engine gathers by itself: its model is left as it is.
    """
    has_engine = hasattr(model, "ds_id") or not any(map(is_partitioned, model.parameters()))
    gathering = _Gathering(nn.Module() if has_engine else model)
    try:
        yield gathering
    finally:
        gathering.close()
