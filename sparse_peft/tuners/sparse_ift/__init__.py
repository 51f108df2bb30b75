"""Sparse-IFT: more width, branches or ranks at equal numbers of parameters, by sparsity (Saxena et al. 2023)."""

from ..method import Method
from .budget import IsoBudget, iso_budget
from .config import SparseIFTConfig
from .dynamics import SparseIFTDynamics
from .layer import SparseIFTLinear
from .model import SparseIFTModel

__all__ = ["IsoBudget", "SparseIFTConfig", "SparseIFTLinear", "SparseIFTModel", "iso_budget"]

METHOD = Method("sparse_ift", SparseIFTModel, SparseIFTDynamics)
