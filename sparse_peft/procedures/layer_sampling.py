"""Layer sampling: a few layers' adapters train in each step (IST, LISA, at random)."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..constraints import Count, OneOf, Positive, Share, ShareOrZero
from ..dynamics.protocol import Moments
from ..dynamics.records import Record
from .procedure import LossFn, Procedure, TrainingRun, own_parameters, tuner_layers

# {strategy: optimizer steps that a choice is held for, unless it is given}
STRATEGIES = {"ist": 1, "random": 1, "lisa": 20}
# A block is named by its first number: "model.layers.3.mlp.up_proj" is in "model.layers.3".
BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)")


@dataclass(frozen=True)
class LayerSampling(Procedure):
    """Train a share of a model's blocks in each step; the adapters of the others rest.

    ``"random"`` chooses blocks uniformly. ``"lisa"`` does too and holds the choice for 20 steps (LISA,
    https://arxiv.org/abs/2403.17919). ``"ist"`` (IST, https://arxiv.org/abs/2410.11772) chooses important blocks more
    often. Every few steps it weakens the adapters of some blocks and measures the loss on batches set aside: blocks
    without which the loss rises are important.

    Adapters outside of numbered blocks, and modules that are trained whole, always train. In one process a resting
    adapter has ``requires_grad=False``, which saves its gradient, and its activations below the lowest active block.
    In several processes its gradient is zero and it makes no step; DDP's buckets stay as they are.

    Args:
        strategy: ``"ist"``, ``"random"`` or ``"lisa"``.
        share: of the blocks that train, at least one.
        hold_steps: optimizer steps from one choice to the next; by default 1, and 20 with ``"lisa"``.
        offload: whether the optimizer's state of resting adapters waits in the CPU's memory.
        batches: with ``"ist"``: what the loss is measured on; one batch for each measurement, in turn. Set them aside
            from the training data.
        loss_fn: ``loss_fn(model, batch) -> scalar``; by default ``model(**batch).loss``. Of a Trainer:
            ``trainer.compute_loss``.
        suppressed: with ``"ist"``: share of the blocks that are weakened at once.
        strength: what is left of a weakened adapter's output.
        trials: measurements each time.
        every: optimizer steps from one time to the next.
        rate: learning rate of the importance.
        seed: of the choices, which are the same in all processes and after resuming.

    Raises:
        ValueError: ``"ist"`` without batches.

    Example:
        >>> from sparse_peft import SparsityCallback
        >>> from sparse_peft.procedures import LayerSampling
        >>> callback = SparsityCallback(procedures=[LayerSampling("lisa", share=0.1)])  # of any trainer
    """

    strategy: Annotated[str, OneOf(STRATEGIES)] = "ist"
    share: Share = 0.25
    hold_steps: Count | None = None
    offload: bool = False
    batches: Iterable[Any] | None = None
    loss_fn: LossFn | None = None
    suppressed: Share = 0.5
    strength: ShareOrZero = 0.25
    trials: Count = 3
    every: Count = 10
    rate: Positive = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy == "ist" and self.batches is None:
            raise ValueError(
                "strategy='ist' without batches: importance is measured by the loss on batches set aside; pass "
                "batches=[...], or use strategy='random'"
            )

    def start(self, run: TrainingRun) -> Sampler:
        return Sampler(self, run)


@dataclass(frozen=True)
class Importance(Record, event="layer_importance", plural="measurements of importance"):
    """Importance of blocks, measured.

    Attributes:
        loss: mean loss of the measurements, with weakened adapters.
        lowest, highest: probabilities of training, relative to the mean over the blocks.
        probabilities: of each block, in the model's order; their sum is 1.
    """

    loss: float
    lowest: float
    highest: float
    probabilities: tuple[float, ...]


class Sampler(Moments):
    """The sampling of one training.

    Attributes:
        blocks: names of the blocks.
        active: numbers of the blocks that train.
        logits: ``(blocks,)`` float64: the lower, the more important.
    """

    def __init__(self, config: LayerSampling, run: TrainingRun):
        self.config, self.run = config, run
        self.layers, self.parameters = _blocks(run)
        self.blocks = list(self.layers)
        self.count = max(1, round(config.share * len(self.blocks)))
        self.hold = config.hold_steps or STRATEGIES[config.strategy]
        self.batches = list(config.batches or ())
        self.logits = torch.zeros(len(self.blocks), dtype=torch.float64)
        self.active: list[int] = []
        # DDP wants a gradient of each parameter, and PEFT's disable_adapter() lets all of them train again
        self._handles = [
            parameter.register_hook(self._zero_of(number))
            for number, own in enumerate(self.parameters)
            for parameter in own
        ]
        for number, layers in enumerate(self.layers.values()):
            self._handles += [layer.register_forward_pre_hook(self._settle(number)) for layer in layers]

    def _zero_of(self, number: int) -> Callable[[Tensor], Tensor]:
        def zeroed(gradient: Tensor) -> Tensor:
            counts = number in self.active or self.run.is_aside
            return gradient if counts else torch.zeros_like(gradient)

        return zeroed

    def _settle(self, number: int) -> Callable[..., None]:
        def before(layer: nn.Module, _: Any) -> None:
            if layer.training and torch.is_grad_enabled() and not self.run.is_aside:
                self._let_train(number)

        return before

    def _let_train(self, number: int) -> None:
        """Let a block's parameters train or not, in one process; a recomputed pass must find what the first found."""
        if self.run.collectives.alone:
            for parameter in self.parameters[number]:
                parameter.requires_grad_(number in self.active)

    # ------------------------------------------------------------------ the choice

    def begin_step(self, step: int) -> None:
        if not self.active or (step - 1) % self.hold == 0:
            weights = torch.sigmoid(-self.logits).tolist()
            self.active = draw(weights, self.count, f"{self.config.seed} train {step}")
        for number, own in enumerate(self.parameters):
            self._let_train(number)
            if self.config.offload:
                place_state(self.run.optimizer, own, None if number in self.active else torch.device("cpu"))

    def before_step(self, step: int) -> None:
        for number, own in enumerate(self.parameters):
            if number not in self.active:
                for parameter in own:
                    parameter.grad = None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for own in self.parameters:
            place_state(self.run.optimizer, own, None)
            for parameter in own:
                parameter.requires_grad_(True)

    # ------------------------------------------------------------------ importance

    def after_step(self, step: int) -> Importance | None:
        config = self.config
        if config.strategy != "ist" or step % config.every:
            return None
        batch = self.batches[(step // config.every - 1) % len(self.batches)]
        probabilities = torch.sigmoid(self.logits)
        count = max(1, round(config.suppressed * len(self.blocks)))
        weakened = [
            draw(probabilities.tolist(), count, f"{config.seed} weaken {step} {trial}")
            for trial in range(config.trials)
        ]
        losses = self._losses(batch, weakened)
        rewards = (-losses).exp()
        for numbers, reward in zip(weakened, rewards - rewards.mean(), strict=True):
            own = probabilities[numbers]
            self.logits[numbers] += config.rate * reward * own * (1 - own)
        return self._record(step, float(losses.mean()))

    def _losses(self, batch: Any, weakened: Sequence[Sequence[int]]) -> Tensor:
        """``(trials,)`` float64 losses on a batch, the mean over the processes."""
        found = []
        for numbers in weakened:
            layers = [layer for number in numbers for layer in self.layers[self.blocks[number]]]
            with self.run.aside() as model, torch.no_grad(), suppressed(layers, self.config.strength):
                found.append(self.run.loss(model, batch, self.config.loss_fn).detach().double())
        return self.run.collectives.mean(torch.stack(found)).cpu()

    def _record(self, step: int, loss: float) -> Importance:
        chances = torch.sigmoid(-self.logits)
        chances = chances / chances.sum()
        relative = chances * len(chances)
        return Importance(
            step,
            self.config.name,
            loss,
            float(relative.min()),
            float(relative.max()),
            tuple(chances.tolist()),
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "active": self.active, "logits": self.logits.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if list(state["blocks"]) != self.blocks:
            raise ValueError(
                f"the saved state of {self.config.name} is of {len(state['blocks'])} blocks, and the model has "
                f"{len(self.blocks)} with adapters that train; resume with the config the run was started with"
            )
        self.active, self.logits = list(state["active"]), state["logits"].to("cpu", torch.float64)


def _blocks(run: TrainingRun) -> tuple[dict[str, list[Any]], list[list[nn.Parameter]]]:
    """The tuner layers of each block, and its parameters that train.

    Raises:
        ValueError: fewer than two blocks.
    """
    trained = {id(parameter) for parameter in run.parameters().values()}
    layers: dict[str, list[Any]] = {}
    for name, layer in tuner_layers(run.unwrapped).items():
        block = BLOCK.match(name)
        if block and any(id(parameter) in trained for parameter in own_parameters(layer).values()):
            layers.setdefault(block.group(1), []).append(layer)
    if len(layers) < 2:
        raise ValueError(
            f"LayerSampling: {len(layers)} numbered blocks have an adapter that trains, such as 'layers.0' in "
            "'model.layers.0.mlp.up_proj'; at least 2 are expected"
        )
    parameters = [
        [p for layer in found for p in own_parameters(layer).values() if id(p) in trained] for found in layers.values()
    ]
    return layers, parameters


def draw(weights: Sequence[float], count: int, seed: str) -> list[int]:
    """``count`` different numbers, one after the other in proportion to the weights; sorted, equal on every machine.

    The largest of ``log(u) / weight`` with uniform ``u`` are such a sample (Efraimidis and Spirakis, 2006).
    """
    generator = random.Random(seed)
    keys = [math.log(1.0 - generator.random()) / weight for weight in weights]
    return sorted(sorted(range(len(keys)), key=lambda number: -keys[number])[:count])


def place_state(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], device: torch.device | None
) -> None:
    """Move parameters' optimizer state to a device; None for each parameter's own. 0-d tensors stay."""
    for parameter in parameters:
        state = optimizer.state.get(parameter) or {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                state[key] = value.to(parameter.device if device is None else device)


@contextmanager
def suppressed(layers: Sequence[BaseTunerLayer], strength: float) -> Iterator[None]:
    """Weaken what these layers' adapters add to their base layers' outputs to this share."""
    with ExitStack() as stack:
        for layer in layers:
            assert isinstance(layer, nn.Module)
            handle = layer.register_forward_hook(_weakened(strength), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _weakened(strength: float) -> Callable[..., Tensor]:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        with without_adapters(layer):
            base: Tensor = layer.forward(*args, **kwargs)
        return base + strength * (output - base)

    return hook


@contextmanager
def without_adapters(layer: Any) -> Iterator[None]:
    """Switch a layer's adapters off; PEFT's call does so for every method, but changes what trains."""
    trained = [(parameter, parameter.requires_grad) for parameter in own_parameters(layer).values()]
    layer.enable_adapters(False)
    try:
        yield
    finally:
        layer.enable_adapters(True)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
