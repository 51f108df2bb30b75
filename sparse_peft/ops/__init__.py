"""How a sparse delta is computed: functional ops, each with the implementations that ``dispatch`` chooses from."""

from .calibration import Crossover, cache_file
from .codes import code_gather, code_scatter_add, pack_codes, packed_width, unpack_codes
from .delta_matmul import delta_matmul, spmm_add_
from .dispatch import BACKENDS, Plan, kernel_backend, log_once, plan_support_grad, use_backend
from .entries import effective_entries, read_entries, restore_, resync_, scatter_add_, write_entries_
from .library import remember
from .linear import WeightSource, functional_support_linear, support_linear
from .masked_dw import PANEL_BYTES_PER_WEIGHT, masked_dw
from .observe import GradientObserver, new_key, observe
from .panels import panel_bytes, panel_limit, panels
from .support_grad import accumulation_dtype, gradient_panels, support_grad

__all__ = [
    "BACKENDS",
    "PANEL_BYTES_PER_WEIGHT",
    "Crossover",
    "GradientObserver",
    "Plan",
    "WeightSource",
    "accumulation_dtype",
    "cache_file",
    "code_gather",
    "code_scatter_add",
    "delta_matmul",
    "effective_entries",
    "functional_support_linear",
    "gradient_panels",
    "kernel_backend",
    "log_once",
    "masked_dw",
    "new_key",
    "observe",
    "pack_codes",
    "packed_width",
    "panel_bytes",
    "panel_limit",
    "panels",
    "plan_support_grad",
    "read_entries",
    "remember",
    "restore_",
    "resync_",
    "scatter_add_",
    "spmm_add_",
    "support_grad",
    "support_linear",
    "unpack_codes",
    "use_backend",
    "write_entries_",
]
