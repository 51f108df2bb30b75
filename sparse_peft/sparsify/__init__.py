"""Sparse weights: which weights of a model may be non-zero, chosen without training.

Three notions make a pruning method. A *pattern* is the sets of weights that may stay, a *score* ranks them, and a
*time plan* says when; here it is "once". Start reading at [`prune`][sparse_peft.sparsify.prune].
"""

from .armor import Armor, ArmorLinear
from .curve import GRID, CurvePoint, SparsityCurve, essential_sparsity, pruned
from .dsnot import DSnoT
from .files import LAYOUTS, load_sparse, save_sparse, sparse_sizes, zeros_of
from .masks import LayerMask, Masks, Removed, masks_of, restore
from .panelwise import keep_in_panels
from .parts import PARTS, Sensitivity, sensitivity
from .patterns import NM, Blocks, Channels, Pattern, Unstructured, as_pattern
from .pruning import ALLOCATIONS, REFINEMENTS, prune
from .rsparse import SHARES, LayerChannels, RSparseLinear, RSparseReport, r_sparse
from .scores import SCORES
from .semi_structured import to_semi_structured
from .sparsegpt import SparseGPT

__all__ = [
    "ALLOCATIONS",
    "GRID",
    "LAYOUTS",
    "NM",
    "PARTS",
    "REFINEMENTS",
    "SCORES",
    "SHARES",
    "Armor",
    "ArmorLinear",
    "Blocks",
    "Channels",
    "CurvePoint",
    "DSnoT",
    "LayerChannels",
    "LayerMask",
    "Masks",
    "Pattern",
    "RSparseLinear",
    "RSparseReport",
    "Removed",
    "Sensitivity",
    "SparseGPT",
    "SparsityCurve",
    "Unstructured",
    "as_pattern",
    "essential_sparsity",
    "keep_in_panels",
    "load_sparse",
    "masks_of",
    "prune",
    "pruned",
    "r_sparse",
    "restore",
    "save_sparse",
    "sensitivity",
    "sparse_sizes",
    "to_semi_structured",
    "zeros_of",
]
