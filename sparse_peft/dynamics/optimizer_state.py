"""Optimizer state moves with a parameter's entries when their positions change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .full_tensor import full_tensor, write_full_tensor_
from .zero import ZeroOptimizer

BNB_BLOCK = 256


@dataclass(frozen=True)
class ObservedMoments:
    """Gradients of new entries, observed before they began to train.

    Attributes:
        mean: ``(entries,)`` float32 mean gradient of an optimizer step; 0 where none was observed.
        mean_square: ``(entries,)`` float32 mean of its square; 0 likewise.
        steps: ``(entries,)`` number of observed optimizer steps.
    """

    mean: Tensor
    mean_square: Tensor
    steps: Tensor


@runtime_checkable
class RemapsState(Protocol):
    """An optimizer that moves its state with the entries itself."""

    def remap_state(self, parameter: Tensor, source: Tensor, seeds: ObservedMoments | None = None) -> None:
        """Rearrange a parameter's state; the arguments are those of ``remap_``."""


ZERO_OPTIMIZERS = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrappers, or what stands for the one inside DeepSpeed's.

    Args:
        optimizer: torch's, or a wrapper of one; DeepSpeed's ZeRO optimizer (stages 1 to 3), which
            ``deepspeed.initialize`` returns, or accelerate's wrapper of that.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer) and not _is_zero(inner):
        inner = inner.optimizer
    zero = inner if _is_zero(inner) else getattr(inner, "optimizer", None)
    if _is_zero(zero):
        view: Any = ZeroOptimizer(zero)
        return view
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer  # type: ignore[return-value]
    if not isinstance(inner, torch.optim.Optimizer) or _is_deepspeeds(zero):
        kind = type(zero if _is_deepspeeds(zero) else optimizer)
        raise TypeError(
            f"optimizer of type {kind.__module__}.{kind.__name__}: a torch.optim.Optimizer is expected, or one of "
            "DeepSpeed's ZeRO stages 1 to 3, whose state can be moved with the entries; use one of them, DDP or "
            "FSDP2, or a selection that does not change"
        )
    return inner


def _is_zero(optimizer: Any) -> bool:
    return _is_deepspeeds(optimizer) and type(optimizer).__name__ in ZERO_OPTIMIZERS


def _is_deepspeeds(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.runtime.")


def scaler_of(optimizer: Any) -> torch.amp.GradScaler | None:
    """The loss scaler that accelerate's wrapper of an optimizer steps it with; None without one."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        if getattr(optimizer, "scaler", None) is not None:
            return optimizer.scaler
        optimizer = optimizer.optimizer
    return None


def scaled_gradient_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """A parameter's whole gradient right before the optimizer steps, as it is handed over; None if it has none."""
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.gradient_of(parameter)
    return None if parameter.grad is None else full_tensor(parameter.grad)


def gradient_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """A parameter's whole gradient right before the optimizer steps, without a loss scale; None if it has none."""
    gradient, scale = scaled_gradient_of(optimizer, parameter), getattr(optimizer, "grad_scale", None)
    return gradient if gradient is None or scale is None else gradient / scale.to(gradient.device)


@torch.no_grad()
def add_gradient_(optimizer: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's gradient right before the optimizer steps; ``gradient`` is whole, on every process."""
    if isinstance(optimizer, ZeroOptimizer):
        own = optimizer.gradient_of(parameter)
        optimizer.write_gradient_(parameter, gradient if own is None else own + gradient)
        return
    # a fused optimizer under a loss scaler undoes the scale inside its step, which comes after this
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        gradient = gradient * scale.to(gradient.device)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    write_full_tensor_(parameter.grad, full_tensor(parameter.grad) + gradient)


@torch.no_grad()
def mask_gradient_(optimizer: torch.optim.Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Set a parameter's gradient to zero where ``mask`` is True, right before the optimizer steps."""
    if isinstance(optimizer, ZeroOptimizer):
        own = optimizer.gradient_of(parameter)
        if own is not None:
            optimizer.write_gradient_(parameter, own.masked_fill(mask, 0))
    elif parameter.grad is not None:
        write_full_tensor_(parameter.grad, full_tensor(parameter.grad).masked_fill(mask, 0))


def replace_parameter(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor) -> None:
    """Let the optimizer train another parameter in place of one, with the same state."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


def rearranged(tensor: Tensor, source: Tensor, new: Tensor | None = None) -> Tensor:
    """``tensor[..., source]`` where ``source`` is a slot, and ``new`` (or 0) where it is -1."""
    moved = tensor[..., source.clamp(min=0)]
    is_new = source < 0
    return moved.masked_fill(is_new, 0) if new is None else torch.where(is_new, new.to(moved.dtype), moved)


@torch.no_grad()
def remap_(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    source: Tensor,
    seeds: ObservedMoments | None = None,
    *,
    old_size: int,
) -> None:
    """Rearrange a parameter's optimizer state as its entries were rearranged.

    Every state tensor of the parameter's former shape is moved, whatever the optimizer; scalars stay. What a new
    entry gets depends on what the tensor holds (``g`` and ``q`` are the observed mean gradient and mean square, ``s``
    the number of observed steps, ``t`` the optimizer's):

    ===========================================  =====================================================
    Adam, AdamW and their kin, also in 8 bit     ``g (1 - beta1^t)``, ``q (1 - beta2^t)``: bias-corrected
                                                 with the shared ``t``, exactly ``g`` and ``q``
    averages without correction (Lion, RMSprop,  ``g (1 - beta^s)``, ``q (1 - beta^s)``: as if it had
    Adadelta)                                    trained for ``s`` steps
    SGD with momentum                            ``g (1 - dampening) (1 - mu^s) / (1 - mu)``: likewise
    Adafactor                                    ``q``: its decay makes a plain average
    Adagrad                                      ``q s``
    anything else, or nothing was observed       0
    ===========================================  =====================================================

    With zeros and a shared ``t`` far above 1, Adam's first step of a new entry is about ``(1 - beta1) / sqrt(1 -
    beta2)`` learning rates long, 3.2 with the usual betas: it seeds the first moment with a tenth of the gradient and
    the second with a thousandth of its square. [`SparseAdamW`][sparse_peft.SparseAdamW] counts each entry's own steps.

    An optimizer with a method ``remap_state`` does all this itself; see ``RemapsState``.

    Args:
        optimizer: a torch optimizer.
        parameter: ``(new entries,)``, in the optimizer.
        source: ``(new entries,)`` int64: the old slot of an entry that stays, -1 for a new one.
        seeds: of the new ones; None without observations.
        old_size: number of entries before.

    Raises:
        NotImplementedError: 8-bit states that are not block-wise.
    """
    if isinstance(optimizer, ZeroOptimizer):
        with optimizer.lent(parameter) as inside:
            remap_(inside, parameter, source, seeds, old_size=old_size)
        return
    if isinstance(optimizer, RemapsState):
        optimizer.remap_state(parameter, source, seeds)
        return
    state = optimizer.state.get(parameter) or {}
    group = next(group for group in optimizer.param_groups if any(other is parameter for other in group["params"]))
    for key, tensor in list(state.items()):
        if not isinstance(tensor, Tensor) or key.startswith(("qmap", "absmax")) or tensor.ndim == 0:
            continue
        if tensor.shape[-1] != old_size or tensor.ndim > 2:
            continue
        new = None if seeds is None else _seed(key, state, group, optimizer, seeds)
        if f"qmap{key[-1]}" in state and tensor.dtype == torch.uint8:
            _remap_8bit(optimizer, parameter, state, key, source, new)
        else:
            if new is not None and tensor.ndim == 2:
                new = torch.stack((new, torch.zeros_like(new)))  # AdEMAMix: a fast average, and one too slow to seed
            _put(state, key, rearranged(full_tensor(tensor).to(torch.float32), source, new).to(tensor.dtype))


def _put(state: dict[str, Any], key: str, value: Tensor) -> None:
    """Set a state tensor, in place where the size allows it: it may be sharded, or paged."""
    if state[key].shape == value.shape:
        write_full_tensor_(state[key], value)
    else:
        state[key] = value


def _seed(
    key: str,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    seeds: ObservedMoments,
) -> Tensor | None:
    """``(entries,)`` first state of the new entries; None for an unknown kind of state."""
    name = getattr(optimizer, "optimizer_name", None)  # bitsandbytes' own
    betas: Any = group.get("betas")
    squares = seeds.mean_square
    if key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") and betas is not None and "exp_avg_sq" in state:
        return _corrected(state, seeds, betas, first=key == "exp_avg")
    if key in ("state1", "state2") and name in ("adam", "lamb", "ademamix"):
        return _corrected(state, seeds, betas, first=key == "state1")
    if (key == "exp_avg" and betas is not None) or (key == "state1" and name == "lion"):
        return seeds.mean * (1 - betas[1] ** seeds.steps)
    if key == "exp_avg" and group.get("beta1") is not None:
        return seeds.mean * (1 - group["beta1"] ** seeds.steps)
    if key == "momentum_buffer" and "dampening" in group:
        damped = seeds.mean * (1 - group["dampening"])
        return damped * (1 - group["momentum"] ** seeds.steps) / (1 - group["momentum"])
    if key == "state1" and name == "momentum":
        return seeds.mean * (1 - betas[0] ** seeds.steps) / (1 - betas[0])
    if key in ("square_avg", "grad_avg") and ("alpha" in group or "rho" in group):
        decay = group["alpha"] if "alpha" in group else group["rho"]
        return (squares if key == "square_avg" else seeds.mean) * (1 - decay**seeds.steps)
    if key in ("variance", "exp_avg_sq"):
        return squares
    if key == "sum":
        return squares * seeds.steps
    return None


def _corrected(state: Mapping[str, Any], seeds: ObservedMoments, betas: tuple[float, ...], first: bool) -> Tensor:
    steps = float(state["step"])
    return seeds.mean * (1 - betas[0] ** steps) if first else seeds.mean_square * (1 - betas[1] ** steps)


def _remap_8bit(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    state: dict[str, Any],
    key: str,
    source: Tensor,
    new: Tensor | None,
) -> None:
    """Rearrange bitsandbytes' block-wise 8-bit state through float32: entries change blocks, and so their codes."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise  # noqa: PLC0415  (an optional package)

    number = key[-1]
    code, absmax = state[f"qmap{number}"], state.get(f"absmax{number}")
    if absmax is None:
        raise NotImplementedError(
            f"{type(optimizer).__name__} with block_wise=False has one scale for a whole tensor, and rounds small "
            "entries to 0; make it with block_wise=True"
        )
    codes = state[key]
    two = codes.ndim == 2
    rows = []
    for row, (part, scale) in enumerate(zip(codes, absmax, strict=True) if two else [(codes, absmax)]):
        values = dequantize_blockwise(part.contiguous(), absmax=scale, code=code, blocksize=BNB_BLOCK)
        values = rearranged(values, source, new if row == 0 else None)
        rows.append(quantize_blockwise(values, code=code, blocksize=BNB_BLOCK))
    coded = [packed for packed, _ in rows]
    scales = [quantised.absmax for _, quantised in rows]
    value = torch.stack(coded) if two else coded[0]
    if value.shape != codes.shape and not two:
        make_buffer: Any = getattr(optimizer, "get_state_buffer")  # noqa: B009
        state[key] = make_buffer(parameter, dtype=torch.uint8)
    _put(state, key, value)
    state[f"absmax{number}"] = torch.stack(scales) if two else scales[0]


def restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Restore the dtypes of saved state tensors, which torch casts to their parameter's."""
    groups = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    named = {
        name: parameter for old, new in groups for name, parameter in zip(old["params"], new["params"], strict=True)
    }
    for name, saved in state_dict["state"].items():
        state = optimizer.state[named[name]]
        for key, value in saved.items():
            if isinstance(value, Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(named[name].device, copy=True)
