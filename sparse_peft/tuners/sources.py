"""Where a layer's effective weight comes from.

*Resident*: the base weight itself holds the active adapters' entries, ``round(original + value)``, and the forward
pass is the base layer's own product.
*Product*: the base weight holds them only while it is multiplied.
*Gathered*: a weight that DeepSpeed gathers for a pass is written to for the moment of its product.
*Overlay*: a base that must not be written is copied panel by panel, with the entries set in the copy.
*Dequantised*: the entries are set in the buffer that a quantisation backend makes anyway.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from ..numerics import panels
from ..ops import LayerProduct, add_to_support_, read_support, write_support_
from ..support import Support
from .active_delta import ActiveDelta
from .changes import Stamp
from .ledger import Ledger

P = ParamSpec("P")
T = TypeVar("T")
Panel = tuple[int, int, Tensor]  # first row, row after the last, these rows


class AdaptedLayer(Protocol):
    """What sources ask of a layer with sparse deltas."""

    ledger: Ledger
    product: LayerProduct

    @property
    def held_shape(self) -> tuple[int, int]: ...

    @property
    def observer_key(self) -> int: ...

    @property
    def base_parameter(self) -> Tensor: ...

    def dequantised(self) -> Tensor: ...

    def sum_values(self, delta: ActiveDelta, stamp: Stamp | None = None) -> Tensor: ...

    def whole_values(self, delta: ActiveDelta) -> Tensor: ...

    def stamp(self, delta: ActiveDelta | None) -> Stamp | None: ...

    def check_stamp(self, delta: ActiveDelta, stamp: Stamp) -> None: ...

    def hold(self, delta: ActiveDelta | None, stamp: Stamp | None) -> bool: ...


class LayerSource(ABC):
    """The effective weight of a layer, in forward and again in backward.

    Args:
        layer: whose weight it is.
        delta: the adapters that act; None for the base weight alone.
        stamp: what their values are now, where that is known.
    """

    def __init__(self, layer: AdaptedLayer, delta: ActiveDelta | None, stamp: Stamp | None = None):
        self.layer, self.delta, self.stamp = layer, delta, stamp or layer.stamp(delta)
        self.shape, self.product, self.key = layer.held_shape, layer.product, layer.observer_key

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight as stored."""
        return self.layer.base_parameter.dtype

    @abstractmethod
    def panels(self, dtype: torch.dtype) -> Iterator[Panel]:
        """``(start, stop, weight[start:stop])`` in ``dtype``; called by a thread that is among the ledger's readers.

        Raises:
            RuntimeError: the values changed since the forward pass, or adapters were merged.
        """

    def read(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``act``, which reads panels, while no other thread changes the weight."""
        return self.layer.ledger.read(act, *args, **kwargs)

    def _copies(self, dtype: torch.dtype) -> Iterator[Panel]:
        """Copies of the base's rows with the entries set in them; the weight is the base's own."""
        (support, values), weight = self._values(), self.layer.base_parameter.detach()
        rows, cols = self.shape
        for start, stop in panels(rows, cols * max(dtype.itemsize, weight.dtype.itemsize)):
            panel = weight[start:stop].clone(memory_format=torch.contiguous_format)
            within, first, last = support.of_rows(start, stop)
            add_to_support_(panel, within, values[first:last])
            yield start, stop, panel.to(dtype)

    def _cast(self, weight: Tensor, dtype: torch.dtype) -> Iterator[Panel]:
        """The weight, or its panels in another dtype."""
        if weight.dtype == dtype:
            return iter(((0, self.shape[0], weight),))
        bounds = panels(self.shape[0], self.shape[1] * dtype.itemsize)
        return ((start, stop, weight[start:stop].to(dtype)) for start, stop in bounds)

    def _values(self) -> tuple[Support, Tensor]:
        """The adapters' entries, unless they changed since the forward pass."""
        assert self.delta is not None and self.stamp is not None
        self.layer.check_stamp(self.delta, self.stamp)
        return self.delta.support, self.layer.sum_values(self.delta, self.stamp).detach()

    def after_backward(self) -> None:
        """From now on values may be stepped in ways that leave no trace, as writes through ``.data`` do."""
        if self.stamp is not None:
            self.stamp.note_backward()


class ResidentSource(LayerSource):
    """The base weight itself; asked again in backward, it is made to hold what it held in forward."""

    def panels(self, dtype: torch.dtype) -> Iterator[Panel]:
        if not self.layer.hold(self.delta, self.stamp):
            return self._copies(dtype)
        return self._cast(self.layer.base_parameter.detach(), dtype)


class ProductSource(ResidentSource):
    """The base weight, which holds the entries only while it is multiplied, so that their originals are soon freed."""

    def read(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``act``, before and after which the weight is the base's own."""
        try:
            return super().read(act, *args, **kwargs)
        finally:
            self.layer.ledger.release()


class GatheredSource(LayerSource):
    """A weight of ZeRO stage 3, which is whole in the passes of the layer: it holds the entries for one product."""

    def panels(self, dtype: torch.dtype) -> Iterator[Panel]:
        self.layer.hold(None, None)
        # not detach(): the bits are restored, and whoever else saved the weight for backward sees no write
        (support, values), weight = self._values(), self.layer.base_parameter.data
        own = read_support(weight, support)
        try:
            add_to_support_(weight, support, values)
            yield from self._cast(weight, dtype)
        finally:
            write_support_(weight, support, own)

    def _values(self) -> tuple[Support, Tensor]:
        assert self.delta is not None and self.stamp is not None
        self.layer.check_stamp(self.delta, self.stamp)
        return self.delta.support, self.layer.whole_values(self.delta)


class OverlaySource(LayerSource):
    """Copies of the base's rows with the entries set in them, for bases that must not be written."""

    def panels(self, dtype: torch.dtype) -> Iterator[Panel]:
        self.layer.hold(None, None)
        yield from self._copies(dtype)


class DequantisedSource(LayerSource):
    """The backend's dequantised buffer with the entries set in it; the packed weight is only read."""

    def panels(self, dtype: torch.dtype) -> Iterator[Panel]:
        self.layer.hold(None, None)
        (support, values), buffer = self._values(), self.layer.dequantised()
        add_to_support_(buffer, support, values)
        yield 0, self.shape[0], buffer.to(dtype)


class DeltaSource:
    """The delta alone, dense, a panel at a time: added to the result of a base layer that must run by itself."""

    def __init__(self, shape: tuple[int, int], support: Support, values: Tensor, product: LayerProduct, key: int):
        self.shape, self.support, self.values = shape, support, values.detach()
        self.product, self.key = product, key
        self.dtype = values.dtype

    def panels(self, dtype: torch.dtype) -> Iterator[Panel]:
        """``(start, stop, delta[start:stop])`` in ``dtype``."""
        rows, cols = self.shape
        for start, stop in panels(rows, cols * dtype.itemsize):
            panel = torch.zeros(stop - start, cols, dtype=dtype, device=self.values.device)
            within, first, last = self.support.of_rows(start, stop)
            add_to_support_(panel, within, self.values[first:last])
            yield start, stop, panel

    def read(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``act``; values and positions are the pass's own."""
        return act(*args, **kwargs)

    def after_backward(self) -> None:
        """Nothing is kept."""
