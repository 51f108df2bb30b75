"""Which entries of a weight train: sets of positions, budgets, and the criteria that choose."""

from .blocks import Block, as_block, best_blocks, block_scores, expand_blocks, random_blocks, resolve_block_counts
from .budget import ALLOCATIONS, Budget, allocate, apportion, divide, matches_layer, resolve_counts
from .channel_scores import CHANNEL_CRITERIA, Side, channel_squares, weight_squares
from .channels import ChannelSupport
from .codebooks import METHODS as CODEBOOK_METHODS
from .codebooks import Sketch, ascending, assign_codes, codes_checksum, column_groups, fit_codebooks
from .compensation import compensated_sketch, output_error, refit_codebooks
from .criteria import CRITERIA, Criterion, Statistics, get_criterion, principal_factors, select
from .layout import Layout, RowGroup, layout_of
from .order_statistics import order_statistics
from .outer import topk_outer
from .regrowth import RANDOM_SCORE, REGROWTHS, Candidates, Exchange, Regrowth, exchange, random_inactive
from .rng import sample_without_replacement, uniform
from .schedules import DECAYS, BudgetSchedule, ReselectionSchedule, steps_of
from .scoring import collect_supports, given_gradients, supports_from_gradients
from .support import Support, check_indices, index_dtype
from .topk import RunningTopK, topk_indices

__all__ = [
    "ALLOCATIONS",
    "CHANNEL_CRITERIA",
    "CODEBOOK_METHODS",
    "CRITERIA",
    "DECAYS",
    "RANDOM_SCORE",
    "REGROWTHS",
    "Block",
    "Budget",
    "BudgetSchedule",
    "Candidates",
    "ChannelSupport",
    "Criterion",
    "Exchange",
    "Layout",
    "Regrowth",
    "ReselectionSchedule",
    "RowGroup",
    "RunningTopK",
    "Side",
    "Sketch",
    "Statistics",
    "Support",
    "allocate",
    "apportion",
    "as_block",
    "ascending",
    "assign_codes",
    "best_blocks",
    "block_scores",
    "channel_squares",
    "check_indices",
    "codes_checksum",
    "collect_supports",
    "column_groups",
    "compensated_sketch",
    "divide",
    "exchange",
    "expand_blocks",
    "fit_codebooks",
    "get_criterion",
    "given_gradients",
    "index_dtype",
    "layout_of",
    "matches_layer",
    "order_statistics",
    "output_error",
    "principal_factors",
    "random_blocks",
    "random_inactive",
    "refit_codebooks",
    "resolve_block_counts",
    "resolve_counts",
    "sample_without_replacement",
    "select",
    "steps_of",
    "supports_from_gradients",
    "topk_indices",
    "topk_outer",
    "uniform",
    "weight_squares",
]
