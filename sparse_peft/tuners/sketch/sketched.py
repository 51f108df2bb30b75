"""A linear layer of codes and tables, which replaces one with a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...calibrate.codebooks import Sketch
from ...ops import CodedWeight, Codes, code_gather, codebook_linear
from ..layer_parts import bias_of, weight_of


class SketchedLinear(nn.Module):
    """A linear layer with codes and a frozen table in place of its weight; the bias is kept.

    Args:
        base: the ``nn.Linear`` or transformers' ``Conv1D`` that it replaces.
        sketch: of its weight, ``(outputs, inputs)``.
        nearest_checksum: checksum of the codes nearest to the weight.
        keep: keep the dense weight on the CPU, for ``original``.
    """

    codebook: Tensor
    codes: nn.Parameter
    bias: nn.Parameter | None
    like: Tensor

    def __init__(self, base: nn.Module, sketch: Sketch, nearest_checksum: int, keep: bool = False):
        super().__init__()
        self.out_features, self.in_features = sketch.codes.shape[0], sketch.cols
        self.is_conv1d = isinstance(base, Conv1D)
        self.bits, self.groups = sketch.bits, sketch.groups
        self.nearest_checksum = nearest_checksum
        # set directly: while PEFT loads with low_cpu_mem_usage, parameters that are registered go to the meta device
        self._parameters["bias"] = bias_of(base)
        # a parameter, as bitsandbytes' packed weights are: distributed wrappers copy buffers in every pass
        self._parameters["codes"] = nn.Parameter(sketch.codes, requires_grad=False)
        self.register_buffer("codebook", sketch.codebooks)
        # follows .to() and .half() as a weight would
        self.register_buffer("like", torch.empty(0, dtype=weight_of(base).dtype), persistent=False)
        self._dense = weight_of(base).detach().cpu() if keep else None

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def coded(self) -> CodedWeight:
        """The weight without its table."""
        return CodedWeight((self.out_features, self.in_features), (Codes(self.codes, self.bits),))

    @property
    def sketch(self) -> Sketch:
        return Sketch(self.codebook, self.codes.data, bits=self.bits, groups=self.groups, cols=self.in_features)

    def decode(self, table: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight with this table, in the replaced layer's layout."""
        weight = code_gather(table.detach(), self.codes, self.bits, self.in_features, dtype)
        return weight.t().contiguous() if self.is_conv1d else weight

    @property
    def weight(self) -> Tensor:
        """The dense weight of the frozen table, decoded on each access."""
        return self.decode(self.codebook, self.dtype)

    def with_weight(self, weight: Tensor) -> nn.Module:
        """An ordinary layer with this weight, in the replaced layer's layout, and the same bias."""
        dense = self._without_weight()
        dense.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def _without_weight(self) -> nn.Linear | Conv1D:
        if not self.is_conv1d:
            return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        empty = Conv1D(0, 0)
        empty.nf, empty.nx = self.out_features, self.in_features
        return empty

    @property
    def keeps_original(self) -> bool:
        return self._dense is not None

    def original(self) -> nn.Module:
        """The replaced layer, whose weight was kept."""
        assert self._dense is not None  # a model without it is not unloaded
        return self.with_weight(self._dense.to(self.codes.device))

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return codebook_linear(x, (self.codebook,), bias, self.coded)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.codebook
        module = super()._apply(fn, recurse)
        if self.codebook.dtype != before.dtype and before.device.type != "meta":
            self.codebook = before.to(self.codebook.device)  # codes and trained tables refer to these very numbers
        return module

    def __getstate__(self) -> dict[str, Any]:
        # torch.save takes one dtype for each memory, and the adapters have the table's numbers as bytes
        return {**self.__dict__, "_buffers": {**self._buffers, "codebook": self.codebook.clone()}}

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, bits={self.bits}, groups={self.groups}"
