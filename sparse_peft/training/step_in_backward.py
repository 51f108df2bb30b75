"""Optimizer steps inside the backward pass, so that no more than one layer's gradient is alive."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer
from transformers import Trainer, TrainingArguments


class StepInBackward(Optimizer):
    """Any torch optimizer, stepped for each parameter as soon as the backward pass has its gradient.

    The gradient is freed then: a step keeps those of one parameter, and not of all. Results are those of the plain
    optimizer, bit for bit. Learning rates and other options are read from ``param_groups`` in each step, so
    schedulers work. Call ``step`` after each backward pass, as always; the parameters are stepped by then.

    What needs all gradients at once does not go with it: clipping of their norm, a loss scaler, accumulation over
    several backward passes, their average over processes, and adapters whose positions change in training.

    Follows torch's ``register_post_accumulate_grad_hook``. LOMO, https://arxiv.org/abs/2306.09782, fuses SGD in this
    way.

    Args:
        params: parameters or parameter groups.
        optimizer_class: of torch, or with its interface; not one that calls a closure, such as LBFGS.
        options: of the optimizer, such as ``lr``.

    Raises:
        TypeError: an optimizer that needs a closure.
        RuntimeError: several processes, whose gradients would have to be averaged.

    Example:
        >>> import torch
        >>> from peft import get_peft_model

        >>> from sparse_peft import SparseConfig, StepInBackward
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SparseConfig(density=0.05, target_modules=["0"]))
        >>> trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        >>> optimizer = StepInBackward(trained, torch.optim.AdamW, lr=1e-3)
        >>> model(torch.ones(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> all(parameter.grad is None for parameter in trained)
        True
    """

    steps_in_backward = True

    def __init__(
        self, params: Iterable[Any], optimizer_class: type[Optimizer] = torch.optim.AdamW, **options: Any
    ) -> None:
        _check_class(optimizer_class)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"StepInBackward steps before the gradients of {dist.get_world_size()} processes are averaged; use "
                f"{optimizer_class.__name__} itself"
            )
        whole = optimizer_class(params, **options)
        super().__init__(whole.param_groups, whole.defaults)
        self._stepped: set[Tensor] = set()
        self._own = {
            parameter: optimizer_class([{**group, "params": [parameter]}], **options)
            for group in self.param_groups
            for parameter in group["params"]
        }
        self._group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        self._share_state()
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._step_one) for parameter in self._own]

    def _share_state(self) -> None:
        """All optimizers of one parameter write to the state of this one."""
        for own in self._own.values():
            own.state = self.state

    @torch.no_grad()
    def _step_one(self, parameter: Tensor) -> None:
        if parameter in self._stepped:
            raise RuntimeError(
                "a second backward pass before optimizer.step(): StepInBackward has stepped with the first one's "
                "gradient, so gradients cannot be accumulated; use a larger batch, or the plain optimizer"
            )
        self._stepped.add(parameter)
        own, group = self._own[parameter], self._group_of[parameter]
        own.param_groups[0].update({name: value for name, value in group.items() if name != "params"})
        own.step()
        parameter.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Complete a step, whose parameters the backward pass stepped.

        Raises:
            TypeError: a closure, which would have to run a backward pass inside.
        """
        if closure is not None:
            raise TypeError("StepInBackward takes no closure: parameters are stepped in loss.backward()")
        self._stepped.clear()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # what GradScaler asks before it steps an optimizer
        raise RuntimeError(
            "a gradient scaler cannot take back what StepInBackward has stepped with scaled gradients; train in "
            "bfloat16 without a scaler, or with the plain optimizer"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        self._share_state()

    def close(self) -> None:
        """Remove the hooks: backward passes leave gradients again, and step nothing."""
        for hook in self._hooks:
            hook.remove()


def _check_class(optimizer_class: type[Optimizer]) -> None:
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"optimizer_class={optimizer_class.__name__}: it calls a closure that runs the backward pass, in which it "
            "would have to step; choose another, such as torch.optim.AdamW"
        )


def step_in_backward(args: TrainingArguments) -> tuple[type[Optimizer], dict[str, Any]]:
    """The optimizer of a Trainer's arguments, stepped in the backward pass.

    Args:
        args: of the Trainer; ``optim``, the learning rate and the optimizer's other options are read from them.

    Returns:
        ``optimizer_cls_and_kwargs`` of the Trainer.

    Raises:
        ValueError: arguments that need all gradients at once.

    Example:
        >>> from transformers import TrainingArguments

        >>> from sparse_peft import step_in_backward
        >>> args = TrainingArguments(max_grad_norm=0, optim="adamw_torch", report_to=[])
        >>> step_in_backward(args)[0].__name__  # Trainer(model, args, optimizer_cls_and_kwargs=step_in_backward(args))
        'StepInBackward'
    """
    needs = {
        "max_grad_norm": (args.max_grad_norm, 0, "the norm that is clipped is that of all gradients"),
        "gradient_accumulation_steps": (args.gradient_accumulation_steps, 1, "each backward pass is a step"),
        "fp16": (args.fp16, False, "a scaler skips steps after the backward pass; use bf16=True"),
    }
    for name, (value, wanted, why) in needs.items():
        if value != wanted:
            raise ValueError(
                f"{name}={value!r}: optimizer steps in the backward pass need {name}={wanted!r}, as {why}"
            )
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    return StepInBackward, {"optimizer_class": optimizer_class, **options}
