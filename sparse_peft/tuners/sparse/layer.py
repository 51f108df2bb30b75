"""The layer of a sparse delta."""

from __future__ import annotations

from ..delta_layer import SparseTunerLayer


class SparseLinear(SparseTunerLayer):
    """A linear layer with trained entries; see ``SparseTunerLayer``."""

    delta_container = "sparse_peft_delta_adapter"
    adapter_layer_names = (delta_container,)

    def __repr__(self) -> str:
        return f"sparse_peft.{super().__repr__()}"
