"""SM3 over sparse values: the optimizer of SpIEL-MA."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..dynamics.optimizer_state import ObservedMoments, rearranged
from ..dynamics.sm3_accumulators import accumulate_
from ..support import Support
from ..tuners.base_state import TrainedState
from .entrywise_optimizer import EntrywiseOptimizer


class SM3(EntrywiseOptimizer):
    """SM3-II with a sparse delta's values as entries of their matrix, as in SpIEL-MA.

    Papers: SM3, https://arxiv.org/abs/1901.11150, and SpIEL, section 3, https://arxiv.org/abs/2401.16405.

    A matrix has one accumulator for each row and column instead of one for each trained entry, so ``k`` values of a
    ``(rows, cols)`` weight cost ``4 * (rows + cols)`` bytes of state. With ``selection="momentum"`` their products
    are the scores by which positions grow. Other parameters are treated as the matrices or vectors they are.

    With a Trainer: ``optimizer_cls_and_kwargs=(SM3, {"lr": 1e-3, "peft_model": model})``, where ``model`` may be the
    base model that the trainer adapts. Rates are higher than Adam's: the paper searches 4e-4 to 2e-3.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        peft_model: the model that has the values' positions.
        momentum: of the update, in [0, 1); 0 keeps no buffer.
        eps: added to the accumulators.
        weight_decay: decoupled; pulls the values of a delta, not the weights, to 0.

    Raises:
        ValueError: a hyper-parameter out of range.

    Example:
        >>> import torch
        >>> from peft import get_peft_model

        >>> from sparse_peft import SM3, SparseConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SparseConfig(density=0.05, target_modules=["0"]))
        >>> trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        >>> optimizer = SM3(trained, lr=1e-2, peft_model=model)
        >>> model(torch.ones(8, 64)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        peft_model: nn.Module,
        momentum: float = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.check_at_least_0(lr=lr, momentum=momentum, eps=eps, weight_decay=weight_decay)
        if momentum >= 1:
            raise ValueError(f"momentum={momentum!r}: below 1 is expected")
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})
        self._model = peft_model
        self._states: dict[int, TrainedState] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_states"} | {"_states": {}}

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Step one parameter of a group.

        Raises:
            NotImplementedError: a sharded or a sparse gradient.
        """
        if isinstance(parameter, DTensor) or gradient.is_sparse:
            raise NotImplementedError(
                "SM3 needs whole, dense gradients: rows and columns of a matrix are spread over the processes of FSDP "
                "(use DDP, or AdamW with selection='momentum'), and sparse gradients have no columns"
            )
        gradient = gradient.to(torch.float32).nan_to_num(0.0, 0.0, 0.0)
        accumulators = self._accumulate(parameter, gradient)
        update = gradient / (accumulators + group["eps"]).sqrt()
        beta = group["momentum"]
        if beta:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(update)
            update = state["momentum_buffer"].mul_(beta).add_(update, alpha=1 - beta)
        value = parameter.to(torch.float32) - group["lr"] * update
        parameter.copy_(value.mul_(1 - group["lr"] * group["weight_decay"]))

    def _accumulate(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Add the gradient to the parameter's accumulators; returns the accumulator of each entry."""
        state, device = self.state[parameter], parameter.device
        support = self._support_of(parameter)
        if support is None and parameter.ndim < 2:
            if "accumulator" not in state:
                state["accumulator"] = torch.zeros(parameter.shape, device=device)
            return state["accumulator"].add_(gradient.square())
        shape = (parameter.shape[0], parameter[0].numel()) if support is None else support.shape
        if "row" not in state:
            state["row"], state["col"] = (torch.zeros(n, device=device) for n in shape)
        row, col = state["row"], state["col"]
        if support is not None:
            return accumulate_(row, col, support, gradient)
        entries = torch.minimum(row[:, None], col) + gradient.reshape(shape).square()
        row.copy_(torch.maximum(row, entries.amax(1)))
        col.copy_(torch.maximum(col, entries.amax(0)))
        return entries.view(parameter.shape)

    def _support_of(self, parameter: Tensor) -> Support | None:
        """The positions of a delta's values; None for any other parameter."""
        state = self._states.get(id(parameter))
        if state is None or state.watched is not parameter:
            # parameters are replaced by loading, and by reselection between layers
            states = [module for module in self._model.modules() if isinstance(module, TrainedState)]
            self._states = {id(state.watched): state for state in states}
            state = self._states.get(id(parameter))
        return None if state is None else state.entry_support()

    def row_and_column_accumulators(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """``(rows,)`` and ``(cols,)`` float32 of a matrix or of a delta's values; None before the first step."""
        state = self.state.get(parameter, {})
        return (state["row"], state["col"]) if "row" in state else None

    def remap_state(self, parameter: Tensor, source: Tensor, seeds: ObservedMoments | None = None) -> None:
        """Move momentum with its entries; the accumulators are those of the matrix and stay."""
        state = self.state.get(parameter) or {}
        if "momentum_buffer" in state:
            state["momentum_buffer"] = rearranged(state["momentum_buffer"], source)
