"""Whether trained values changed: what everything made from them asks before it is used again.

Torch counts writes in place, but counts neither those of fused optimizers nor those through ``.data``. So each trained
state has a count of its own besides, ``changes``. Optimizers raise it for the parameters that they step, backward
passes for the states that they reach, and so does loading.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .base_state import TrainedState
from .fully_sharded import LastingParameters

# {id of a parameter: its state}, for those that something was made from. An id that another tensor has by now does no
# harm: what was made from the state is made anew.
_states: weakref.WeakValueDictionary[int, TrainedState] = weakref.WeakValueDictionary()
# {id: state} of those that a backward pass reached and no optimizer is known to step: one that keeps copies of the
# parameters, as DeepSpeed's, may, so any step counts.
_reached: weakref.WeakValueDictionary[int, TrainedState] = weakref.WeakValueDictionary()


def version(tensor: Tensor) -> int:
    """Torch's count of the tensor's writes in place; inference tensors keep none."""
    return 0 if tensor.is_inference() else tensor._version


class Mark(NamedTuple):
    """A parameter as it was; ``version`` and ``address`` are None where they say nothing."""

    parameters: Mapping[str, Tensor | None]
    name: str
    tensor: Tensor
    version: int | None
    address: int | None

    @classmethod
    def of(cls, state: TrainedState, name: str, sharded: bool) -> Mark:
        parameters = LastingParameters(state) if sharded else state._parameters
        tensor = parameters[name]
        assert tensor is not None
        # FSDP gathers parameters to another address for each pass
        address = None if sharded else tensor.data_ptr()
        return cls(parameters, name, tensor, None if tensor.is_inference() else tensor._version, address)


class Stamp:
    """What trained states were at some time.

    Args:
        states: whose values something is made from.
        sharded: whether FSDP gathers their parameters for each pass.
        after_backward: whether a backward pass, too, may be followed by changes without a trace.
    """

    __slots__ = ("counts", "marks")

    def __init__(self, states: Iterable[TrainedState], sharded: bool = False, after_backward: bool = True):
        counts, marks = [], []
        for state in states:
            counts.append((state, state.changes, state.backwards if after_backward else None))
            for name in state.stamped:
                mark = Mark.of(state, name, sharded)
                marks.append(mark)
                if _states.get(id(mark.tensor)) is not state:
                    _states[id(mark.tensor)] = state
        self.counts, self.marks = tuple(counts), tuple(marks)

    def is_current(self) -> bool:
        """Whether nothing can have changed since; asked in every pass of every layer."""
        for state, changes, backwards in self.counts:
            if state.changes != changes or (backwards is not None and state.backwards != backwards):
                return False
        for parameters, name, tensor, version, address in self.marks:  # the two below in one
            if parameters.get(name) is not tensor or (version is not None and tensor._version != version):
                return False
            if address is not None and tensor.data_ptr() != address:
                return False
        return True

    def is_in_place(self) -> bool:
        """Whether the states have the same parameters: ``torch.func.functional_call`` lends them others."""
        return all([parameters.get(name) is tensor for parameters, name, tensor, _, _ in self.marks])

    def is_unwritten(self) -> bool:
        """Whether no write to the parameters is seen: what autograd checks of tensors that it saved."""
        return all(
            mark.version in (None, version(mark.tensor)) and mark.address in (None, mark.tensor.data_ptr())
            for mark in self.marks
        )

    def is_same(self, other: Stamp) -> bool:
        """Whether both are of the same states at the same time."""
        return self is other or (
            len(self.counts) == len(other.counts)
            and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(self.counts, other.counts, strict=True))
            and all(a.tensor is b.tensor and a[3:] == b[3:] for a, b in zip(self.marks, other.marks, strict=True))
        )

    def note_backward(self) -> None:
        """A backward pass reached the states."""
        for state, _, _ in self.counts:
            note_backward(state)


def note_backward(state: TrainedState) -> None:
    """A backward pass reached a state: its values may be stepped from now on."""
    state.__dict__["backwards"] = state.backwards + 1  # torch's assignment to a module's attribute takes a microsecond
    if not state.is_stepped:
        _reached[id(state)] = state


def stepped_by(optimizer: Optimizer) -> set[int]:
    """The ids of an optimizer's parameters."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _note_step(optimizer: Optimizer, *_: Any) -> None:
    if _states:
        for parameter in stepped_by(optimizer):
            state = _states.get(parameter)
            if state is not None:
                state.__dict__.update(changes=state.changes + 1, is_stepped=True)
    for reference in _reached.valuerefs():
        state = reference()
        if state is not None and not state.is_stepped:
            state.changes += 1
    _reached.clear()


register_optimizer_step_post_hook(_note_step)
