"""Embeddings with trained entries: rows of the weight are looked up by ids, and so are the values' gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ops import (
    UNOBSERVED,
    EmbeddingProduct,
    effective_entries,
    embedding_delta,
    functional_embedding,
    log_once,
    read_support,
)
from ..support import Support
from .active_delta import ActiveDelta
from .backups import EntriesBackup
from .delta_layer import DeltaT, SparseTunerLayer
from .files.checks import BASE_ADAPTER

Change = Callable[[Tensor, Tensor], Tensor]  # (ids, the base's rows) -> effective rows


class EmbeddingTunerLayer(SparseTunerLayer[DeltaT]):
    """``nn.Embedding`` with trained entries.

    Where the weight holds the entries, the forward pass is the base's. Elsewhere the entries of the rows that were
    looked up are added to these, which gives the same bits. The values' gradient is formed from the output gradient of
    the rows that occur; that of the row of ``padding_idx`` is zero.
    """

    product: EmbeddingProduct

    def _change(self, ids: Tensor, rows: Tensor, values: Tensor, support: Support, key: int = UNOBSERVED) -> Tensor:
        """The base's rows with a delta's entries, rounded as in a weight."""
        return effective_entries(rows, embedding_delta(ids, values, support, self.product, key))

    def _added(self, delta: ActiveDelta) -> Change:
        values = self.sum_values(delta)
        return lambda ids, rows: self._change(ids, rows, values, delta.support, self.observer_key)

    def _overlay_forward(self, delta: ActiveDelta, x: Tensor) -> Tensor:
        return self._added(delta)(x, self.base_layer(x))

    def _additive_forward(self, delta: ActiveDelta, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        log_once(f"layer {self.name}: the base layer's own forward is used, with the delta added to the rows in it")
        return self._run_base(self._added(delta), x, args, kwargs)

    @torch.compiler.disable  # a graph cannot look into a base layer with another forward, or with hooks
    def _run_base(self, change: Change, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The base layer's forward, in which rows that it looks up in its weight are changed."""
        with _LookupMode(self.base_layer, change) as mode:
            result = self.base_layer(x, *args, **kwargs)
        if not mode.is_used:
            raise RuntimeError(
                f"layer {self.name}: {type(self.base_layer).__name__} computes without torch's embedding function, so "
                "that its weight cannot be trained; leave it out with exclude_modules"
            )
        return result

    def _traced_forward(self, delta: ActiveDelta, x: Tensor) -> Tensor:
        weight, backup = self.base_parameter, self.ledger.backup
        originals = backup.originals if isinstance(backup, EntriesBackup) else read_support(weight, delta.support)
        values = self.sum_values(delta)
        return functional_embedding(x, values, weight, originals, delta.support, self.product, self.observer_key)

    def _transformed_forward(self, delta: ActiveDelta, x: Tensor) -> Tensor:
        return F.embedding(x, self._transformed_weight(delta))

    def _delta_product(self, x: Tensor, values: Tensor, support: Support, key: int = UNOBSERVED) -> Tensor:
        return embedding_delta(x, values, support, self.product, key)

    # ------------------------------------------------------------------ mixed batches

    def _mixed_forward(self, adapter_names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._base_is_stock() and not self._is_hooked() and not (args or kwargs):
            return self._mix(adapter_names, x, self.base_layer(x))
        return self._run_base(lambda ids, rows: self._mix(adapter_names, ids, rows), x, args, kwargs)

    def _mix(self, adapter_names: list[str], ids: Tensor, rows: Tensor) -> Tensor:
        """The base's rows with the entries of each item's own adapter."""
        result = rows.clone(memory_format=torch.contiguous_format)
        for name in dict.fromkeys(adapter_names):
            if name == BASE_ADAPTER or name not in self.deltas:
                continue
            items = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=ids.device)
            state = self.settled(name)
            part = self._change(ids.index_select(0, items), rows.index_select(0, items), state(), state.support)
            result = result.index_copy(0, items, part)
        return result


class _LookupMode(TorchFunctionMode):
    """Changes the rows that a base layer looks up in its weight."""

    def __init__(self, base: torch.nn.Module, change: Change):
        super().__init__()
        self.base, self.change, self.is_used = base, change, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.embedding and func is not torch.embedding:
            return result
        named = dict(
            zip(("input", "weight") if func is F.embedding else ("weight", "indices"), args[:2], strict=False)
        )
        named.update(kwargs or {})
        if named["weight"] is not self.base._parameters.get("weight"):
            return result
        self.is_used = True
        return self.change(named["input"] if func is F.embedding else named["indices"], result)
