"""The layer of SNELL and SNELLA."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...ops import distance_layer
from ..base_layer import Step, TunerLayer
from ..ledger import Weight
from .config import SnellaConfig
from .state import KernelState

# A base of these is added to; in half precision most of what a delta says would be rounded away.
ADDED_TO = (torch.float32, torch.float64)


class SnellaLinear(TunerLayer[KernelState]):
    """A layer with a sparse delta from the distances of two sets of vectors.

    SNELL, https://arxiv.org/abs/2411.01800. Shapes: ``A`` ``(2, in, r / 2)``, ``B`` ``(2, out, r / 2)``. Arguments are
    those of ``TunerLayer``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SnellaConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SnellaConfig(r=8, target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> type(layer).__name__, layer.path(), tuple(layer.get_delta_weight("default").shape)
        ('SnellaLinear', 'fused', (32, 64))
    """

    config_cls = SnellaConfig
    takes_partitions = True

    def adapters_step(self, x: Tensor, names: tuple[str, ...], has_more: bool) -> Step:
        self._refuse_transforms()
        if not has_more and self.path(x) == "fused":
            return Step(partial(self._fused_forward, names[0]), Weight.OWN)
        return super().adapters_step(x, names, has_more)

    def path(self, x: Tensor | None = None) -> str:
        """How the forward pass of the active adapters is computed.

        Args:
            x: the input; one in the base's dtype if None.

        Returns:
            ``"fused"``: the delta is added to parts of the base weight, so that each pass multiplies once;
            ``"additive"``: the base layer's own forward, and the delta's beside it.
        """
        names = self._active_names()
        fuses = (
            len(names) == 1
            and not (self.disable_adapters or self.merged)
            and self.quantization_backend is None
            and not self._serves()
            and not (self.training and self.deltas[names[0]].settings.dropout)
            and not self._is_hooked()
            and self._base_is_stock(x)
            and self.base_parameter.dtype in ADDED_TO
            and not self._is_sharded()
        )
        return "fused" if fuses else "additive"

    def _serves(self) -> bool:
        return not self.training and not torch.is_grad_enabled()

    @torch.compiler.disable  # a graph would materialise the whole delta
    def _fused_forward(self, adapter_name: str, x: Tensor) -> Tensor:
        state = self.deltas[adapter_name]
        how, dtype, bias = state.competition(), self._compute_dtype(x), self.base_bias
        bias = None if bias is None else bias.to(dtype)
        return distance_layer(x.to(dtype), state(), state.tau.clone(), how, self.base_parameter.detach(), bias)

    @torch.compiler.disable
    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        state = self.deltas[adapter_name]
        state.sharded = self._is_sharded()
        x = x.to(self._compute_dtype(x))
        if self._serves() and state.settings.cache:
            return self.product.leave(self.product.multiply(self.product.enter(x), state.kept_delta(x.dtype)), x)
        how = state.competition()  # which may find another tau
        return distance_layer(state.dropout(x), state(), state.tau.clone(), how)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's delta as a dense tensor of the stored weight's shape, in the factors' dtype."""
        delta = self.deltas[adapter].dense()
        return (delta if self.product.in_dim == 1 else delta.t()).reshape(self.weight_shape)
