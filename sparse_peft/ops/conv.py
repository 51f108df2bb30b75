"""The product of a convolution of one to three dimensions.

The weight counts as the matrix ``(out, in / groups * taps)``. Its gradient at single entries is computed by
``support_grad`` from the unfolded input, one tile at a time. Where the dense gradient is faster, it is the
convolution's own, for one block of output channels at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics.panels import panels
from ..numerics.tokens import accumulation_dtype
from ..support import ChannelSupport, Support
from .gradient_observers import observer_of
from .plans import plan_support_grad
from .products import WeightPanels, trains_input_channels
from .support_grad import observed_support_grad

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def is_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """Whether the module is one of ``CONVOLUTIONS``; false for subclasses with a forward pass of their own."""
    return any(
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and type(module)._conv_forward is kind._conv_forward
        for kind in CONVOLUTIONS
    )


@dataclass(frozen=True)
class ConvProduct:
    """A convolution over the last dimensions.

    Attributes:
        kernel: taps in each dimension.
        stride: in each dimension.
        padding: zeros on both sides of each dimension.
        dilation: in each dimension.
        groups: as in ``nn.Conv2d``.
        outer: other padding, as ``F.pad`` takes it, and its mode; None for none.
        in_dim: always 1: the columns of the weight's matrix are the inputs.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    outer: tuple[tuple[int, ...], str] | None = None
    in_dim: int = 1

    @classmethod
    def of(cls, module: Convolution) -> ConvProduct:
        """The product of a convolution."""
        kernel, padding = tuple(module.kernel_size), module.padding
        outer: tuple[tuple[int, ...], str] | None = None
        if isinstance(padding, str) or module.padding_mode != "zeros":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            outer = tuple(module._reversed_padding_repeated_twice), mode
            padding = (0,) * len(kernel)
        return cls(kernel, tuple(module.stride), tuple(padding), tuple(module.dilation), module.groups, outer)

    def _weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.shape[0], -1, *self.kernel)

    # ------------------------------------------------------------------ forward and input

    def enter(self, x: Tensor) -> Tensor:
        """The input with its outer padding, and a single item as a batch of one."""
        if self.outer is not None:
            x = F.pad(x, self.outer[0], mode=self.outer[1])
        return x.unsqueeze(0) if self._is_single(x) else x

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        return out.squeeze(0) if self._is_single(x) else out

    def _is_single(self, x: Tensor) -> bool:
        return x.ndim == len(self.kernel) + 1

    def forward(self, x: Tensor, source: WeightPanels, bias: Tensor | None) -> Tensor:
        out: Tensor | None = None
        for start, stop, matrix in self._panels(source, x.dtype):
            weight = self._weight(matrix)
            if stop - start == source.shape[0]:
                return self.convolve(x, weight, bias)
            part = self.convolve(x, weight, None if bias is None else bias[start:stop])
            if out is None:
                out = part.new_empty(part.shape[0], source.shape[0], *part.shape[2:])
            out[:, start:stop] = part
        if out is None:
            raise ValueError(f"the source of a weight of {source.shape} returned no panels")
        return out

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with a dense weight."""
        settings = self.stride, self.padding, self.dilation, self.groups
        return _FORWARD[len(self.kernel)](x, weight, bias, *settings)

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        # only for one group: the second product mixes all channels
        hidden = self.convolve(self.enter(x), self._weight(down), None)
        return self.leave(_FORWARD[len(self.kernel)](hidden, up.reshape(*up.shape, *(1 for _ in self.kernel))), x)

    @property
    def taps(self) -> int:
        """Taps per input channel."""
        return math.prod(self.kernel)

    def part(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[:, start // self.taps : stop // self.taps]

    def multiply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.convolve(x, self._weight(matrix), bias)

    def multiply_back(self, grad: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
        return self.dense_input_grad(grad, self._weight(matrix), x.shape)

    def matrix_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return self.dense_grad(grad, x).flatten(1).to(accumulation_dtype(grad.dtype))

    def _panels(self, source: WeightPanels, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        if self.groups == 1:
            return source.panels(dtype)
        # a panel may end within a group; grouped weights are small, so the whole weight is formed
        whole = torch.cat([weight.reshape(stop - start, -1) for start, stop, weight in source.panels(dtype)])
        return iter([(0, source.shape[0], whole)])

    def input_grad(self, grad: Tensor, source: WeightPanels, shape: torch.Size) -> Tensor:
        total: Tensor | None = None
        for start, stop, matrix in self._panels(source, grad.dtype):
            part = self.dense_input_grad(grad[:, start:stop], self._weight(matrix), shape)
            total = part if total is None else total.add_(part)
        if total is None:
            raise ValueError(f"the source of a weight of {source.shape} returned no panels")
        return total

    def dense_input_grad(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape, for a dense weight."""
        like_x = grad.new_empty(1).expand(shape)  # only its shape is read
        return self._backward(grad, like_x, weight, 0)

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, of: int) -> Tensor:
        """The gradient of the input (``of=0``) or of the weight (``of=1``)."""
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0 for _ in self.kernel],
            self.groups,
            [of == 0, of == 1, False],
        )[of]

    def bias_grad(self, grad: Tensor) -> Tensor:
        return grad.sum([d for d in range(grad.ndim) if d != 1])

    # ------------------------------------------------------------------ weight

    def keep(self, x: Tensor, support: Support) -> Tensor:
        return x.index_select(1, support.channels) if trains_input_channels(support, self.in_dim) else x

    def support_grad(self, grad: Tensor, kept: Tensor, support: Support, key: int) -> Tensor:
        dtype = accumulation_dtype(grad.dtype)
        if grad.numel() == 0 or support.nnz == 0:
            return torch.zeros(support.nnz, dtype=dtype, device=grad.device)
        if isinstance(support, ChannelSupport):
            if support.dim == 0:
                grad = grad.index_select(1, support.channels)
            return self.dense_grad(grad, kept).reshape(-1).to(dtype)
        observed = observer_of(key) is not None
        if self.groups > 1 or (not observed and plan_support_grad(support, grad.dtype, grad.device).path == "panels"):
            return self._dense_at(grad, kept, support, dtype)
        values = torch.zeros(support.nnz, dtype=dtype, device=grad.device)
        for left, right in self._unfolded(grad, kept):
            values += observed_support_grad(left, right, support, key)
        return values

    def dense_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of the weight ``(out channels of grad, in channels of x / groups, *kernel)``."""
        weight = grad.new_empty(1).expand(grad.shape[1], x.shape[1] // self.groups, *self.kernel)
        return self._backward(grad, x, weight, 1)

    def _dense_at(self, grad: Tensor, x: Tensor, support: Support, dtype: torch.dtype) -> Tensor:
        rows, cols = support.shape
        values = torch.empty(support.nnz, dtype=dtype, device=grad.device)
        a_group = rows // self.groups
        if self.groups == 1:
            bounds = panels(rows, cols * grad.dtype.itemsize)
        else:
            groups = panels(self.groups, a_group * cols * grad.dtype.itemsize)
            bounds = [(first * a_group, last * a_group) for first, last in groups]
        channels = x.shape[1] // self.groups
        for (start, stop), (first, last) in zip(bounds, support.entry_ranges(bounds), strict=True):
            if first == last:
                continue
            part, inputs = self, x
            if self.groups > 1:
                inputs = x[:, start // a_group * channels : stop // a_group * channels]
                part = replace(self, groups=(stop - start) // a_group)
            panel = part.dense_grad(grad[:, start:stop], inputs).reshape(-1)
            values[first:last] = panel.index_select(0, support.part(start, stop, first, last).indices)
        return values

    def _unfolded(self, grad: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tiles of the output gradient ``(tokens, out)`` and of the unfolded input ``(tokens, in * taps)``.

        Tokens are the positions of the output. Both have contiguous tokens, as the sampled products need.
        """
        sizes = grad.shape[2:]
        x = F.pad(x, [p for pad in reversed(self.padding) for p in (pad, pad)]) if any(self.padding) else x
        n, c = x.stride(0), x.stride(1)
        steps = [s * stride for s, stride in zip(x.stride()[2:], self.stride, strict=True)]
        taps = [d * s for s, d in zip(x.stride()[2:], self.dilation, strict=True)]
        shape = (x.shape[1], *self.kernel)
        item = math.prod(shape) * x.element_size()
        places = math.prod(sizes[1:])
        for i, j in panels(x.shape[0], item * places * sizes[0]):
            for a, b in panels(sizes[0], item * places * (j - i)):
                tile = (j - i, b - a, *sizes[1:])
                start = x.storage_offset() + i * n + a * steps[0]
                windows = x.as_strided((*shape, *tile), (c, *taps, n, *steps), start)
                left = grad[i:j, :, a:b].transpose(0, 1)
                yield left.reshape(left.shape[0], -1).t(), windows.reshape(math.prod(shape), -1).t()
