"""How a sparse delta is computed: functional ops, each with the implementations that ``dispatch`` chooses from."""

from .calibration import Crossover, cache_file
from .channel_batch import BatchOrder, add_channel_deltas_
from .codebook_linear import CodedWeight, Codes, codebook_linear
from .codes import code_gather, code_scatter_add, pack_codes, packed_width, unpack_codes
from .conv import CONVOLUTIONS, ConvProduct, is_convolution
from .delta_matmul import delta_matmul, spmm_add_
from .dispatch import BACKENDS, Plan, kernel_backend, log_once, plan_support_grad, use_backend
from .entries import effective_entries, read_entries, restore_, resync_, scatter_add_, write_entries_
from .functional import functional_layer
from .layers import support_layer
from .library import remember
from .masked_dw import PANEL_BYTES_PER_WEIGHT, masked_dw
from .nuclear import nuclear_norm
from .observe import UNOBSERVED, GradientObserver, new_key, observe
from .panels import panel_bytes, panel_limit, panels
from .products import LinearProduct, Product, WeightSource
from .proximal import reference_threshold, soft_threshold
from .sparse_low_rank import cheaper_way, compose, sparse_low_rank_linear
from .support_entries import (
    add_to_support_,
    read_support,
    restore_supports_,
    resync_supports_,
    write_support_,
)
from .support_grad import accumulation_dtype, gradient_panels, support_grad

__all__ = [
    "BACKENDS",
    "BatchOrder",
    "CONVOLUTIONS",
    "CodedWeight",
    "Codes",
    "PANEL_BYTES_PER_WEIGHT",
    "UNOBSERVED",
    "ConvProduct",
    "Crossover",
    "GradientObserver",
    "LinearProduct",
    "Plan",
    "Product",
    "WeightSource",
    "accumulation_dtype",
    "add_channel_deltas_",
    "add_to_support_",
    "cache_file",
    "code_gather",
    "code_scatter_add",
    "codebook_linear",
    "cheaper_way",
    "compose",
    "delta_matmul",
    "effective_entries",
    "functional_layer",
    "gradient_panels",
    "is_convolution",
    "kernel_backend",
    "log_once",
    "masked_dw",
    "new_key",
    "nuclear_norm",
    "observe",
    "pack_codes",
    "packed_width",
    "panel_bytes",
    "panel_limit",
    "reference_threshold",
    "soft_threshold",
    "sparse_low_rank_linear",
    "panels",
    "plan_support_grad",
    "read_entries",
    "read_support",
    "remember",
    "restore_",
    "restore_supports_",
    "resync_",
    "resync_supports_",
    "scatter_add_",
    "spmm_add_",
    "support_grad",
    "support_layer",
    "unpack_codes",
    "use_backend",
    "write_entries_",
    "write_support_",
]
