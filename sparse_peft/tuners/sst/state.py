"""The trained state of one SST adapter in one layer: a weight's singular value decomposition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from ...dynamics.full_tensor import full_tensor, write_full_tensor_
from ...numerics import uniform
from ...ops import spectral_product
from ..base_state import TrainedState
from ..forms import StateSizes
from .config import SSTConfig

HALVES = (torch.float16, torch.bfloat16)


class SpectralState(TrainedState):
    """``U diag(S) V`` takes the place of the weight, as a map from inputs to outputs.

    The parameters ``U`` ``(outputs, r)`` and ``V`` ``(r, inputs)`` are the vectors that train, of the singular values
    ``active`` ``(r,)``; ``S`` has all. The buffers ``U_rest`` and ``V_rest`` have the other vectors, and zeros at the
    active ones: the weight is the sum of both products. All stay float32 when the model is cast: rounded vectors are
    not orthogonal.

    Args:
        sizes: ``(inputs, outputs)`` of the layer.
        config: the adapter's.
        name: the layer's name.
    """

    value_name = "S"
    position_names = ("U_rest", "V_rest", "active")
    always_float32 = full_precision = frozenset({"S", "U", "V"})
    why_no_parts = "it is a weight of its own, by its singular vectors, in place of the base's"
    why_these_combinations = "each adapter has a weight of its own, by its singular vectors"
    U_rest: Tensor
    V_rest: Tensor
    active: Tensor

    def __init__(self, sizes: tuple[int, int], config: SSTConfig, name: str):
        super().__init__(name)
        inputs, outputs = sizes
        values, self.seed = min(sizes), config.seed
        r = min(config.r, values)
        self.S = nn.Parameter(torch.zeros(values))
        self.U = nn.Parameter(torch.zeros(outputs, r))
        self.V = nn.Parameter(torch.zeros(r, inputs))
        self.register_buffer("U_rest", torch.zeros(outputs, values))
        self.register_buffer("V_rest", torch.zeros(values, inputs))
        self.register_buffer("active", torch.arange(r))
        self.keep_dtype()

    def randomise(self) -> None:
        self.S.data = (self.S.data + self.S.data.mean() * torch.randn_like(self.S)).abs_()

    # ------------------------------------------------------------------ the decomposition

    @torch.no_grad()
    def decompose(self, weight: Tensor) -> None:
        """Take over the decomposition of a weight ``(outputs, inputs)``; no vector is active afterwards."""
        u, s, v = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        self.take(u, s, v)

    @torch.no_grad()
    def take(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        """Put a decomposition in place, in which no vector is active."""
        self.changes += 1
        for own, given in ((self.U_rest, u), (self.S, s), (self.V_rest, v)):
            write_full_tensor_(own, given)

    @torch.no_grad()
    def rest(self) -> None:
        """Put the trained vectors back among the others."""
        self.U_rest[:, self.active] = full_tensor(self.U).to(self.U_rest)
        self.V_rest[self.active] = full_tensor(self.V).to(self.V_rest)

    @torch.no_grad()
    def activate(self, active: Tensor) -> None:
        """Let the vectors of these singular values ``(r,)`` train; all are among the others."""
        self.changes += 1
        self.active.copy_(active)
        write_full_tensor_(self.U, self.U_rest[:, active])
        write_full_tensor_(self.V, self.V_rest[active])
        self.U_rest[:, active] = 0
        self.V_rest[active] = 0

    def drawn(self, number: int) -> Tensor:
        """The ``number``-th draw of singular values, ``(r,)`` ascending; the same on every machine.

        Without replacement, one after the other in proportion to the probabilities: the ``r`` largest of
        ``log(u) / p``, with ``u`` uniform (Efraimidis and Spirakis 2006).
        """
        values = full_tensor(self.S).double().cpu().clamp(min=0)
        total = values.sum()
        chances = 0.5 / values.numel() + 0.5 * (values / total if total > 0 else 1 / values.numel())
        drawn = (uniform(values.numel(), seed=self.seed, name=f"{self.name} {number}").double() + 1) / 2
        keys = drawn.clamp(min=2**-25).log() / chances
        return keys.topk(self.active.numel()).indices.sort().values.to(self.active)

    # ------------------------------------------------------------------ the weight

    def output(self, x: Tensor) -> Tensor:
        """The product of the whole weight with the layer's input, of which no tensor of its size is made."""
        rest = ((x @ self.V_rest.to(x.dtype).t()) * self.S) @ self.U_rest.to(x.dtype).t()
        return rest + spectral_product(x, self.U, self.S[self.active], self.V)

    def dense(self) -> Tensor:
        """The whole weight, ``(outputs, inputs)``."""
        return (self.U_rest * self.S) @ self.V_rest + (self.U * self.S[self.active]) @ self.V

    # ------------------------------------------------------------------ dtype and files

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self.own_buffers[name] for name in ("U_rest", "V_rest")}
        module = super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.own_buffers[name]
            if new.dtype in HALVES and old.device.type != "meta":
                self._buffers[name] = old.to(new.device, torch.float32)
        return module

    def take_file(self, positions: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        taken = super().take_file(positions, parameters)
        active = positions["active"]
        if bool((active[1:] <= active[:-1]).any()) or int(active[0]) < 0 or int(active[-1]) >= self.S.numel():
            raise ValueError(
                f"layer {self.name}: active has the singular values {active.tolist()[:8]}, and increasing numbers "
                f"from 0 to {self.S.numel() - 1} are expected; the adapter's file is damaged: download it again"
            )
        return taken

    def sizes(self, save_dtype: torch.dtype) -> StateSizes:
        # a token has a number for each singular value, and one more for each whose vectors train
        return replace(super().sizes(save_dtype), rank=self.S.numel() + self.active.numel())

    def extra_repr(self) -> str:
        return f"values={self.S.numel()}, r={self.active.numel()}"
