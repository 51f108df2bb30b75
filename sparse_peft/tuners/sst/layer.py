"""The layer of Sparse Spectral Training."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..backups import WeightBackup
from ..base_layer import Step, TunerLayer
from ..ledger import Weight
from .config import SSTConfig
from .state import SpectralState


class SSTLinear(TunerLayer[SpectralState]):
    """A layer that computes with the singular value decomposition of its trained weight.

    SST, https://arxiv.org/abs/2405.15481. Shapes: ``S`` ``(k,)``, ``U`` ``(out, r)``, ``V`` ``(r, in)``. Several
    active adapters add what each changes of the weight. Arguments are those of ``TunerLayer``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SSTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> layer = get_peft_model(base, SSTConfig(r=4, target_modules=["0"])).base_model.model[0]
        >>> type(layer).__name__, bool(layer.get_delta_weight("default").abs().max() < 1e-5)
        ('SSTLinear', True)
    """

    config_cls = SSTConfig

    def adapters_step(self, x: Tensor, names: tuple[str, ...], has_more: bool) -> Step:
        self._refuse_transforms()
        if has_more or len(names) > 1 or self._is_hooked():
            return super().adapters_step(x, names, has_more)
        return Step(partial(self._spectral_forward, names[0]), Weight.OWN)

    def _spectral_forward(self, name: str, x: Tensor) -> Tensor:
        """The output with the trained weight, without the base's."""
        if self.quantization_backend is not None:
            self._restore_dtypes((name,))
        out, bias = self._whole_output(x, name), self.base_bias
        return (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)

    def _whole_output(self, x: Tensor, name: str) -> Tensor:
        state = self.deltas[name]
        x = self._cast_input_dtype(x, state.S.dtype)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # vectors of half precision are not orthogonal
            with torch.autocast(kind, enabled=False):
                return state.output(x.to(state.S.dtype))
        return state.output(x)

    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        base, bias = self.base_layer(x), self.base_bias
        return self._whole_output(x, adapter_name) - (base if bias is None else base - bias.to(base.dtype))

    def _mixed_deltas_(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> None:
        if self._is_hooked():
            super()._mixed_deltas_(result, x, adapter_names)
        else:
            self._replace_items_(result, x, adapter_names, self._spectral_forward)

    def get_delta_weight(self, adapter: str) -> Tensor:
        trained = self.deltas[adapter].dense()
        return (trained if self.product.in_dim == 1 else trained.t()) - self._own_weight().to(trained.dtype)

    def _own_weight(self) -> Tensor:
        """The base's own weight, also while adapters are merged."""
        backup = self.ledger.backup
        return backup.original if isinstance(backup, WeightBackup) else self.dense_base_weight()
