"""One layer in a training that reselects its positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dynamics.full_tensor import full_tensor, write_full_tensor_
from ...dynamics.optimizer_state import ObservedMoments, remap_, replace_parameter, scaled_gradient_of
from ...dynamics.sm3_accumulators import accumulate_
from ...ops import add_to_support_, observe
from ...support import Exchange
from ..agreement import fingerprint
from ..delta import SparseDelta
from ..delta_layer import SparseTunerLayer
from .candidates import CandidateWindow, ExpertWindows, Window, window_size


class LayerTrack:
    """The statistics of one layer, and its changes.

    Args:
        layer: the layer.
        adapter: the adapter's name.

    Attributes:
        support: the trained positions.
        born: ``(entries,)`` int32, number of the optimizer step after which each entry began to train.
        window: candidates that are being observed; None outside of a window.
        gradient: ``(entries,)`` float32, the values' gradient in this step; None outside of a window.
        accumulators: SM3's, ``(rows,)`` and ``(cols,)`` float32; None before the first gradient.
    """

    def __init__(self, layer: SparseTunerLayer[SparseDelta], adapter: str):
        self.layer, self.adapter = layer, adapter
        self.gradient: Tensor | None = None
        self.accumulators: tuple[Tensor, Tensor] | None = None
        self.begin(step=0)

    @property
    def delta(self) -> SparseDelta:
        return self.layer.deltas[self.adapter]

    def begin(self, step: int) -> None:
        """Start with the layer's present positions, all of one age."""
        self.support = self.layer.support(self.adapter)
        self.born = torch.full((self.support.nnz,), step, dtype=torch.int32, device=self.support.device)
        self.watch(None)

    # ------------------------------------------------------------------ statistics

    def watch(self, window: Window | None) -> None:
        """Observe candidates in the backward passes from now on, or none."""
        self.window = window
        observers = [None] * self.layer.matrices if window is None else window.observers
        for number, observer in enumerate(observers):
            observe(self.layer.observer_key + number, self.layer.whole_observer(observer))

    def new_window(self, limit: int, length: int) -> Window:
        """A window of candidates of the present positions.

        Args:
            limit: number of candidates.
            length: number of optimizer steps.
        """
        experts = self.layer.matrices
        if experts == 1:
            return CandidateWindow(self.support, limit, length)
        return ExpertWindows(self.support, limit, length, experts)

    def keep_gradient(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep a copy of the gradient that the optimizer is about to use; zeros without one."""
        gradient = scaled_gradient_of(optimizer, self.delta.values)
        if gradient is None:
            self.gradient = torch.zeros(self.support.nnz, device=self.support.device)
        else:
            self.gradient = gradient.to(torch.float32, copy=True)

    def accumulate(self, optimizer: torch.optim.Optimizer) -> None:
        """Add this step's gradient to SM3's accumulators."""
        if self.accumulators is None:
            rows, cols = (torch.zeros(n, device=self.support.device) for n in self.support.shape)
            self.accumulators = rows, cols
        gradient = scaled_gradient_of(optimizer, self.delta.values)
        if gradient is not None:
            accumulate_(*self.accumulators, self.support, gradient.to(torch.float32))

    def weight(self) -> Tensor:
        """A copy of the weight as trained so far, ``(rows, cols)`` in the base's floats; whole if it is sharded."""
        self.layer.release()
        weight = full_tensor(self.layer.dense_base_weight()).clone()
        add_to_support_(weight, self.support, self.delta.scaled(full_tensor(self.delta.values)))
        return weight

    # ------------------------------------------------------------------ changes

    def check(self) -> None:
        """Refuse changes of a layer that cannot change now.

        Raises:
            RuntimeError: adapters are merged into it.
            ValueError: values that are not finite.
        """
        name = self.layer.name
        if self.layer.merged:
            raise RuntimeError(
                f"layer {name}: positions cannot change while adapters are merged "
                f"({', '.join(self.layer.merged_adapters)}); call unmerge_adapter() before training goes on"
            )
        if not bool(full_tensor(self.delta.values).isfinite().all()):
            raise ValueError(
                f"layer {name}: values of adapter {self.adapter} are NaN or infinite: the training diverged; go "
                "back to an earlier checkpoint, with a lower learning rate or with clipping"
            )

    def apply(
        self, result: Exchange, old: Tensor, step: int, optimizer: torch.optim.Optimizer, seeds: ObservedMoments | None
    ) -> None:
        """Exchange entries, with their values and optimizer state.

        Args:
            result: the exchange.
            old: ``(entries,)`` the values before.
            step: number of the optimizer step.
            optimizer: of the values.
            seeds: observed gradients of the new entries.
        """
        if result.replaced == 0 and result.support.nnz == self.support.nnz:
            return
        self.layer.release()
        is_new, slots = result.source < 0, result.source.clamp(min=0)
        if is_new.numel() != old.numel():
            self._resize(is_new.numel(), optimizer)
        parameter = self.delta.values
        write_full_tensor_(parameter, old[slots].masked_fill_(is_new, 0))
        remap_(optimizer, parameter, result.source, seeds, old_size=old.numel())
        parameter.grad = None  # belongs to the entries before
        self.born = torch.where(is_new, step, self.born[slots])
        self.delta.support = result.support
        self.support = self.layer.support(self.adapter)
        self.layer.rejoin()

    def _resize(self, entries: int, optimizer: torch.optim.Optimizer) -> None:
        old = self.delta.values
        self.delta.resize(entries)
        replace_parameter(optimizer, old, self.delta.values)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"positions": fingerprint(self.support), "born": self.born.clone()}
        if self.window is not None and self.window.steps:
            state["window"] = self.window.state_dict()
        if self.accumulators is not None:
            state["row"], state["col"] = (tensor.clone() for tensor in self.accumulators)
        return state

    def load_state_dict(self, state: dict[str, Any], length: int) -> None:
        """Continue from a ``state_dict``; the adapter is loaded before.

        Args:
            state: the saved state.
            length: number of optimizer steps in a window.

        Raises:
            ValueError: the state is of other positions.
        """
        self.begin(step=0)
        if state["positions"] != fingerprint(self.support):
            raise ValueError(
                f"layer {self.layer.name}: the adapter's positions are not those that the optimizer's checkpoint was "
                "saved with; load the adapter of the same checkpoint before the optimizer's state"
            )
        self.born = state["born"].to(self.born.device)
        if "window" in state:
            window = self.new_window(window_size(state["window"]), length)
            window.load_state_dict(state["window"])
            self.watch(window)
        if "row" in state:
            row, col = (state[key].to(self.support.device) for key in ("row", "col"))
            self.accumulators = row, col
