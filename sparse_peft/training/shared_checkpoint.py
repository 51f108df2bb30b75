"""Checkpoints that some processes write and another number of them reads, with ``torch.distributed.checkpoint``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..dynamics.collectives import Collectives
from ..dynamics.optimizer_state import inner_optimizer
from ..dynamics.zero import ZeroOptimizer
from ..procedures.driver import packed, unpacked
from ..tuners.base_state import TrainedState
from ..tuners.residency import release_layers
from ..tuners.traversal import tuner_layers

REST = "rest"


def save_checkpoint(folder: str | Path, model: nn.Module, optimizer: Any) -> None:
    """Write what a run needs to go on: trained values, positions, the optimizer's and the controller's state.

    All processes call this together, between two steps. With FSDP2 each writes its own parts. Learning rate schedules,
    data loaders and random states are the caller's.

    Args:
        folder: a new one, which all processes see.
        model: with adapters, in DDP or FSDP2, with tensor parallelism, or in one process.
        optimizer: torch's, or accelerate's wrapper of one.

    Raises:
        NotImplementedError: FSDP1 or DeepSpeed, which have checkpoints of their own.
        ValueError: the optimizer trains parameters that the model does not have.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.training.shared_checkpoint import load_checkpoint, save_checkpoint
        >>> def made():
        ...     config = SparseConfig(density=0.05, target_modules=["0"])
        ...     model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config)
        ...     return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        >>> model, optimizer = made()
        >>> model(torch.ones(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> folder = tempfile.mkdtemp()
        >>> save_checkpoint(folder, model, optimizer)
        >>> resumed, other = made()
        >>> load_checkpoint(folder, resumed, other)
        >>> values = [m.base_model.model[0].deltas["default"].values for m in (model, resumed)]
        >>> torch.equal(*values)
        True
    """
    run = _Run(model, optimizer)
    options, numbers, tensors = run.optimizer_parts()
    rest = _from_first({"groups": options, "numbers": numbers})
    dcp.save({**run.trained(), **tensors, REST: rest}, checkpoint_id=str(folder))


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: Any) -> None:
    """Continue from ``save_checkpoint``, on any number of processes and in any wrapper that it has.

    All processes call this together. The model has the same adapters as the saved one, and the optimizer is of the
    same kind. A [`SparsityController`][sparse_peft.SparsityController] that was made for it, or is made afterwards,
    continues, too.

    Args:
        folder: that ``save_checkpoint`` wrote.
        model: with adapters, in DDP or FSDP2, with tensor parallelism, or in one process.
        optimizer: torch's, or accelerate's wrapper of one.

    Raises:
        NotImplementedError: FSDP1 or DeepSpeed, which have checkpoints of their own.
        ValueError: the checkpoint is of other parameters, or of other sizes.
    """
    run = _Run(model, optimizer)
    kinds = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    own = run.trained()
    for name, tensor in own.items():
        saved = kinds.get(name)
        if saved is None or tuple(saved.size) != tuple(tensor.shape):  # type: ignore[union-attr]
            found = "nothing" if saved is None else f"a tensor of shape {tuple(saved.size)}"  # type: ignore[union-attr]
            raise ValueError(
                f"{folder}: the checkpoint has {found} for {name} of shape {tuple(tensor.shape)}; make the model with "
                "the config that the run was started with"
            )
    room = {name: torch.empty_like(tensor) for name, tensor in own.items()}
    for name, kind in kinds.items():
        if name not in room:
            room[name] = run.room(name, kind)
    dcp.load(room, checkpoint_id=str(folder))
    run.put({name: room.pop(name) for name in own})
    run.put_optimizer(unpacked(room.pop(REST).numpy().tobytes()), room, folder)


class _Run:
    """A model and its optimizer by names that no wrapper changes."""

    def __init__(self, model: nn.Module, optimizer: Any):
        self.optimizer: Any = inner_optimizer(optimizer)
        if isinstance(self.optimizer, ZeroOptimizer):
            raise NotImplementedError(
                f"{self.optimizer.kind} of DeepSpeed has checkpoints of its own: engine.save_checkpoint(folder)"
            )
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise NotImplementedError(
                "FSDP1's flat parameters are saved by torch's own FSDP.optim_state_dict; use FSDP2 (fully_shard)"
            )
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        for layer in tuner_layers(self.model):
            for name in layer.deltas:
                layer.settled(name)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _states(self) -> Iterator[tuple[str, TrainedState]]:
        for name, module in self.model.named_modules():
            if isinstance(module, TrainedState) and any(p.requires_grad for p in module.parameters()):
                yield name, module

    def trained(self) -> dict[str, Tensor]:
        """``{name: tensor}`` of trained parameters, and of the buffers beside them."""
        found = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, state in self._states():
            found.update({f"{name}.{key}": tensor.detach() for key, tensor in state.state_dict().items()})
        return found

    @torch.no_grad()
    def put(self, tensors: dict[str, Tensor]) -> None:
        """Replace what ``trained`` gives."""
        release_layers(layer.ledger for layer in tuner_layers(self.model))
        for name, state in self._states():
            state.load_state_dict({key: tensors.pop(f"{name}.{key}") for key in state.state_dict()})
        for name, tensor in tensors.items():
            self.parameters[name].copy_(tensor)

    # ------------------------------------------------------------------ the optimizer

    def _named_groups(self) -> list[list[str]]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = [[names.get(id(p)) for p in group["params"]] for group in self.optimizer.param_groups]
        if any(name is None for group in groups for name in group):
            raise ValueError(
                f"{type(self.optimizer).__name__} trains parameters that the model does not have: make it from "
                "model.parameters() after wrapping"
            )
        return groups  # type: ignore[return-value]

    def optimizer_parts(self) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], dict[str, Tensor]]:
        """Options of the groups with their parameters' names, and of the state its numbers and its tensors."""
        groups, state = self._named_groups(), self.optimizer.state_dict()
        options: list[dict[str, Any]] = []
        numbers: dict[str, dict[str, Any]] = {}
        tensors: dict[str, Tensor] = {}
        for group, names in zip(state["param_groups"], groups, strict=True):
            options.append({**group, "params": names})
            for number, name in zip(group["params"], names, strict=True):
                for key, value in state["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        tensors[_key(name, key)] = value
                    else:
                        numbers.setdefault(name, {})[key] = value
        return options, numbers, tensors

    def room(self, name: str, kind: Any) -> Tensor:
        """What a saved tensor of the optimizer's state is read into."""
        dtype, size = kind.properties.dtype, tuple(kind.size)
        parameter = self.parameters.get(name.partition("|")[2].rpartition("|")[0])
        if parameter is None or not size:  # numbers stay on the CPU, as AdamW's steps
            return torch.empty(size, dtype=dtype)
        if isinstance(parameter, DTensor) and tuple(parameter.shape) == size:
            return torch.empty_like(parameter.detach(), dtype=dtype)
        return torch.empty(size, dtype=dtype, device=parameter.device)

    def put_optimizer(self, rest: dict[str, Any], tensors: dict[str, Tensor], folder: str | Path) -> None:
        """Load the optimizer's state, from which a controller takes its own."""
        groups = self._named_groups()
        saved = [group["params"] for group in rest["groups"]]
        if saved != groups:
            raise ValueError(
                f"{folder}: the checkpoint's optimizer trains {sum(map(len, saved))} parameters in {len(saved)} "
                f"groups, and this one {sum(map(len, groups))} in {len(groups)}, or others; make it as the run did"
            )
        known: dict[str, dict[str, Any]] = {}
        for saved_as, tensor in tensors.items():
            name, _, key = saved_as.partition("|")[2].rpartition("|")
            known.setdefault(name, {})[key] = tensor
        state: dict[int, dict[str, Any]] = {}
        options, number = [], 0
        for group in rest["groups"]:
            places = range(number, number := number + len(group["params"]))
            options.append({**group, "params": list(places)})
            for place, name in zip(places, group["params"], strict=True):
                mine = known.get(name, {}) | rest["numbers"].get(name, {})
                if mine:
                    state[place] = mine
        self.optimizer.load_state_dict({"state": state, "param_groups": options})


def _key(name: str, key: str) -> str:
    return f"optimizer|{name}|{key}"


def _from_first(thing: dict[str, Any]) -> Tensor:
    """The first process's numbers and small tensors as bytes, on every process."""
    found = [packed(thing)]
    if not Collectives().alone:
        dist.broadcast_object_list(found)
    return torch.frombuffer(bytearray(found[0]), dtype=torch.uint8)
