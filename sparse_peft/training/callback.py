"""The controller in transformers' Trainer and in every trainer of TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback

from ..dynamics.records import Record
from .controller import SparsityController

if TYPE_CHECKING:
    from transformers import Trainer


class SparsityCallback(TrainerCallback):
    """Changes the trained positions during training, as the adapters' configs say::

        trainer = SFTTrainer(..., peft_config=SparseConfig(selection="accumulated_gradient"),
                             callbacks=[SparsityCallback()])

    The state is part of the optimizer's in each checkpoint, so ``trainer.train(resume_from_checkpoint=...)`` goes on
    exactly. With a config that changes nothing the callback does nothing.

    What happened is added to the Trainer's next log entry, under ``sparsity/``: to ``trainer.state.log_history`` and
    the progress bar. Reporters such as TensorBoard and Weights & Biases come before a callback; they get it too if the
    callback knows its trainer: ``trainer.add_callback(SparsityCallback(trainer))``.

    Args:
        trainer: the trainer it is added to, to log through.

    Attributes:
        controller: the [`SparsityController`][sparse_peft.SparsityController] of the last or current training; None
            before.
    """

    def __init__(self, trainer: Trainer | None = None):
        self.trainer = trainer
        self.controller: SparsityController | None = None
        self._unlogged: list[Record] = []

    @property
    def history(self) -> list[Record]:
        """What happened besides steps, oldest first."""
        return [] if self.controller is None else self.controller.history

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.controller is not None:
            self.controller.close()
        self.controller = SparsityController(
            model, optimizer, total_steps=state.max_steps, completed_steps=state.global_step
        )

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._unlogged += self.controller.step()
        if self.trainer is not None:
            for record in self._unlogged:
                self.trainer.log(record.logs())
            self._unlogged.clear()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self._unlogged or not state.log_history:
            return
        *earlier, last = self._unlogged
        self._unlogged = []
        for record in earlier:
            state.log_history.insert(-1, {**record.logs(), "step": record.step})
        for entry in (state.log_history[-1], logs):
            entry.update(last.logs())

    def on_train_end(self, args, state, control, **kwargs):
        self.controller.close()
