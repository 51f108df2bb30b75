"""The controller as a callback, for transformers' Trainer and the trainers of TRL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..dynamics.records import Record
from ..procedures.procedure import Procedure
from .controller import SparsityController

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class SparsityCallback(TrainerCallback):
    """Changes adapters during training, as their configs say::

        trainer = SFTTrainer(..., peft_config=SparseConfig(selection="accumulated_gradient"),
                             callbacks=[SparsityCallback()])

    The state is part of the optimizer's in each checkpoint, so ``trainer.train(resume_from_checkpoint=...)`` continues
    exactly. With a config that changes nothing the callback only compares the learning rate with the recommended one.

    Changes are added to the Trainer's next log entry, under ``sparsity/``: to ``trainer.state.log_history`` and the
    progress bar. The first entry has each adapter's scale and recommended learning rate. Reporters such as TensorBoard
    and Weights & Biases run before a callback. For them, give the callback its trainer:
    ``trainer.add_callback(SparsityCallback(trainer))``.

    Args:
        trainer: the trainer that it is added to, for logging.
        procedures: what acts around the training of any PEFT adapter, PEFT's own included, such as
            [`LayerSampling`][sparse_peft.procedures.LayerSampling].

    Attributes:
        controller: the [`SparsityController`][sparse_peft.SparsityController] of the last or current training; None
            before.

    Example:
        >>> from sparse_peft import SparsityCallback
        >>> callback = SparsityCallback()  # an item of the Trainer's ``callbacks``
        >>> callback.history
        []
    """

    def __init__(self, trainer: Trainer | None = None, procedures: Sequence[Procedure] = ()):
        self.trainer, self.procedures = trainer, tuple(procedures)
        self.controller: SparsityController | None = None
        self._unlogged: list[Record] = []
        self._settings: dict[str, float] = {}

    @property
    def history(self) -> list[Record]:
        """Records of changes, oldest first."""
        return [] if self.controller is None else self.controller.history

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()
        self.controller = SparsityController(
            kwargs["model"],
            kwargs["optimizer"],
            total_steps=state.max_steps,
            completed_steps=state.global_step,
            procedures=self.procedures,
        )
        self._settings = _settings_of(self.controller)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.controller is not None
        self._unlogged += self.controller.step()
        if self.trainer is not None:
            if settings := self._take_settings():
                self.trainer.log(settings)
            for record in self._unlogged:
                self.trainer.log(record.logs())
            self._unlogged.clear()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.log_history:
            return
        settings = self._take_settings()
        state.log_history[-1].update(settings)
        if logs is not None:
            logs.update(settings)
        if not self._unlogged:
            return
        *earlier, last = self._unlogged
        self._unlogged = []
        for record in earlier:
            state.log_history.insert(-1, {**record.logs(), "step": record.step})
        state.log_history[-1].update(last.logs())
        if logs is not None:
            logs.update(last.logs())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()

    def _take_settings(self) -> dict[str, float]:
        """Scales and recommended rates, the first time only."""
        settings, self._settings = self._settings, {}
        return settings

    def _close(self) -> None:
        if self.controller is not None:
            self.controller.close()


def _settings_of(controller: SparsityController) -> dict[str, float]:
    """``{"sparsity/scale": ...}``; with several adapters their names are part of the keys."""
    rates = controller.suited_rates
    return {
        f"sparsity/{name}" if len(rates) == 1 else f"sparsity/{adapter}/{name}": value
        for adapter, found in rates.items()
        for name, value in found.items()
    }
