"""The step driver: calls parts at the moments of an optimizer's steps, and keeps their state with the optimizer's."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..dynamics.collectives import Collectives
from ..dynamics.optimizer_state import inner_optimizer
from ..dynamics.protocol import Moments
from ..dynamics.records import Record, record_from_dict
from ..dynamics.zero import ZeroOptimizer

# Under this key of the first parameter group the state travels with the optimizer's own.
STATE_KEY = "sparse_peft"
# Calls of step() without a step of the optimizer after which something is wrong: a loss scale is halved each time.
MAX_SKIPPED = 64


def packed(state: dict[str, Any]) -> bytes:
    """A state as one value of an optimizer's state.

    Distributed checkpoints take a fresh optimizer's state as the template of what they read. A driver's state has
    other entries in each step; as one value it is read whole.
    """
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def unpacked(data: bytes | Mapping[str, Any]) -> dict[str, Any]:
    """What ``packed`` was given, or a state that an earlier version saved as it was."""
    if isinstance(data, Mapping):
        return dict(data)
    found: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    return found


class StepDriver:
    """Calls parts, such as adapters' dynamics and procedures, before and after an optimizer's steps.

    Skipped steps, accumulation, checkpoints and resuming are its concern, so that no part has to know of them.
    ``drive`` starts it.

    Args:
        optimizer: a torch optimizer, or accelerate's wrapper of one.
        completed_steps: steps done before, where the optimizer's state does not say.
        process_group: the processes whose gradients are averaged; None for all of them.

    Attributes:
        optimizer: the torch optimizer.
        collectives: the processes.
        completed_steps: number of optimizer steps taken.
        history: records of what the parts did, oldest first.
        parts: ``{kind: {name: part}}`` of what is driven; empty before ``drive`` and after ``close``.

    Raises:
        TypeError: the optimizer is none of torch's.
    """

    def __init__(self, optimizer: Any, completed_steps: int = 0, process_group: dist.ProcessGroup | None = None):
        self.optimizer = inner_optimizer(optimizer)
        self.collectives = Collectives(process_group)
        self.completed_steps = completed_steps
        self.history: list[Record] = []
        self.parts: dict[str, dict[str, Any]] = {}
        self._handles: list[Any] = []
        self._stepped = False
        self._skipped = 0

    def drive(self, parts: Mapping[str, Mapping[str, Moments]]) -> None:
        """Drive these parts from the next step on, after restoring what the optimizer's state has of them.

        Args:
            parts: ``{kind: {name: part}}``; kinds and names are those of the state, and parts act in this order.

        Raises:
            ValueError: an optimizer that steps in the backward pass.
            NotImplementedError: DeepSpeed partitions the optimizer's state, and a part cannot do with that.
        """
        self.parts = {kind: dict(found) for kind, found in parts.items()}
        if getattr(self.optimizer, "steps_in_backward", False) and not self._is_idle:
            names = ", ".join(repr(name) for found in self.parts.values() for name in found)
            raise ValueError(
                f"{type(self.optimizer).__name__} steps in the backward pass, and {names} must act before and after a "
                "step of all parameters; use the plain optimizer, or a static adapter"
            )
        if isinstance(self.optimizer, ZeroOptimizer):
            self._refuse_unfit(self.optimizer)
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            self.optimizer.register_state_dict_post_hook(self._add_state),
            self.optimizer.register_load_state_dict_post_hook(self._take_state),
        ]
        self._take_state(getattr(self.optimizer, "stepped", self.optimizer))
        self._begin_step()

    def _refuse_unfit(self, optimizer: ZeroOptimizer) -> None:
        for found in self.parts.values():
            for name, part in found.items():
                if not part.takes_partitions:
                    raise NotImplementedError(
                        f"{name!r} ({type(part).__name__}) works with the optimizer's parameters and state in a way "
                        f"that {optimizer.kind} of DeepSpeed, which partitions them, does not let it; use DDP or FSDP2"
                    )

    def _driven(self) -> Iterator[Moments]:
        return (part for found in self.parts.values() for part in found.values())

    @property
    def _is_idle(self) -> bool:
        return not any(self.parts.values())

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
        found = [part.after_step(self.completed_steps) for part in self._driven()]
        records = [record for record in found if record is not None]
        self.history.extend(records)
        self._begin_step()
        return records

    def discard_step(self) -> None:
        """Forget the backward passes since the last step.

        Call it where a loop of your own discards gradients without ``optimizer.step()``.
        """
        for part in self._driven():
            part.discard_step()

    def close(self) -> None:
        """Remove all hooks; training may go on without the controller."""
        for handle in self._handles:
            handle.remove()
        for part in self._driven():
            part.close()
        self.parts = {}

    def _note_skip(self) -> None:
        self.discard_step()
        self._skipped += 1
        if self._skipped == MAX_SKIPPED and not self._is_idle:
            warnings.warn(
                f"{type(self).__name__}.step() was called {MAX_SKIPPED} times in a row without a step of the "
                f"{type(self.optimizer).__name__} it was made for, so no positions change; make the controller with "
                "the optimizer that is stepped, and call optimizer.step() first",
                UserWarning,
                stacklevel=3,
            )

    def _begin_step(self) -> None:
        for part in self._driven():
            part.begin_step(self.completed_steps + 1)

    def _before_step(self, *_: Any) -> None:
        for part in self._driven():
            part.before_step(self.completed_steps + 1)

    def _after_step(self, *_: Any) -> None:
        self._stepped = True

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, between two steps: tensors, numbers, strings, lists and dicts."""
        return {
            "completed_steps": self.completed_steps,
            "history": [record.to_dict() for record in self.history],
            # torch's distributed state dicts lose empty lists and dicts, and a part must not get lost with them
            **{
                kind: {
                    name: {"completed_steps": self.completed_steps, **part.state_dict()}
                    for name, part in found.items()
                }
                for kind, found in self.parts.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict``; load the adapter and the optimizer's state before.

        Raises:
            ValueError: the state is of other adapters, procedures, layers or positions.
        """
        for kind, found in self.parts.items():
            saved = state.get(kind, {})
            if set(saved) != set(found):
                raise ValueError(
                    f"the saved state is of the {kind} {sorted(saved)}, but those that change during this training "
                    f"are {sorted(found)}"
                )
        for kind, found in self.parts.items():
            for name, part in found.items():
                part.load_state_dict(state[kind][name])
        self.completed_steps = state["completed_steps"]
        self.history = [record_from_dict(record) for record in state.get("history", [])]
        self._begin_step()

    def _add_state(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not self._is_idle:
            state_dict["param_groups"][0][STATE_KEY] = packed(self.state_dict())
        return state_dict

    def _take_state(self, optimizer: torch.optim.Optimizer) -> None:
        state = optimizer.param_groups[0].pop(STATE_KEY, None)
        if self._is_idle:
            return
        # a full distributed checkpoint is read by one process, and torch does not send the others this entry
        state = self.collectives.first_not_none(state)
        if state is not None:
            self.load_state_dict(unpacked(state))
