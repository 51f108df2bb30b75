"""The layer of SLTrain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import cheaper_way, compose_weight, sparse_low_rank_linear
from ..backups import SET_ASIDE
from ..base_layer import Step
from ..delta import SparseDelta
from ..delta_config import Resident
from ..delta_layer import SparseTunerLayer
from ..ledger import Weight
from ..low_rank import LowRankLayer
from .config import SLTrainConfig
from .delta import SLTrainDelta
from .weightless import WeightlessLinear


class SLTrainLinear(LowRankLayer[SLTrainDelta], SparseTunerLayer[SLTrainDelta]):
    """A layer with trained entries and low rank, beside its weight or, if ``weightless``, in place of it.

    SLTrain, https://arxiv.org/abs/2406.02214. Shapes: ``A`` ``(r, in)``, ``B`` ``(out, r)``, values ``(k,)``.

    Args:
        base_layer: the layer that is adapted or replaced.
        name: its full name in the model.
        resident: whether its weight may hold the active adapter's entries between forward passes.
        weightless: drop the base weight.
        backend: without a base weight: ``"composed"``, ``"factored"`` or ``"auto"``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SLTrainConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SLTrainConfig(r=4, target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> type(layer).__name__, layer.path(), tuple(layer.get_delta_weight("default").shape)
        ('SLTrainLinear', 'resident', (32, 64))
    """

    config_cls = SLTrainConfig
    stack_cls = None  # its low rank is no entry
    adds_entries_only = False

    def __init__(
        self,
        base_layer: nn.Module,
        name: str,
        resident: Resident = True,
        weightless: bool = False,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, name, resident, **kwargs)
        self.backend = backend
        self._device: torch.device | None = None
        if weightless:
            assert isinstance(base_layer, nn.Linear)  # the tuner refuses other targets
            self._device = base_layer.weight.device
            self.base_layer = WeightlessLinear(base_layer)

    @property
    def is_weightless(self) -> bool:
        return isinstance(self.base_layer, WeightlessLinear)

    @property
    def _only_name(self) -> str:
        (name,) = self.deltas
        return name

    def placement(self) -> tuple[torch.device | None, torch.dtype | None]:
        base, device = self.base_layer, self._device
        if not isinstance(base, WeightlessLinear):
            return super().placement()
        # in a model that was built on the meta device, the adapter's tensors are the first with memory
        return (None, None) if device is None or device.type == "meta" else (device, base.dtype)

    # ------------------------------------------------------------------ forward

    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        sparse = super().adapter_output(x, adapter_name)
        return sparse + self.low_rank_output(x, adapter_name).to(sparse.dtype)

    def forward_step(self, x: Tensor, adapter_names: list[str] | None, has_more: bool) -> Step:
        if self.is_weightless:
            return Step(self._weightless_forward, Weight.OWN)
        return super().forward_step(x, adapter_names, has_more)

    def adapters_step(self, x: Tensor, names: tuple[str, ...], has_more: bool) -> Step:
        step = super().adapters_step(x, names, has_more)
        return Step(partial(self._low_rank_added, step.run, names), step.wanted)

    def _low_rank_added(
        self, run: Callable[..., Tensor], names: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The output with the adapters' entries, plus their low-rank outputs."""
        result = run(x, *args, **kwargs)
        for name in names:
            result = result + self.low_rank_output(x, name).to(result.dtype)
        return result

    def path(self, x: Tensor | None = None) -> str:
        """As the base class's; without a base weight ``"composed"`` or ``"factored"``."""
        base = self.base_layer
        if not isinstance(base, WeightlessLinear):
            return super().path(x)
        if self.backend != "auto":
            return self.backend
        delta = self.settled(self._only_name)
        tokens, dtype = (1, base.dtype) if x is None else (x.numel() // max(1, x.shape[-1]), x.dtype)
        return cheaper_way(delta.rank, delta.support, tokens, dtype, delta.values.device)

    @torch.compiler.disable  # a graph would materialise the whole weight
    def _weightless_forward(self, x: Tensor) -> Tensor:
        delta = self.settled(self._only_name)
        dtype, bias = self._compute_dtype(x), self.base_bias
        x = x.to(dtype)
        down, up, values = (tensor.to(dtype) for tensor in (*delta.factors(), delta()))
        bias = None if bias is None else bias.to(dtype)
        return sparse_low_rank_linear(x, down, up, values, bias, delta.support, self.observer_key, self.path(x))

    # ------------------------------------------------------------------ merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        return super().get_delta_weight(adapter) + self.low_rank_weight(adapter)

    def merged_layer(self, names: tuple[str, ...]) -> nn.Module | None:
        base = self.base_layer
        if not isinstance(base, WeightlessLinear):
            return None
        delta = self.settled(self._only_name)
        down, up = (factor.detach() for factor in delta.factors())
        return base.with_weight(compose_weight(up, down, delta().detach(), delta.support))

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and (self.is_weightless or SET_ASIDE in self._modules):
            raise RuntimeError(
                f"layer {self.name}: an adapter of mode='pretrain' cannot be disabled: the layer has no weight "
                "besides it. There is no base model to compare with; keep a copy of the model instead"
            )
        super().enable_adapters(enabled)


class SLTrainExperts(SparseTunerLayer[SparseDelta]):
    """Fused experts with the sparse part of an SLTrain adapter; a low-rank part has factors of one matrix.

    SLTrain, https://arxiv.org/abs/2406.02214. Arguments are those of ``SparseTunerLayer``.
    """

    config_cls = SLTrainConfig

    def __init__(self, base_layer: nn.Module, name: str, resident: Resident = True, **kwargs: Any) -> None:
        for option in ("weightless", "backend"):  # of linear layers
            kwargs.pop(option, None)
        super().__init__(base_layer, name, resident, **kwargs)
