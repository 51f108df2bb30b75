"""Which entries of a weight train: supports, budgets, and the criteria that choose.

The public names are the ones in the documentation, such as [`Support`][sparse_peft.support.Support],
[`Budget`][sparse_peft.support.Budget] and [`select`][sparse_peft.support.select]. All other exports are internal to
sparse_peft and may change in any release.
"""

from ..numerics.low_rank import principal_factors
from .blocks import (
    Block,
    as_block,
    best_blocks,
    block_scores,
    expand_blocks,
    random_blocks,
    resolve_block_counts,
    whole_blocks,
)
from .budget import ALLOCATIONS, Budget, Caps, allocate, apportion, divide, matches_layer, resolve_counts
from .channels import ChannelSupport, ExpertColumns
from .criteria import CRITERIA, Criterion, Given, Statistics, get_criterion, select
from .layout import Layout, RowGroup, layout_of
from .lines import best_in_lines, count_of_lines, random_in_lines, within_lines
from .regrowth import (
    RANDOM_SCORE,
    REFRESH,
    REGROWTHS,
    Candidates,
    Exchange,
    Regrowth,
    exchange,
    exchange_for,
    random_inactive,
)
from .schedules import DECAYS, BudgetSchedule, ReselectionSchedule, steps_of
from .shards import Shard
from .support import Support, check_indices, check_stored, compact_layout, index_dtype, layout_bytes
from .topk_outer import topk_outer

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "DECAYS",
    "RANDOM_SCORE",
    "REFRESH",
    "REGROWTHS",
    "Block",
    "Budget",
    "BudgetSchedule",
    "Candidates",
    "Caps",
    "ChannelSupport",
    "Criterion",
    "Exchange",
    "ExpertColumns",
    "Given",
    "Layout",
    "Regrowth",
    "ReselectionSchedule",
    "RowGroup",
    "Shard",
    "Statistics",
    "Support",
    "allocate",
    "apportion",
    "as_block",
    "best_blocks",
    "best_in_lines",
    "block_scores",
    "check_indices",
    "check_stored",
    "compact_layout",
    "count_of_lines",
    "divide",
    "exchange",
    "exchange_for",
    "expand_blocks",
    "get_criterion",
    "index_dtype",
    "layout_bytes",
    "layout_of",
    "matches_layer",
    "principal_factors",
    "random_blocks",
    "random_in_lines",
    "random_inactive",
    "resolve_block_counts",
    "resolve_counts",
    "select",
    "steps_of",
    "topk_outer",
    "whole_blocks",
    "within_lines",
]
