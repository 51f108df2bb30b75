"""The effective weights of fused experts, one expert at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from ..numerics import panels
from ..ops import UNOBSERVED, ExpertSource, add_to_support_
from .active_delta import ActiveDelta
from .sources import AdaptedLayer, LayerSource, Panel

P = ParamSpec("P")
T = TypeVar("T")


class WholeSource(ExpertSource, Protocol):
    """Effective weights of experts that the parameter itself may hold."""

    @property
    def is_whole(self) -> bool:
        """Whether the parameter, as it is in a forward pass, holds the effective weights."""
        ...


class ExpertsSource(LayerSource):
    """The weights of all experts in one parameter.

    Args:
        layer: whose parameter it is.
        delta: the adapters that act; None for the base weight alone.
        resident: whether the parameter itself may hold the adapters' entries.
        experts: number of experts.
    """

    def __init__(self, layer: AdaptedLayer, delta: ActiveDelta | None, resident: bool, experts: int):
        super().__init__(layer, delta)
        self.resident, self.experts = resident, experts

    @property
    def is_whole(self) -> bool:
        """Whether the parameter, as it is in a forward pass, holds the effective weights."""
        return self.resident or self.delta is None

    def expert(self, number: int) -> ExpertPanels:
        """The weight of one expert."""
        return ExpertPanels(self, number)

    def whole(self, dtype: torch.dtype) -> Tensor | None:
        """The parameter, where it holds the effective weights and has the dtype."""
        weight = self.layer.base_parameter.detach()
        return None if weight.dtype != dtype or self._needs_copies() else weight

    def _needs_copies(self) -> bool:
        """Whether the parameter does not hold the effective weights, once it holds what it may."""
        holds = self.layer.hold(self.delta if self.resident else None, self.stamp if self.resident else None)
        return self.delta is not None and not (self.resident and holds)

    def panels(self, dtype: torch.dtype) -> Iterator[Panel]:
        yield from self.rows(0, self.shape[0], dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Iterator[Panel]:
        """The rows ``first`` to ``last`` of the stored matrix, numbered from ``first``."""
        copies = self._needs_copies()
        weight = self.layer.base_parameter.detach().view(self.shape)
        if not copies and weight.dtype == dtype:
            yield 0, last - first, weight[first:last]
            return
        for start, stop in panels(last - first, self.shape[1] * max(dtype.itemsize, weight.dtype.itemsize)):
            panel = weight[first + start : first + stop]
            yield start, stop, (self._copy(first + start, first + stop) if copies else panel).to(dtype)

    def _copy(self, start: int, stop: int) -> Tensor:
        support, values = self._values()
        panel = self.layer.base_parameter.detach().view(self.shape)[start:stop].clone()
        within, first, last = support.of_rows(start, stop)
        add_to_support_(panel, within, values[first:last])
        return panel


@dataclass(frozen=True)
class ExpertPanels:
    """One expert's weight in panels of rows.

    Attributes:
        source: of all experts.
        number: the expert's.
    """

    source: ExpertsSource
    number: int

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.source.shape
        return rows // self.source.experts, cols

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def panels(self, dtype: torch.dtype) -> Iterator[Panel]:
        """``(start, stop, weight[start:stop])`` of the expert in ``dtype``."""
        rows = self.shape[0]
        return self.source.rows(self.number * rows, (self.number + 1) * rows, dtype)


@dataclass(frozen=True)
class BaseExperts:
    """The experts of a parameter without adapters.

    Attributes:
        weight: ``(experts, rows, cols)``.
    """

    weight: Tensor
    is_whole = True
    key = UNOBSERVED

    @property
    def experts(self) -> int:
        return len(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def expert(self, number: int) -> BaseExpert:
        """The weight of one expert."""
        return BaseExpert(self.weight[number].detach())

    def whole(self, dtype: torch.dtype) -> Tensor | None:
        """The parameter, where it has the dtype."""
        return self.weight.detach() if self.weight.dtype == dtype else None

    def read(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``act``: nothing writes into the weights."""
        return act(*args, **kwargs)

    def after_backward(self) -> None:
        """Nothing is trained."""


@dataclass(frozen=True)
class BaseExpert:
    """One expert's weight in panels of rows.

    Attributes:
        weight: ``(rows, cols)``.
    """

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.weight.shape
        return rows, cols

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def panels(self, dtype: torch.dtype) -> Iterator[Panel]:
        """``(start, stop, weight[start:stop])`` in ``dtype``."""
        rows, cols = self.shape
        for start, stop in panels(rows, cols * max(dtype.itemsize, self.weight.dtype.itemsize)):
            yield start, stop, self.weight[start:stop].to(dtype)
