"""AdamW that counts each entry's own steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..dynamics.full_tensor import full_tensor, write_full_tensor_
from ..dynamics.optimizer_state import ObservedMoments, rearranged
from .entrywise_optimizer import EntrywiseOptimizer


class SparseAdamW(EntrywiseOptimizer):
    """AdamW with a bias correction by the age of each entry.

    Papers: AdamW, https://arxiv.org/abs/1711.05101, and SpIEL, section 3, https://arxiv.org/abs/2401.16405.

    Until positions change it equals torch's AdamW. The first step of a later entry is one learning rate long, as that
    of any other. Gradients that were observed before give it the moments of an entry that has trained for as many
    steps.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; pulls the values of a sparse delta, not the weights, to 0.

    Raises:
        ValueError: a hyper-parameter out of range.

    Example:
        >>> import torch
        >>> from peft import get_peft_model

        >>> from sparse_peft import SparseAdamW, SparseConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SparseConfig(density=0.05, target_modules=["0"]))
        >>> trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        >>> optimizer = SparseAdamW(trained, lr=1e-3)
        >>> model(torch.ones(8, 64)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.check_at_least_0(lr=lr, eps=eps, weight_decay=weight_decay)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas!r}: two numbers in [0, 1) are expected")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        gradient = gradient.to(dtype)
        state = self.state[parameter]
        if not state:
            state.update(self._first_state(parameter, gradient))
        beta1, beta2 = group["betas"]
        first, second, age = state["exp_avg"], state["exp_avg_sq"], state["age"]
        age += 1
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        exact = age.double()
        corrected = (second / (1 - beta2**exact).to(dtype)).sqrt_().add_(group["eps"])
        update = (first / (1 - beta1**exact).to(dtype)).div_(corrected)
        value = parameter.to(dtype) * (1 - group["lr"] * group["weight_decay"])
        parameter.copy_(value.sub_(update, alpha=group["lr"]))

    @staticmethod
    def _first_state(parameter: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        # one age for all entries; a tensor of the parameter's size from the first change of positions on, or from the
        # start where it is sharded: distributed checkpoints are loaded into existing tensors
        sharded = isinstance(parameter, DTensor)
        age = torch.zeros_like(gradient, dtype=torch.float32) if sharded else torch.zeros((), device=parameter.device)
        return {"exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient), "age": age}

    @torch.no_grad()
    def remap_state(self, parameter: Tensor, source: Tensor, seeds: ObservedMoments | None = None) -> None:
        state = self.state.get(parameter) or {}
        if not state:
            return
        group = next(group for group in self.param_groups if any(other is parameter for other in group["params"]))
        beta1, beta2 = group["betas"]
        old = {name: full_tensor(state[name]) for name in ("exp_avg", "exp_avg_sq", "age")}
        old["age"] = old["age"].expand(old["exp_avg"].shape)
        new: dict[str, Tensor | None] = dict.fromkeys(old)
        if seeds is not None:
            new["exp_avg"] = seeds.mean * (1 - beta1**seeds.steps)
            new["exp_avg_sq"] = seeds.mean_square * (1 - beta2**seeds.steps)
            new["age"] = seeds.steps
        for name, tensor in old.items():
            value = rearranged(tensor, source, new[name])
            if state["exp_avg"].shape != value.shape:
                state[name] = value
                continue
            if state[name].shape != value.shape:
                state[name] = torch.zeros_like(state["exp_avg"], dtype=torch.float32)
            write_full_tensor_(state[name], value)
