"""What becomes of an adapter after training: files of models without PEFT's wrapper, and other adapters' forms."""

from .compose import compose
from .export import export, save_merged
from .extract import EXTRACTION_CRITERIA, ExtractedLayer, Extraction, extract
from .files import load_adapter, save_adapter
from .lora import save_as_lora, save_lora_as_s2ft
from .low_rank import LowRankExport, save_low_rank
from .soup import Soup, greedy_soup, soup

__all__ = [
    "EXTRACTION_CRITERIA",
    "ExtractedLayer",
    "Extraction",
    "LowRankExport",
    "Soup",
    "compose",
    "export",
    "extract",
    "greedy_soup",
    "load_adapter",
    "save_adapter",
    "save_as_lora",
    "save_lora_as_s2ft",
    "save_low_rank",
    "save_merged",
    "soup",
]
