"""Adapters after training: save, load, compose, average, extract, lottery tickets, export, convert, compare, serve."""

from .compose import compose
from .convert import CONVERSION_TARGETS, convert
from .export import EXPORT_FORMS, export, save_merged
from .extract import EXTRACTION_CRITERIA, ExtractedLayer, Extraction, ExtractOptions, extract
from .files import load_adapter, save_adapter
from .lora import save_as_lora, save_lora_as_s2ft
from .lora_approximation import LowRankExport, save_low_rank
from .lottery_ticket import lottery_ticket
from .mixture import Mixture, learn_mixture
from .offline_adapter import StoredAdapter, read_stored
from .pool import AdapterPool, PoolStatistics
from .results import add_results
from .rosa import convert_rosa, rosa_masks
from .sketch_file import sketchtune_config
from .sltrain_file import convert_sltrain
from .soup import Soup, greedy_soup, soup
from .soup_cycle import soup_cycle
from .summary import AdapterSummary, Comparison, LayerComparison, LayerSummary, compare, summarise, supports_of
from .swap import prepare_for_swaps, swap_adapter
from .task_supports import Capacity, TaskSupports
from .to_entries import save_as_sparse, to_sparse

__all__ = [
    "CONVERSION_TARGETS",
    "EXPORT_FORMS",
    "EXTRACTION_CRITERIA",
    "AdapterPool",
    "AdapterSummary",
    "Capacity",
    "Comparison",
    "ExtractOptions",
    "ExtractedLayer",
    "Extraction",
    "LayerComparison",
    "LayerSummary",
    "LowRankExport",
    "Mixture",
    "PoolStatistics",
    "Soup",
    "StoredAdapter",
    "TaskSupports",
    "add_results",
    "compare",
    "compose",
    "convert",
    "convert_rosa",
    "convert_sltrain",
    "export",
    "extract",
    "greedy_soup",
    "learn_mixture",
    "load_adapter",
    "lottery_ticket",
    "prepare_for_swaps",
    "read_stored",
    "rosa_masks",
    "save_adapter",
    "save_as_lora",
    "save_as_sparse",
    "save_lora_as_s2ft",
    "save_low_rank",
    "save_merged",
    "sketchtune_config",
    "soup",
    "soup_cycle",
    "summarise",
    "supports_of",
    "swap_adapter",
    "to_sparse",
]
