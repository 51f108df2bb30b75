"""How a sparse delta is computed: functional ops, each with several implementations.

``backends`` says which implementations the device or the user allows; ``plans`` chooses the path of a gradient.

The public names are the ones in the documentation: [`Combination`][sparse_peft.ops.Combination],
[`use_backend`][sparse_peft.use_backend] and the ops in ``docs/kernels.md``. All other exports are internal to
sparse_peft and may change in any release.
"""

from .backends import BACKENDS, kernel_backend, kernels_possible, log_once, use_backend
from .codebook_linear import CodedWeight, Codes, codebook_linear
from .codes import code_gather, code_scatter_add, column_groups, pack_codes, packed_width, unpack_codes
from .combine import (
    COMBINATIONS,
    ENTRY_COMBINATIONS,
    FACTOR_COMBINATIONS,
    Combination,
    check_weights,
    combine_factors,
    combine_on_supports,
)
from .communication import (
    gather_features,
    gathered_features,
    own_entries,
    own_features,
    sum_gradients,
    sum_parts,
)
from .compiled_experts import functional_experts
from .compiled_layer import functional_embedding, functional_layer
from .conv import CONVOLUTIONS, ConvProduct, is_convolution
from .crossover import Crossover, cache_file, known_crossover
from .delta_matmul import delta_matmul, delta_matmul_add_
from .distance import MIX, PIECES, THRESHOLDS, Factors, distance_matrix, find_threshold, full_precision
from .distance_layer import Competition, InitialDelta, distance_delta, distance_entries, distance_layer
from .embedding import EmbeddingProduct, embedding_delta, set_row_entries_
from .entries import (
    add_to_support_,
    effective_entries,
    read_entries,
    read_support,
    restore_,
    resync_,
    scatter_add_,
    take_,
    write_entries_,
    write_support_,
)
from .expert_products import (
    EveryExpert,
    ExpertProduct,
    ExpertSource,
    OneExpert,
    Recipe,
    Routing,
    SeveralExperts,
    SortedTokens,
    TokenwiseExperts,
    dense_experts,
    expert_product,
)
from .expert_support_grad import expert_parts, expert_support_grad
from .gradient_observers import UNOBSERVED, GradientObserver, new_key, observe
from .gradient_paths import gradient_panels
from .held_entries import HeldEntries, restore_supports_, resync_supports_, take_supports_
from .kept_inputs import COMPRESSIONS, Compression, is_formed_again, rounded_bytes
from .masked_dw import PANEL_BYTES_PER_WEIGHT, masked_dw
from .masked_linear import MaskedPart, MaskedWeight, masked_linear, sums_of_runs
from .mixed_batch import BatchOrder, add_channel_deltas_, add_entry_deltas_, diagonal_of, suits_one_product
from .monarch import block_sizes, monarch_dense, monarch_factors, monarch_product, monarch_projection, monarch_sum
from .nuclear import nuclear_norm
from .one_hot import Factor, OneHot
from .plans import GradientPlan, plan_support_grad
from .products import LayerProduct, LinearProduct, MatrixProduct, WeightSource
from .proximal import PROXIMAL_OPERATORS, reference_threshold, soft_threshold
from .sparse_low_rank import cheaper_way, compose_weight, sparse_low_rank_linear
from .spectral import spectral_product
from .support_grad import support_grad
from .support_layer import How, support_layer
from .torch_library import remember

__all__ = [
    "BACKENDS",
    "COMBINATIONS",
    "COMPRESSIONS",
    "CONVOLUTIONS",
    "ENTRY_COMBINATIONS",
    "FACTOR_COMBINATIONS",
    "MIX",
    "PANEL_BYTES_PER_WEIGHT",
    "PIECES",
    "PROXIMAL_OPERATORS",
    "THRESHOLDS",
    "UNOBSERVED",
    "BatchOrder",
    "CodedWeight",
    "Codes",
    "Combination",
    "Competition",
    "Compression",
    "ConvProduct",
    "Crossover",
    "EmbeddingProduct",
    "EveryExpert",
    "ExpertProduct",
    "ExpertSource",
    "Factor",
    "Factors",
    "GradientObserver",
    "GradientPlan",
    "HeldEntries",
    "How",
    "InitialDelta",
    "LayerProduct",
    "LinearProduct",
    "MaskedPart",
    "MaskedWeight",
    "MatrixProduct",
    "OneExpert",
    "OneHot",
    "Recipe",
    "Routing",
    "SeveralExperts",
    "SortedTokens",
    "TokenwiseExperts",
    "WeightSource",
    "add_channel_deltas_",
    "add_entry_deltas_",
    "add_to_support_",
    "block_sizes",
    "cache_file",
    "cheaper_way",
    "check_weights",
    "code_gather",
    "code_scatter_add",
    "codebook_linear",
    "column_groups",
    "combine_factors",
    "combine_on_supports",
    "compose_weight",
    "delta_matmul",
    "delta_matmul_add_",
    "dense_experts",
    "diagonal_of",
    "distance_delta",
    "distance_entries",
    "distance_layer",
    "distance_matrix",
    "effective_entries",
    "embedding_delta",
    "expert_parts",
    "expert_product",
    "expert_support_grad",
    "find_threshold",
    "full_precision",
    "functional_embedding",
    "functional_experts",
    "functional_layer",
    "gather_features",
    "gathered_features",
    "gradient_panels",
    "is_convolution",
    "is_formed_again",
    "kernel_backend",
    "kernels_possible",
    "known_crossover",
    "log_once",
    "masked_dw",
    "masked_linear",
    "monarch_dense",
    "monarch_factors",
    "monarch_product",
    "monarch_projection",
    "monarch_sum",
    "new_key",
    "nuclear_norm",
    "observe",
    "own_entries",
    "own_features",
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
    "rounded_bytes",
    "scatter_add_",
    "set_row_entries_",
    "soft_threshold",
    "sparse_low_rank_linear",
    "spectral_product",
    "suits_one_product",
    "sum_gradients",
    "sum_parts",
    "sums_of_runs",
    "support_grad",
    "support_layer",
    "take_",
    "take_supports_",
    "unpack_codes",
    "use_backend",
    "write_entries_",
    "write_support_",
]
