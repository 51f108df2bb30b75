"""How a sparse delta is computed: functional ops, each with the implementations that ``dispatch`` chooses from."""

from .channel_batch import BatchOrder, add_channel_deltas_
from .codebook_linear import CodedWeight, Codes, codebook_linear
from .codes import code_gather, code_scatter_add, pack_codes, packed_width, unpack_codes
from .combine import (
    COMBINATIONS,
    ENTRY_COMBINATIONS,
    FACTOR_COMBINATIONS,
    Combination,
    check_weights,
    combine_factors,
    combine_on_supports,
)
from .compiled_layer import functional_layer
from .conv import CONVOLUTIONS, ConvProduct, is_convolution
from .crossover import Crossover, cache_file, known_crossover
from .delta_matmul import delta_matmul, spmm_add_
from .distance import MIX, PIECES, THRESHOLDS, Factors, find_threshold, full_precision, kernel
from .distance_layer import Competition, First, kernel_delta, kernel_entries, kernel_layer
from .entries import effective_entries, read_entries, restore_, resync_, scatter_add_, write_entries_
from .entry_batch import add_entry_deltas_, diagonal_of, suits_one_product
from .gradient_observers import UNOBSERVED, GradientObserver, new_key, observe
from .masked_dw import PANEL_BYTES_PER_WEIGHT, masked_dw
from .nuclear import nuclear_norm
from .plans import BACKENDS, Plan, kernel_backend, log_once, plan_support_grad, use_backend
from .products import LinearProduct, Product, WeightSource
from .proximal import reference_threshold, soft_threshold
from .sparse_low_rank import cheaper_way, compose, sparse_low_rank_linear
from .support_entries import add_to_support_, read_support, restore_supports_, resync_supports_, write_support_
from .support_grad import accumulation_dtype, gradient_panels, support_grad
from .support_layer import support_layer
from .torch_library import remember

__all__ = [
    "BACKENDS",
    "COMBINATIONS",
    "CONVOLUTIONS",
    "ENTRY_COMBINATIONS",
    "FACTOR_COMBINATIONS",
    "MIX",
    "PANEL_BYTES_PER_WEIGHT",
    "PIECES",
    "THRESHOLDS",
    "UNOBSERVED",
    "BatchOrder",
    "CodedWeight",
    "Codes",
    "Combination",
    "Competition",
    "ConvProduct",
    "Crossover",
    "Factors",
    "First",
    "GradientObserver",
    "LinearProduct",
    "Plan",
    "Product",
    "WeightSource",
    "accumulation_dtype",
    "add_channel_deltas_",
    "add_entry_deltas_",
    "add_to_support_",
    "cache_file",
    "cheaper_way",
    "check_weights",
    "code_gather",
    "code_scatter_add",
    "codebook_linear",
    "combine_factors",
    "combine_on_supports",
    "compose",
    "delta_matmul",
    "diagonal_of",
    "effective_entries",
    "find_threshold",
    "full_precision",
    "functional_layer",
    "gradient_panels",
    "is_convolution",
    "kernel",
    "kernel_backend",
    "kernel_delta",
    "kernel_entries",
    "kernel_layer",
    "known_crossover",
    "log_once",
    "masked_dw",
    "new_key",
    "nuclear_norm",
    "observe",
    "pack_codes",
    "packed_width",
    "plan_support_grad",
    "read_entries",
    "read_support",
    "reference_threshold",
    "remember",
    "restore_",
    "restore_supports_",
    "resync_",
    "resync_supports_",
    "scatter_add_",
    "soft_threshold",
    "sparse_low_rank_linear",
    "spmm_add_",
    "suits_one_product",
    "support_grad",
    "support_layer",
    "unpack_codes",
    "use_backend",
    "write_entries_",
    "write_support_",
]
