"""The trained state of one masked weight."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...ops import MaskedPart
from ...support import Support, index_dtype
from ..base_state import UNSET, TrainedState
from .config import PruneConfig


class PrunedState(TrainedState):
    """A mask, and the parts of a delta that trains under it.

    The weight counts as ``(outputs, inputs)``, whatever its layout. Parameters, of which the config chooses: ``A``
    ``(r, inputs)`` and ``B`` ``(outputs, r)``; ``values`` ``(entries,)`` at ``positions``; ``dense`` ``(outputs,
    inputs)``; the scores' factors, rows and columns; ``residual``; ``log_scale`` ``(outputs,)``. Buffers: ``mask``
    ``(outputs, ceil(inputs / 8))`` uint8, one bit a weight; ``beta``, the mask's value where its bit is not set, NaN
    before there is a mask; ``released``, 1 once the delta is added behind the mask; ``back_mask`` for the input's
    gradient.

    Args:
        sizes: ``(outputs, inputs)``.
        config: of the adapter.
        name: the layer's name.
    """

    position_names = ("mask", "beta", "released", "positions", "back_mask")
    why_these_combinations = "; masks do not add up: merge the adapters, or activate them together"
    why_no_parts = "its mask takes base weights away"
    mask: Tensor
    beta: Tensor
    released: Tensor
    starts_final = False  # whether the first mask is the last one's pattern, for tests

    def __init__(self, sizes: tuple[int, int], config: PruneConfig, name: str):
        super().__init__(name)
        self.sizes_, self.config = sizes, config
        self.straight = config.is_straight
        outputs, inputs = sizes
        width, trains = -(-inputs // 8), str(config.trains)
        self.register_buffer("mask", torch.zeros(outputs, width, dtype=torch.uint8))
        self.register_buffer("beta", torch.tensor(math.nan))
        self.register_buffer("released", torch.tensor(0, dtype=torch.uint8))
        if config.plan.back:
            self.register_buffer("back_mask", torch.zeros(outputs, width, dtype=torch.uint8))
        if "low_rank" in trains:
            self.A, self.B = _factors(config.r, sizes)
        if "sparse" in trains:
            entries = config.entries(outputs * inputs)
            self.values = nn.Parameter(torch.zeros(entries))
            self.register_buffer("positions", torch.full((entries,), UNSET, dtype=index_dtype(sizes)))
        if trains == "weights":
            self.dense = nn.Parameter(torch.zeros(outputs, inputs))
        if config.plan.learns_scores:
            self.score_down, self.score_up = _factors(config.score_rank, sizes)
            self.score_rows = nn.Parameter(torch.zeros(outputs))
            self.score_cols = nn.Parameter(torch.zeros(inputs))
        if config.slorb:
            self.residual = nn.Parameter(torch.zeros(outputs, -(-inputs // config.slorb)))
        if config.plan.scales_rows:
            self.log_scale = nn.Parameter(torch.zeros(outputs))
        watched = next(key for key in ("B", "values", "dense") if key in self._parameters)
        self.value_name = watched  # type: ignore[misc]  # a class has one, and a config chooses here
        self._known: tuple[bool, bool] | None = None
        self._support: Support | None = None
        self.keep_dtype()

    def randomise(self) -> None:
        nn.init.normal_(self.watched, std=0.1 if self.value_name == "dense" else 1.0)
        self.starts_final = True

    # ------------------------------------------------------------------ what the buffers say

    def _flags(self) -> tuple[bool, bool]:
        """Whether there is a mask, and whether it was released: read from the device once."""
        if self._known is None:
            self._known = not bool(self.beta.isnan()), bool(self.released)
        return self._known

    @property
    def is_settled(self) -> bool:
        """Whether the mask is known."""
        return self._flags()[0]

    @property
    def outside(self) -> bool:
        """Whether the delta is added behind the mask."""
        return self.config.is_outside or self._flags()[1]

    @property
    def support(self) -> Support | None:
        """Positions of the values in ``(outputs, inputs)``; None without values."""
        positions = self._buffers.get("positions")
        if positions is None:
            return None
        if self._support is None or self._support.indices is not positions:
            self._support = Support(self.sizes_, positions, name=self.name)
        return self._support

    def forget(self) -> None:
        """Read the buffers anew."""
        self._known = self._support = None
        self.changes += 1

    def put(self, **buffers: Tensor | float | int) -> None:
        """Replace buffers: masks as new tensors, numbers in place."""
        for name, value in buffers.items():
            old = self.own_buffers[name]
            if isinstance(value, Tensor):
                self._buffers[name] = value.to(old.device, old.dtype)
            else:
                old.fill_(value)
        self.forget()

    def part(self) -> MaskedPart:
        """What a layer multiplies with; differentiable."""
        own = self._parameters
        tensors: dict[str, Tensor] = {}
        for name, parameter in own.items():
            assert parameter is not None
            known = {"A": "down", "B": "up"}.get(name, name)
            tensors[known] = parameter * self.config.scale if name == "B" else parameter
        return MaskedPart(
            tensors,
            self.mask,
            self.beta,
            self.outside,
            self.straight,
            self._buffers.get("back_mask"),
            self.support,
            max(1, self.config.slorb),
        )

    # ------------------------------------------------------------------ torch's bookkeeping, and files

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        flow = self.beta
        super()._apply(fn, recurse)
        if self.beta.dtype != torch.float32 and not flow.is_meta:
            self._buffers["beta"] = flow.to(self.beta.device, torch.float32)
        self.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def take_file(self, positions: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        positions = super().take_file(positions, parameters)
        found, numel = positions.get("positions"), math.prod(self.sizes_)
        if found is not None and (
            bool((found[1:] <= found[:-1]).any()) or not 0 <= int(found[0]) <= int(found[-1]) < numel
        ):
            raise ValueError(
                f"layer {self.name}: positions in the adapter file are not ascending numbers below {numel}; it is "
                "damaged: save or download it again"
            )
        if not 0 <= float(positions["beta"]) <= 1 or int(positions["released"]) > 1:
            raise ValueError(
                f"layer {self.name}: beta={float(positions['beta'])} and released={int(positions['released'])} in the "
                "adapter file, where a share and 0 or 1 are expected; it is damaged: save or download it again"
            )
        return positions

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None, "_support": None}

    def extra_repr(self) -> str:
        outputs, inputs = self.sizes_
        return f"recipe={self.config.recipe}, pattern={self.config.pattern}, outputs={outputs}, inputs={inputs}"


def _factors(rank: int, sizes: tuple[int, int]) -> tuple[nn.Parameter, nn.Parameter]:
    """As LoRA's: ``(rank, inputs)``, drawn, and ``(outputs, rank)`` zeros."""
    down = nn.Parameter(torch.empty(rank, sizes[1]))
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return down, nn.Parameter(torch.zeros(sizes[0], rank))
