"""Which entries of a weight train: sets of positions, budgets, and the criteria that choose."""

from .budget import ALLOCATIONS, Budget, apportion, resolve_counts
from .criteria import CRITERIA, Criterion, Statistics, get_criterion, select
from .rng import sample_without_replacement
from .scoring import collect_supports, supports_from_gradients
from .support import Support, check_indices, index_dtype
from .topk import RunningTopK, topk_indices

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "Budget",
    "Criterion",
    "RunningTopK",
    "Statistics",
    "Support",
    "apportion",
    "check_indices",
    "collect_supports",
    "get_criterion",
    "index_dtype",
    "resolve_counts",
    "sample_without_replacement",
    "select",
    "supports_from_gradients",
    "topk_indices",
]
