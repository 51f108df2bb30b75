"""One run: a copy of the base model, trained and judged."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence

import torch
from peft import PeftModel
from torch import nn

from sparse_peft import SparsityController
from sparse_peft.procedures import Procedure
from sparse_peft.tuners.base_config import BaseSparseConfig

from ..report import environment
from .methods import CALIBRATION_BATCHES, METHODS, Around, Budget, Setting, adapted
from .models import BASES, Base
from .records import Run
from .tasks import TASKS, Batch, Sizes, Task

CLIP = 1.0
OTHER_ORDER = 1000  # added to a seed


def on(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}


def train(
    model: nn.Module, batches: Iterable[Batch], steps: int, rate: float, procedures: Sequence[Procedure] = ()
) -> None:
    """AdamW without weight decay, gradients clipped at 1, and a rate that falls to zero, as Trainer's does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    controller = controller_of(model, optimizer, steps, procedures)
    device = trained[0].device
    model.train()
    for batch in batches:
        model(**on(batch, device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        if controller is not None:
            controller.step()
        decay.step()
        optimizer.zero_grad()
    if controller is not None:
        controller.close()


def controller_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, procedures: Sequence[Procedure] = ()
) -> SparsityController | None:
    """What changes this package's adapters during training, or acts around it; None where nothing does."""
    if procedures:
        return SparsityController(model, optimizer, total_steps=steps, procedures=procedures)
    if not isinstance(model, PeftModel):
        return None
    config = model.active_peft_config
    if not (isinstance(config, BaseSparseConfig) and config.changes_in_training):
        return None
    return SparsityController(model, optimizer, total_steps=steps)


class Bench:
    """A task with its pretrained model, which all runs start from.

    Args:
        name: a key of ``TASKS``.
        sizes: how long and how large runs are.
        device: where they train.
    """

    def __init__(self, name: str, sizes: Sizes, device: torch.device):
        kind = TASKS[name]
        self.device, self.sizes = device, sizes
        self.base: Base = BASES[kind.base]
        torch.manual_seed(0)  # a new head's weights decide the accuracy that gains are counted from
        self.model = self.base.load().to(device)
        self.model.config.use_cache = False
        self.task: Task = kind.make(name, sizes, self.base.load_tokenizer())
        self.start, self.start_elsewhere = self._judge(self.model)

    def _judge(self, model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        found = {}
        for split in ("validation", "test"):
            score = self.task.score(model, split)
            found |= {f"{split}_loss": score.loss, f"{split}_accuracy": score.accuracy}
        return found, self.task.losses_elsewhere(model)

    def _fresh_model(self, seed: int) -> nn.Module:
        """A copy of the base, with a new head of the seed's."""
        torch.manual_seed(seed)
        model = copy.deepcopy(self.model)
        for name in self.base.head:
            model.get_submodule(name).reset_parameters()
        return model

    def _around(self, seed: int) -> Around:
        """Data of procedures: rows of another order than the training's, and text of other domains."""
        held = list(self.task.training_batches(seed + OTHER_ORDER))[:CALIBRATION_BATCHES]
        return Around(held, self.task.old_batches())

    def run(self, method: str, budget: Budget, rate: float, seed: int) -> Run:
        """Train from the pretrained weights, and judge."""
        began = time.process_time()
        model = self._fresh_model(seed)
        batches = list(self.task.training_batches(seed))
        calibration = [on(batch, self.device) for batch in batches[:CALIBRATION_BATCHES]]
        model = adapted(method, Setting(self.base, model, budget, seed, self.sizes.steps), calibration)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        train(model, batches, self.sizes.steps, rate, METHODS[method].procedures(self._around(seed)))
        end, end_elsewhere = self._judge(model)
        return Run(
            task=self.task.name, method=method, budget=str(budget), rate=rate, seed=seed, **vars(self.sizes),
            judged_by=self.task.judged_by, trained=trained, start=self.start, end=end,
            start_elsewhere=self.start_elsewhere, end_elsewhere=end_elsewhere,
            seconds=time.process_time() - began, environment=environment(self.device),
        )  # fmt: skip
