"""How a sparse delta is computed: functional ops, each with the implementations that ``dispatch`` chooses from."""

from .delta_matmul import delta_matmul
from .dispatch import BACKENDS, use_backend
from .entries import effective_entries, read_entries, write_entries_
from .linear import WeightSource, functional_support_linear, support_linear
from .observe import GradientObserver, new_key, observe
from .panels import panel_bytes, panel_limit, panels
from .support_grad import accumulation_dtype, gradient_panels, support_grad

__all__ = [
    "BACKENDS",
    "GradientObserver",
    "WeightSource",
    "accumulation_dtype",
    "delta_matmul",
    "effective_entries",
    "functional_support_linear",
    "gradient_panels",
    "new_key",
    "observe",
    "panel_bytes",
    "panel_limit",
    "panels",
    "read_entries",
    "support_grad",
    "support_linear",
    "use_backend",
    "write_entries_",
]
