"""Split and merge: disjoint parts of one adapter, of which one trains at a time (MoSA)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..constraints import Limits, Pattern
from ..dynamics.protocol import Moments
from ..numerics import uniform
from .procedure import Procedure, Resting, TrainingRun, tuner_layers

Parts = Annotated[int, Limits(least=2, most=127)]


@dataclass(frozen=True)
class SplitMerge(Procedure):
    """Split an adapter's parameters into disjoint parts, and train with one of them in each step.

    In training the adapter computes with ``parts * W * [P == a]``, where ``P`` assigns each entry of a parameter ``W``
    to one of the parts and ``a`` is drawn anew for each parameter and step (MoSA, https://arxiv.org/abs/2312.02923).
    ``W`` is the merged adapter: evaluation, files and merging need nothing else, and there are no more parameters.
    For a parameter that the output is linear in, the mean of the training passes over all parts is the evaluation's.

    Optimizers with momentum also move entries of parts that rest; ``lazy`` keeps these and their moments.

    Args:
        parts: number of parts of each parameter; their sizes differ by at most 1.
        parameters: name or regular expression; parameters whose name it is found in are split. ``"lora_B"`` leaves
            LoRA's other factor whole; the default splits all.
        lazy: whether entries of resting parts stay as they are.
        seed: of the split and the choices, which are the same in all processes and after resuming.

    Raises:
        ValueError: no parameter has such a name.

    Example:
        >>> from sparse_peft import SparsityCallback
        >>> from sparse_peft.procedures import SplitMerge
        >>> callback = SparsityCallback(procedures=[SplitMerge(parts=4, parameters="lora_B")])  # of any trainer
    """

    parts: Parts = 4
    parameters: Pattern = ""
    lazy: bool = False
    seed: int = 0

    def start(self, run: TrainingRun) -> Splitter:
        return Splitter(self, run)


class Splitter(Moments):
    """The splits of one training."""

    def __init__(self, config: SplitMerge, run: TrainingRun):
        self.config, self.run = config, run
        trained = run.parameters()
        self.split = {name: p for name, p in trained.items() if re.search(config.parameters, name)}
        if not self.split:
            raise ValueError(
                f"parameters={config.parameters!r}: found in no name of a parameter that trains, such as "
                f"{next(iter(trained))}"
            )
        self.chosen: dict[str, int] = {}
        self._assigned: dict[str, Tensor] = {}
        self._resting = Resting(run.optimizer)
        self._handles = [handle for layer in tuner_layers(run.unwrapped).items() for handle in self._watch(*layer)]

    def _watch(self, name: str, layer: Any) -> Iterator[Any]:
        """Let a layer compute with a part of each of its split parameters."""
        places = [
            (module, leaf, full)
            for path, module in layer.named_modules()
            for leaf in module._parameters
            if (full := ".".join(filter(None, (name, path, leaf)))) in self.split
        ]
        if places:
            lent = _Lent(self, places)
            yield layer.register_forward_pre_hook(lent.lend)
            yield layer.register_forward_hook(lent.take_back, always_call=True)

    # ------------------------------------------------------------------ parts

    def begin_step(self, step: int) -> None:
        for name in self.split:
            generator = random.Random(f"{self.config.seed} part {step} {name}")
            self.chosen[name] = generator.randrange(self.config.parts)

    def active(self, name: str, parameter: Tensor) -> Tensor:
        """``parameter.shape`` bool: the entries of the part that trains in this step."""
        assigned = self._assigned.get(name)
        if assigned is None or assigned.shape != parameter.shape or assigned.device != parameter.device:
            order = uniform(parameter.numel(), seed=self.config.seed, name=name).argsort(stable=True)
            assigned = (order % self.config.parts).to(parameter.device, torch.int8).reshape(parameter.shape)
            self._assigned[name] = assigned
        return assigned == self.chosen[name]

    # ------------------------------------------------------------------ resting parts

    def before_step(self, step: int) -> None:
        if self.config.lazy:
            for name, parameter in self.split.items():
                self._resting.keep(parameter, ~self.active(name, parameter))

    def after_step(self, step: int) -> None:
        self._resting.give_back()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Lent:
    """The parameters of one layer, in whose place it computes with parts of them during a training pass."""

    def __init__(self, splitter: Splitter, places: list[tuple[nn.Module, str, str]]):
        self.splitter, self.places = splitter, places
        self.own: list[tuple[nn.Module, str, Any]] = []

    def lend(self, layer: nn.Module, _: Any) -> None:
        if not (layer.training and torch.is_grad_enabled()):
            return
        try:
            for module, leaf, name in self.places:
                own: Any = module._parameters[leaf]
                self.own.append((module, leaf, own))
                factor = self.splitter.active(name, own).to(own.dtype).mul_(self.splitter.config.parts)
                module._parameters[leaf] = own * factor
        except BaseException:
            self.take_back()
            raise

    def take_back(self, *_: Any) -> None:
        for module, leaf, own in self.own:
            module._parameters[leaf] = own
        self.own = []
