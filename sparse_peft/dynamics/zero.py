"""DeepSpeed's ZeRO optimizers, seen as the torch optimizers that they drive.

A ZeRO optimizer lays the parameters of a group one behind the other and gives each process a *partition* of that line,
in float32, with its own part of the optimizer's state. What a process has of one parameter is a range of its entries,
and of its partition. Nothing here imports DeepSpeed: it uses the attributes that DeepSpeed leaves at parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..calibrate.partitions import gather_missing, is_partitioned

# The attribute of a parameter with the ZeRO optimizer that trains it.
TRAINED_BY = "_sparse_peft_zero"


@dataclass(frozen=True, eq=False)
class Piece:
    """What this process has of one parameter.

    Attributes:
        flat: this process's partition of the parameter's group, float32; an optimizer's parameter.
        offset: where the parameter's piece begins in it.
        start: the piece's first entry in the flattened parameter.
        count: number of entries; 0 where other processes have all of it.
        group: the processes that have the other pieces.
    """

    flat: Tensor
    offset: int
    start: int
    count: int
    group: dist.ProcessGroup | None

    def gathered(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """The whole parameter's part of a partitioned tensor, in the parameter's shape.

        Args:
            tensor: ``flat``, or a tensor of its shape.
            parameter: the parameter.
        """
        shape = shape_of(parameter)
        whole = torch.zeros(shape.numel(), dtype=tensor.dtype, device=parameter.device)
        if self.count:
            whole[self.start : self.start + self.count] = tensor.detach()[self._mine].to(whole.device)
        dist.all_reduce(whole, group=self.group)  # exact: all others have zeros there
        return whole.view(shape)

    def write_(self, tensor: Tensor, value: Tensor) -> None:
        """Write this process's entries of a whole value into a tensor of ``flat``'s shape."""
        tensor.detach()[self._mine] = self.cut(value).to(tensor)

    def cut(self, value: Tensor) -> Tensor:
        """This process's entries of a whole value."""
        return value.detach().reshape(-1)[self.start : self.start + self.count]

    @property
    def _mine(self) -> slice:
        return slice(self.offset, self.offset + self.count)


def shape_of(parameter: Tensor) -> torch.Size:
    """The whole parameter's shape, also where stage 3 has partitioned it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def piece_of(parameter: Any, zero: Any) -> Piece:
    """What this process has of a parameter.

    Args:
        parameter: a trained one.
        zero: DeepSpeed's optimizer.
    """
    if is_partitioned(parameter):
        number, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = dist.get_rank(parameter.ds_process_group) * size
        count = max(0, min(size, parameter.ds_numel - start))
        return Piece(zero.fp32_partitioned_groups_flat[number], offset, start, count, parameter.ds_process_group)
    number = next(n for n, group in enumerate(zero.bit16_groups) if any(other is parameter for other in group))
    flat, found = zero.single_partition_of_fp32_groups[number], parameter._hp_mapping
    if found is None:
        return Piece(flat, 0, 0, 0, parameter._dp_group)
    mine, whole = found.hp_fragment_address, found.lp_fragment_address
    return Piece(flat, mine.start, whole.start, mine.numel, parameter._dp_group)


class ZeroOptimizer:
    """What methods ask of an optimizer, for one whose parameters and state are partitioned.

    Args:
        zero: ``DeepSpeedZeroOptimizer`` or ``DeepSpeedZeroOptimizer_Stage3``.

    Attributes:
        stepped: the torch optimizer inside, whose parameters are partitions.
        state: ``get(parameter)`` gathers the state of a whole parameter, as copies.
    """

    def __init__(self, zero: Any):
        self.zero = zero
        self.stepped: torch.optim.Optimizer = zero.optimizer
        self._watched: set[int] = set()
        self.state = _State(self)
        for group in self.param_groups:
            for parameter in group["params"]:
                setattr(parameter, TRAINED_BY, zero)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch optimizer's groups, with the model's parameters in place of the partitions."""
        inside = self.stepped.param_groups
        if not hasattr(self.zero, "fp16_groups"):
            return [{**g, "params": list(found)} for g, found in zip(inside, self.zero.bit16_groups, strict=True)]
        found = [{**group, "params": []} for group in inside]
        for number, parameters in enumerate(self.zero.fp16_groups):
            found[self.zero.sub_group_to_group_id[number]]["params"] += parameters
        return found

    @property
    def kind(self) -> str:
        """For messages."""
        if hasattr(self.zero, "fp16_groups"):
            return "ZeRO stage 3"
        return f"ZeRO stage {2 if self.zero.partition_gradients else 1}"

    # ------------------------------------------------------------------ steps

    def watch(self, parameters: Mapping[int, Tensor]) -> None:
        """Let step hooks act where these parameters are stepped, which must be at once.

        DeepSpeed steps the torch optimizer once for each group.

        Raises:
            NotImplementedError: they are in several groups.
        """
        flats = {id(piece_of(parameter, self.zero).flat) for parameter in parameters.values()}
        if len(flats) > 1:
            raise NotImplementedError(
                f"{self.kind} steps {len(flats)} groups of an adapter's parameters one after another; what changes "
                "in training needs all gradients before the first; give the adapter's parameters one group of the "
                "optimizer, and with stage 3 a sub_group_size that is larger than their number"
            )
        self._watched |= flats

    def register_step_pre_hook(self, hook: Callable[..., None]) -> Any:
        """As torch's; acts where the watched parameters are stepped."""
        return self.stepped.register_step_pre_hook(self._where_watched(hook))

    def register_step_post_hook(self, hook: Callable[..., None]) -> Any:
        """As torch's; the model has the new values when DeepSpeed's step has returned, and not yet then."""
        return self.stepped.register_step_post_hook(self._where_watched(hook))

    def register_state_dict_post_hook(self, hook: Callable[..., Any]) -> Any:
        return self.stepped.register_state_dict_post_hook(hook)

    def register_load_state_dict_post_hook(self, hook: Callable[..., None]) -> Any:
        return self.stepped.register_load_state_dict_post_hook(hook)

    def _where_watched(self, hook: Callable[..., None]) -> Callable[..., None]:
        def act(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if not self._watched or not stepped.isdisjoint(self._watched):
                hook(optimizer)

        return act

    # ------------------------------------------------------------------ gradients, values and state

    def gradient_of(self, parameter: Tensor) -> Tensor | None:
        """The whole gradient, float32, of a parameter that is about to be stepped."""
        piece = piece_of(parameter, self.zero)
        return None if piece.flat.grad is None else piece.gathered(piece.flat.grad, parameter)

    def write_gradient_(self, parameter: Tensor, gradient: Tensor) -> None:
        """Replace the gradient of a parameter that is about to be stepped, by one that is whole on all processes."""
        piece = piece_of(parameter, self.zero)
        assert piece.flat.grad is not None
        piece.write_(piece.flat.grad, gradient)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a whole parameter: gathered tensors, and numbers."""
        piece = piece_of(parameter, self.zero)
        kept = self.stepped.state.get(piece.flat) or {}
        found = {}
        for key in sorted(kept):
            value = kept[key]
            if isinstance(value, Tensor) and value.numel() > 1:
                self._check_state(key, value, piece.flat)
                value = piece.gathered(value, parameter)
            found[key] = value.clone() if isinstance(value, Tensor) else value
        return found

    def write_state_(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Write this process's part of a whole parameter's state."""
        piece = piece_of(parameter, self.zero)
        kept = self.stepped.state[piece.flat]
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.numel() != shape_of(parameter).numel():
                continue
            if kept[key].shape != piece.flat.shape:  # one number for all entries until now
                kept[key] = kept[key].expand(piece.flat.shape).clone()
            piece.write_(kept[key], value)

    @contextmanager
    def lent(self, parameter: Tensor) -> Iterator[torch.optim.Optimizer]:
        """The torch optimizer, which has the whole parameter and its state inside the block."""
        piece, state = piece_of(parameter, self.zero), self.state_of(parameter)
        group = self._group_of(piece.flat, parameter)
        optimizer, own = self.stepped, group["params"]
        group["params"] = [*own, parameter]
        if state:
            optimizer.state[parameter] = state
        try:
            yield optimizer
        finally:
            group["params"] = own
            changed = optimizer.state.pop(parameter, {})
        self.write_state_(parameter, changed)

    def _group_of(self, flat: Tensor, parameter: Tensor) -> dict[str, Any]:
        for inside, whole in zip(self.stepped.param_groups, self.param_groups, strict=True):
            if any(other is parameter for other in whole["params"]):
                return inside
        raise KeyError("the optimizer does not train this parameter")

    def _check_state(self, key: str, value: Tensor, flat: Tensor) -> None:
        if value.shape != flat.shape or not value.is_floating_point():
            raise NotImplementedError(
                f"{type(self.stepped).__name__} inside of {self.kind} keeps {key!r} of shape {tuple(value.shape)}, "
                f"{value.dtype}, for a partition of {flat.numel()} entries, which cannot be moved with the entries; "
                "use an optimizer with floats for each entry, such as AdamW, or a selection that does not change"
            )


class _State:
    """An optimizer's state, gathered for each parameter that is asked for."""

    def __init__(self, owner: ZeroOptimizer):
        self._owner = owner

    def get(self, parameter: Tensor, default: Any = None) -> dict[str, Any] | Any:
        return self._owner.state_of(parameter) or default


def full_master(parameter: Tensor) -> Tensor | None:
    """The whole parameter, in float32, that ZeRO trains; None for parameters that it does not train."""
    zero = getattr(parameter, TRAINED_BY, None)
    if zero is None:
        return None
    piece = piece_of(parameter, zero)
    if parameter.dtype == piece.flat.dtype and not is_partitioned(parameter):
        return parameter.detach()  # the same bits
    return piece.gathered(piece.flat, parameter)


@torch.no_grad()
def write_master_(parameter: Any, value: Tensor) -> bool:
    """Write a parameter that ZeRO trains, and what the model computes with.

    Args:
        parameter: the model's.
        value: whole, the same on all processes.

    Returns:
        Whether it is one; nothing is written otherwise.
    """
    zero = getattr(parameter, TRAINED_BY, None)
    if zero is None:
        return False
    piece = piece_of(parameter, zero)
    piece.write_(piece.flat, value)
    if is_partitioned(parameter):
        parameter.ds_tensor[: piece.count] = piece.cut(value).to(parameter.ds_tensor)
        if parameter.numel() == parameter.ds_numel:  # it stays gathered between steps
            parameter.detach().copy_(value.view(parameter.shape))
    else:
        parameter.detach().copy_(value.view(parameter.shape))
    return True


def keep_whole(parameters: Iterable[Any]) -> None:
    """Let every process have these parameters whole between the steps, of which stage 3 releases all but small ones.

    Optimizer state and the float32 parameters stay partitioned. All processes call this together.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    for parameter in partitioned:
        if not parameter.ds_persist:
            parameter.ds_persist = True
            zero = getattr(parameter, "_z3_optimizer", None)
            if zero is not None:
                zero.persistent_parameters.append(parameter)
    gather_missing(partitioned)


def gathered_weight(parameter: Any) -> Tensor:
    """A frozen parameter that stage 3 has partitioned, whole, as a new tensor; all processes call this together."""
    part = parameter.ds_tensor.detach().to(parameter.device)
    group = parameter.ds_process_group
    whole = part.new_empty(part.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole[: parameter.ds_numel].view(parameter.ds_shape)
