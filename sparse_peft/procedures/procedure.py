"""A procedure: something that acts around the training of any PEFT adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..calibrate.model_pass import model_loss, to_device
from ..constraints import validate_fields
from ..dynamics.collectives import Collectives
from ..dynamics.protocol import Moments

# loss_fn(model, batch) -> scalar; None for model(**batch).loss
LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass
class TrainingRun:
    """One training, as a procedure sees it.

    Attributes:
        model: the model, wrapped or not.
        optimizer: the torch optimizer.
        total_steps: number of optimizer steps of the whole run; None if unknown.
        collectives: the processes whose gradients are averaged.
        scaler: the loss scaler of the run; None without one.
        discard_step: forgets backward passes that are not part of the training.
        is_aside: whether a pass beside the training is being made.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    total_steps: int | None
    collectives: Collectives
    scaler: torch.amp.GradScaler | None
    discard_step: Callable[[], None]
    is_aside: bool = False

    @property
    def unwrapped(self) -> nn.Module:
        """The model inside DDP, whose own forward expects a backward pass for each."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def parameters(self) -> dict[str, nn.Parameter]:
        """``{name: parameter}`` of the adapters' parameters that train.

        Raises:
            ValueError: nothing trains, or the optimizer lacks a parameter.
        """
        found = trained_parameters(self.unwrapped)
        stepped = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        missing = next((name for name, parameter in found.items() if id(parameter) not in stepped), None)
        if missing is not None:
            raise ValueError(
                f"the optimizer does not train {missing}: make it from the parameters the model has now, after "
                "get_peft_model, load_adapter and any wrapping, and the controller after it"
            )
        return found

    @contextmanager
    def aside(self) -> Iterator[nn.Module]:
        """Passes beside the training: the model in evaluation mode, of which no part of the training learns."""
        modes = {module: module.training for module in self.unwrapped.modules()}
        self.is_aside = True
        try:
            yield self.unwrapped.eval()
        finally:
            self.is_aside = False
            for module, mode in modes.items():
                module.training = mode
            self.discard_step()

    def loss(self, model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
        """The loss of a batch, moved to the model's device."""
        device = next(model.parameters()).device
        return (loss_fn or model_loss)(model, to_device(batch, device))

    def gradients(
        self, batches: Iterable[Any], loss_fn: LossFn | None, parameters: Mapping[str, nn.Parameter]
    ) -> Iterator[dict[str, Tensor]]:
        """The gradients of a loss for each batch, which leave ``.grad`` alone.

        Raises:
            NotImplementedError: FSDP2 shards the model.
        """
        if isinstance(self.unwrapped, FSDPModule):
            raise NotImplementedError(
                "gradients of batches beside the training are not possible with FSDP2, which gathers parameters in "
                "its own backward pass; use DDP or one process"
            )
        tensors = list(parameters.values())
        for batch in batches:
            with self.aside() as model, torch.enable_grad(), _all_train(tensors):
                found = torch.autograd.grad(self.loss(model, batch, loss_fn), tensors, allow_unused=True)
            pairs = zip(parameters, tensors, found, strict=True)
            yield {name: torch.zeros_like(t) if g is None else g.detach() for name, t, g in pairs}


@contextmanager
def _all_train(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that rest have gradients, too, as importance is of all."""
    rest = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in rest:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in rest:
            parameter.requires_grad_(False)


class Procedure:
    """A description of what acts around the training; ``start`` makes the part that acts.

    A subclass is a frozen dataclass in a file of this folder, or in another package. Pass it to
    [`SparsityCallback`][sparse_peft.SparsityCallback] or [`SparsityController`][sparse_peft.SparsityController] as
    ``procedures=[...]``. It knows parameters by name and PEFT's ``BaseTunerLayer``, and no method.
    """

    def __post_init__(self) -> None:
        validate_fields(self)

    @property
    def name(self) -> str:
        """Its name in checkpoints and records: its class's."""
        return type(self).__name__

    def start(self, run: TrainingRun) -> Moments:
        """The part that acts in one training.

        Raises:
            ValueError, NotImplementedError: the model or the run does not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} has no start()")


class Resting:
    """Entries of parameters, and of their optimizer state, that an optimizer's step leaves as they are."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def keep(self, parameter: Tensor, rests: Tensor) -> None:
        """Before the step: keep these entries, ``parameter.shape`` bool."""
        state = self.optimizer.state.get(parameter) or {}
        moments = [t for t in state.values() if isinstance(t, Tensor) and t.shape == parameter.shape]
        self._kept += [(tensor, rests, tensor[rests].clone()) for tensor in (parameter, *moments)]

    @torch.no_grad()
    def give_back(self) -> None:
        """After the step: restore them."""
        for tensor, rests, values in self._kept:
            tensor[rests] = values
        self._kept = []


def started(procedures: Sequence[Procedure], run: TrainingRun) -> dict[str, Moments]:
    """``{name: part}`` of the procedures of a run.

    Raises:
        ValueError: two of one kind.
    """
    names = [procedure.name for procedure in procedures]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"procedures: {twice} is given twice; give one of each kind")
    return {procedure.name: procedure.start(run) for procedure in procedures}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """``{name: parameter}`` of what trains in PEFT's tuner layers; modules that are trained whole are left out.

    Raises:
        ValueError: nothing trains there.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for layer, module in tuner_layers(model).items():
        for name, parameter in own_parameters(module).items():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{layer}.{name}"] = parameter
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no adapter that trains: procedures act on PEFT's adapters; make one with "
            "get_peft_model, or set_adapter(...) to the one to train"
        )
    return found


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """``{name: layer}`` of all PEFT methods' layers, in the model's order; names are those without wrappers."""
    return {_plain(name): module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def own_parameters(layer: BaseTunerLayer) -> dict[str, nn.Parameter]:
    """``{name: parameter}`` of a layer's adapters, without those of its base layer."""
    assert isinstance(layer, nn.Module)
    named = layer.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if not name.startswith("base_layer.")}


def _plain(name: str) -> str:
    """A module's name without what torch.compile and activation checkpointing put into it."""
    for part in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name
